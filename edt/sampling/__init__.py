"""Images of a trained model: the diffusers pipeline, sets of images (`edt sample`), and checkpoints converted to
pipelines and back (`edt convert`).
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .conversion import ConvertOptions as ConvertOptions
    from .conversion import convert as convert
    from .pipeline import EDTPipeline as EDTPipeline
    from .pipeline import load_pipeline as load_pipeline
    from .sample_set import SampleOptions as SampleOptions
    from .sample_set import draw_samples as draw_samples
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
