"""What a run of training leaves in its folder: checkpoints and their checksums, the log and its plots; and the
weights that are read from them.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    checkpoint=(
        "latest_checkpoint",
        "list_checkpoints",
        "verify_checkpoint",
    ),
    log=("read_metrics",),
    plots=("plot_runs",),
    weights=(
        "initialize_from",
        "load_checkpoint",
        "load_released_state_dict",
    ),
)
