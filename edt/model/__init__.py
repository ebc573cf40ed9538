"""EDT's transformer: sizes (`presets`, plain data that loads no torch), its layers, masking and routing, the reuse
of features between steps, and what it costs.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    complexity=(
        "cost_table",
        "estimate_memory",
        "meta_model",
        "sampling_multiply_adds",
    ),
    presets=(
        "AMM_PLACEMENTS",
        "PRESETS",
        "amm_placement",
        "published_amm_blocks",
    ),
    step_cache=("StepCacheConfig",),
    task_routing=("routing_mask",),
    transformer=(
        "EDTTransformer2DModel",
        "ModelMixin",  # diffusers looks for it beside a class that it loads
        "load_preset",
    ),
)
