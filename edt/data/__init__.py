"""Data folders: `edt extract` makes them of images (`sources`, `vae`, `shards`), training reads them (`dataset`);
handwritten digits, and how pictures are written.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    dataset=(
        "LatentDataset",
        "make_loader",
        "open_dataset",
        "to_latents",
        "verify_dataset",
        "write_dataset",
    ),
    extraction=(
        "ExtractOptions",
        "extract",
    ),
    shards=(
        "Manifest",
        "read_manifest",
    ),
)
