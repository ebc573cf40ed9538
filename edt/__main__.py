"""`python -m edt …` and `accelerate launch -m edt …` are the command `edt`."""

import sys

from .cli import main

sys.exit(main())
