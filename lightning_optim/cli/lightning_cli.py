"""LightningCLI with two more arguments: a recipe and a teacher."""

import argparse
import sys
from typing import Any, cast

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_optim import _upstream
from lightning_optim.callbacks.monitors import check_score_is_logged
from lightning_optim.checkpoint import attach, read_checkpoint
from lightning_optim.cli.building import build, is_distilled, load
from lightning_optim.cli.command import UserError, said_plainly
from lightning_optim.cli.mistakes import check_strategy, parse_mistake
from lightning_optim.distillation import DistillationModule
from lightning_optim.files import is_sharded_folder
from lightning_optim.recipe import Recipe

__all__ = ["ObjectsCLI", "OptimCLI", "SaveConfigBesideLogs"]

SPECIAL_PATHS = ("last", "best", "hpc", "registry")
"""Values of Lightning's ``ckpt_path`` that are not a path."""


_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


class SaveConfigBesideLogs(SaveConfigCallback):
    """Lightning's callback, which without a logger would write ``config.yaml`` to the working directory."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration if this run has a log folder."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class OptimCLI(LightningCLI):
    """LightningCLI that compresses by ``recipe``, with ``teacher`` if the recipe distills.

    A class path can be any LightningModule; the recipe's callbacks are added to those of the configuration. For
    ``validate``, ``test`` and ``predict`` they restore the structure of a checkpoint's model.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the recipe and the teacher."""
        parser.add_argument(
            "--recipe",
            type=str | dict[str, Any] | None,
            default=None,
            help="how to compress: a recipe's name, a YAML file, or its arguments",
        )
        parser.add_subclass_arguments(
            nn.Module, "teacher", required=False, instantiate=False, help="the teacher, if the recipe distills"
        )
        parser.add_argument(
            "--teacher_ckpt", type=str | None, default=None, help="the teacher's checkpoint, compressed or not"
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let the parser raise, so that an error becomes one sentence."""
        _upstream.check(type(self))
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an error in the arguments or a configuration file becomes one sentence."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            raise UserError(parse_mistake(str(error), self._command())) from error

    def _command(self) -> str:
        return next((each for each in sys.argv[1:] if each in self.subcommands()), "fit")

    def _parse_ckpt_path(self) -> None:
        """Read the model from the configuration alone.

        Lightning 2.6 would replace it by the arguments in the checkpoint, and fails if the file was not written by a
        LightningCLI of the same form.
        """

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer; errors in their arguments are one line."""
        with said_plainly():
            self.recipe = Recipe.load(self._word("recipe") or {})
            super().instantiate_classes()
            self._check_data()
            if self.subcommand == "fit":
                self._check_file()
                self.model = self._wrapped(self._teacher())
            else:
                self.model = self._as_saved()

    def _check_data(self) -> None:
        """Reject a run without data, before anything else is built."""
        loader = f"{_LOADERS[str(self.subcommand)]}_dataloader"
        if self.datamodule is None and not is_overridden(loader, self.model):
            raise UserError(
                f"`{self.subcommand}` has no data: give --data CLASS (or `data` in the configuration), or a model with "
                f"`{loader}`."
            )

    def _wrapped(self, teacher: nn.Module | None) -> Any:
        """Return the module to fit; a recipe that distills without a teacher is an error."""
        wrapped = self.recipe.wrap(self.model, teacher)
        if isinstance(wrapped, DistillationModule) and wrapped.lacks_teacher:
            raise UserError(
                "the recipe distills, but there is no teacher. Pass --teacher CLASS with --teacher_ckpt FILE, or "
                "remove `distillation` from the recipe."
            )
        return wrapped

    def _check_file(self) -> dict[str, Any] | None:
        """Read the requested checkpoint, so that its errors are reported before anything runs."""
        path = self._word("ckpt_path")
        if path == "best" and self.subcommand != "fit":
            raise UserError(
                f"--ckpt_path best: `{self.subcommand}` is a separate run that has not trained. Pass the file."
            )
        if path is None or path in SPECIAL_PATHS or str(path).startswith("registry") or is_sharded_folder(path):
            return None
        return read_checkpoint(path)

    def _as_saved(self) -> pl.LightningModule:
        """Return the model with the structure of the checkpoint's, inside a DistillationModule if needed."""
        file = self._check_file()
        distils = is_distilled(file) if file is not None else self.recipe.distillation is not None
        model: pl.LightningModule = DistillationModule(self.model) if distils else self.model
        attach(model)
        return model

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Create the Trainer, with the recipe's callbacks."""
        own = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        callbacks = [*(own if isinstance(own, list) else [own]), *self.recipe.callbacks()]
        check_strategy(self._get(self.config_init, "trainer", default={}).get("strategy"))
        check_score_is_logged(callbacks)
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _word(self, name: str) -> Any:
        found = self._get(self.config, name)
        return found.as_dict() if isinstance(found, Namespace) else found

    def _teacher(self) -> nn.Module | None:
        """Create the teacher without advancing the random numbers of the run."""
        words, file = self._word("teacher"), self._word("teacher_ckpt")
        if words is None:
            if file is not None:
                raise UserError("`teacher_ckpt` needs `teacher`: the class (and arguments) of the file.")
            return None
        with isolate_rng():
            return cast("nn.Module", build(words) if file is None else load(words, file))


class ObjectsCLI(OptimCLI):
    """Model and data of a configuration, without a run: for the commands that take a checkpoint."""

    def _command(self) -> str:
        return sys.argv[0].rpartition(" ")[2]

    def instantiate_classes(self) -> None:
        """Make the model and the data only."""
        with said_plainly():
            self.config_init = self.parser.instantiate_classes(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
