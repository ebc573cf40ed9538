"""Images of a trained model: the diffusers pipeline, sets of images (`edt sample`), and checkpoints converted to
pipelines and back (`edt convert`).
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    pipeline=(
        "EDTPipeline",
        "load_pipeline",
    ),
    sample_set=(
        "SampleOptions",
        "draw_samples",
    ),
    conversion=(
        "ConvertOptions",
        "convert",
    ),
)
