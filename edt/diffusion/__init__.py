"""The diffusion process: noise schedule, losses and guidance (`process`), the loop that draws (`sampler`), and its
step as a CUDA graph.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    cuda_graph=("GraphedStep",),
    process=(
        "LossSecondMomentSampler",
        "add_noise",
        "guide",
        "make_scheduler",
        "predict",
        "training_losses",
    ),
    sampler=(
        "ANCESTRAL",
        "SOLVERS",
        "NotFiniteError",
        "check_scheduler",
        "sample",
        "set_timesteps",
    ),
)
