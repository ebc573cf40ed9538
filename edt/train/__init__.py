"""Training (`edt train`): its options and recipes (`config`), the loop (`trainer`), what a checkpoint keeps
(`state`), the losses with masking and alignment (`objective`, `alignment`).
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    config=(
        "RECIPES",
        "TrainConfig",
        "load_config",
    ),
    trainer=("train",),
    alignment=("AlignmentLoss",),
)
