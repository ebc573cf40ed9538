"""`edt demo`: a small EDT trained on handwritten digits, drawn and judged. `edt ablate`: the same with AMM and
masking on and off.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .ablation import AblateOptions as AblateOptions
    from .ablation import ablate as ablate
    from .judge import Judge as Judge
    from .run import DemoOptions as DemoOptions
    from .run import run_demo as run_demo
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
