"""Data folders: `edt extract` makes them of images (`sources`, `vae`, `shards`), training reads them (`dataset`);
handwritten digits, and how pictures are written.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .dataset import LatentDataset as LatentDataset
    from .dataset import make_loader as make_loader
    from .dataset import open_dataset as open_dataset
    from .dataset import to_latents as to_latents
    from .dataset import verify_dataset as verify_dataset
    from .dataset import write_dataset as write_dataset
    from .extraction import ExtractOptions as ExtractOptions
    from .extraction import extract as extract
    from .shards import Manifest as Manifest
    from .shards import read_manifest as read_manifest
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
