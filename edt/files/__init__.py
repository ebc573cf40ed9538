"""Files that are there whole or as they were before, text of others, whose fault an error of reading is, and the
lock of a folder that one process writes.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .errors import named_errors as named_errors
    from .lock import LOCK_FILE as LOCK_FILE
    from .lock import open_folder as open_folder
    from .lock import own_folder as own_folder
    from .outputs import new_file as new_file
    from .outputs import new_output as new_output
    from .outputs import sha256 as sha256
    from .outputs import write_json as write_json
    from .text import printable as printable
    from .text import read_json as read_json
    from .text import read_text as read_text
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
