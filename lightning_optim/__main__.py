"""``python -m lightning_optim``: the command ``lightning-optim``."""

import sys

from lightning_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
