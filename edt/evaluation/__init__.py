"""FID, spatial FID, Inception score, precision and recall of images against a reference (`edt evaluate`)."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .evaluator import EvaluateOptions as EvaluateOptions
    from .evaluator import evaluate as evaluate
    from .metrics import frechet_distance as frechet_distance
    from .metrics import precision_recall as precision_recall
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
