"""`edt demo`: a small EDT trained on handwritten digits, drawn and judged. `edt ablate`: the same with AMM and
masking on and off.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    run=(
        "DemoOptions",
        "run_demo",
    ),
    judge=("Judge",),
    ablation=(
        "AblateOptions",
        "ablate",
    ),
)
