"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a recipe and a teacher."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial

from lightning_optim.cli.command import Command, command_parser, need_jsonargparse

__all__ = ["COMMANDS"]

_HELP = {
    "fit": "train, and compress by a recipe while training, from a YAML file",
    "validate": "validate a checkpoint, compressed or not",
    "test": "test a checkpoint, compressed or not",
    "predict": "predict with a checkpoint, compressed or not",
}
_EXAMPLES = {"fit": "--config small.yaml --recipe cpu-latency --trainer.max_epochs 20"}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of Lightning's own commands."""
    if {"-h", "--help"} & set(arguments):
        _short_help(name).print_help()
        return 0
    need_jsonargparse()
    from lightning_optim.cli.lightning_cli import OptimCLI, SaveConfigBesideLogs

    before = sys.argv
    given = ["--help" if word == "--help_all" else word for word in arguments]
    sys.argv = ["lightning-optim", name, *given]  # LightningCLI warns of `args` beside those of the process
    try:
        OptimCLI(save_config_callback=SaveConfigBesideLogs)
    finally:
        sys.argv = before
    return 0


def _short_help(name: str) -> ArgumentParser:
    """Return a parser whose help has the arguments that most runs need; those of the Trainer alone fill pages."""
    parser = command_parser(
        name,
        f"{_HELP[name].capitalize()}.",
        example=_EXAMPLES.get(name, "--config small.yaml --ckpt_path small.ckpt"),
        usage=f"lightning-optim {name} [--config FILE] [ARGUMENT ...]",
    )
    add = parser.add_argument
    add("--help_all", action="store_true", help="list every argument, also those of the Trainer")
    add("--config", metavar="FILE", help="YAML with any of these arguments; later words replace what it says")
    add("--print_config", action="store_true", help="print the configuration that these words make, and end")
    add("--model", metavar="CLASS", help="a LightningModule: package.Class; its arguments: --model.NAME VALUE")
    add("--data", metavar="CLASS", help="a LightningDataModule, likewise")
    if name == "fit":
        add("--recipe", help="how to compress: a recipe's name (`lightning-optim recipes`), a YAML file, or arguments")
        add("--teacher", metavar="CLASS", help="the teacher, if the recipe distills")
        add("--teacher_ckpt", metavar="FILE", help="its checkpoint, compressed or not")
        add("--optimizer", metavar="CLASS", help="instead of the module's own; --lr_scheduler likewise")
    add("--trainer.NAME", metavar="VALUE", help="an argument of the Trainer: --trainer.max_epochs 20")
    add("--ckpt_path", metavar="FILE", help="the run to resume" if name == "fit" else "the checkpoint")
    add("--seed_everything", metavar="SEED", help="of Python, NumPy and torch")
    return parser


COMMANDS = tuple(Command(name, help, partial(run, name)) for name, help in _HELP.items())
