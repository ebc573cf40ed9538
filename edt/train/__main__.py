"""`python -m edt.train …` and `accelerate launch -m edt.train …` are `edt train …`."""

import sys

from ..cli import main

if __name__ == "__main__":  # workers that are spawned import it, too
    sys.exit(main(["train", *sys.argv[1:]]))
