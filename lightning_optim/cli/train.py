"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a recipe and a teacher."""

import sys
from collections.abc import Sequence
from functools import partial

from lightning_optim.cli.command import Command, need_jsonargparse

__all__ = ["COMMANDS"]

_HELP = {
    "fit": "train, and compress by a recipe while training, from a YAML file",
    "validate": "validate a checkpoint, compressed or not",
    "test": "test a checkpoint, compressed or not",
    "predict": "predict with a checkpoint, compressed or not",
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of Lightning's own commands."""
    need_jsonargparse()
    from lightning_optim.cli.lightning_cli import OptimCLI, SaveConfigBesideLogs

    before = sys.argv
    sys.argv = ["lightning-optim", name, *arguments]  # LightningCLI warns of `args` beside those of the process
    try:
        OptimCLI(save_config_callback=SaveConfigBesideLogs)
    finally:
        sys.argv = before
    return 0


COMMANDS = tuple(Command(name, help, partial(run, name)) for name, help in _HELP.items())
