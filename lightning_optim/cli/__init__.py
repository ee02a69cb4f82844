"""The command ``lightning-optim``."""

from lightning_optim.cli.main import main

__all__ = ["main"]
