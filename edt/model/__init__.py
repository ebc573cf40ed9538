"""EDT's transformer: sizes (`presets`, plain data that loads no torch), its layers, masking and routing, the reuse
of features between steps, and what it costs.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .complexity import cost_table as cost_table
    from .complexity import estimate_memory as estimate_memory
    from .complexity import meta_model as meta_model
    from .complexity import sampling_multiply_adds as sampling_multiply_adds
    from .presets import AMM_PLACEMENTS as AMM_PLACEMENTS
    from .presets import PRESETS as PRESETS
    from .presets import amm_placement as amm_placement
    from .presets import published_amm_blocks as published_amm_blocks
    from .step_cache import StepCacheConfig as StepCacheConfig
    from .task_routing import routing_mask as routing_mask
    from .transformer import EDTTransformer2DModel as EDTTransformer2DModel
    from .transformer import ModelMixin as ModelMixin  # diffusers looks for it beside a class that it loads
    from .transformer import load_preset as load_preset
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
