"""What a run of training leaves in its folder: checkpoints and their checksums, the log and its plots; and the
weights that are read from them.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .checkpoint import latest_checkpoint as latest_checkpoint
    from .checkpoint import list_checkpoints as list_checkpoints
    from .checkpoint import verify_checkpoint as verify_checkpoint
    from .log import read_metrics as read_metrics
    from .plots import plot_runs as plot_runs
    from .weights import initialize_from as initialize_from
    from .weights import load_checkpoint as load_checkpoint
    from .weights import load_released_state_dict as load_released_state_dict
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
