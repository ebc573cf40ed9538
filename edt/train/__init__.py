"""Training (`edt train`): its options and recipes (`config`), the loop (`trainer`), what a checkpoint keeps
(`state`), the losses with masking and alignment (`objective`, `alignment`).
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .alignment import AlignmentLoss as AlignmentLoss
    from .config import RECIPES as RECIPES
    from .config import TrainConfig as TrainConfig
    from .config import load_config as load_config
    from .trainer import train as train
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
