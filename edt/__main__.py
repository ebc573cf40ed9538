"""`python -m edt` is `edt`."""

import sys

from .cli import main

sys.exit(main())
