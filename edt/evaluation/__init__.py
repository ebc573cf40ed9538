"""FID, spatial FID, Inception score, precision and recall of images against a reference (`edt evaluate`)."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    evaluator=(
        "EvaluateOptions",
        "evaluate",
    ),
    metrics=(
        "frechet_distance",
        "precision_recall",
    ),
)
