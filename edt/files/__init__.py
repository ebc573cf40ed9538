"""Files that are there whole or as they were before, text of others, whose fault an error of reading is, and the
lock of a folder that one process writes.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    errors=("named_errors",),
    lock=(
        "LOCK_FILE",
        "open_folder",
        "own_folder",
    ),
    outputs=(
        "new_file",
        "new_output",
        "sha256",
        "write_json",
    ),
    text=(
        "printable",
        "read_json",
        "read_text",
    ),
)
