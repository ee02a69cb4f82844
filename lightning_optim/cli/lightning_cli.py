"""LightningCLI with two more words: a recipe, and a teacher."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_optim.checkpoint import attach, read_checkpoint
from lightning_optim.cli.building import build, is_distilled, load
from lightning_optim.cli.command import UserError, said_plainly
from lightning_optim.distillation import DistillationModule
from lightning_optim.recipe import Recipe

__all__ = ["ObjectsCLI", "OptimCLI", "SaveConfigBesideLogs"]

SPECIAL_PATHS = ("last", "best", "hpc", "registry")
"""What Lightning takes for a checkpoint besides a path."""


class SaveConfigBesideLogs(SaveConfigCallback):
    """Lightning's, which without a logger would write (or find) ``config.yaml`` in the working directory."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration where there is a folder for the logs of this run."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class OptimCLI(LightningCLI):
    """LightningCLI whose Trainer compresses by ``recipe``, taught by ``teacher`` where the recipe distils.

    A class path can be any LightningModule, and the recipe's callbacks stand beside those of the configuration. For
    ``validate``, ``test`` and ``predict`` they restore what a checkpoint's model was made into.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the recipe and the teacher."""
        parser.add_argument(
            "--recipe",
            type=str | dict[str, Any] | None,
            default=None,
            help="how to compress: a recipe's name, a YAML file, or its words",
        )
        parser.add_subclass_arguments(
            nn.Module, "teacher", required=False, instantiate=False, help="who teaches, where the recipe distils"
        )
        parser.add_argument(
            "--teacher_ckpt", type=str | None, default=None, help="the teacher's checkpoint, compressed or not"
        )

    def _parse_ckpt_path(self) -> None:
        """Take the model from the configuration alone.

        Lightning 2.6 would put a checkpoint's arguments in its place, and cannot where the file was not written by a
        LightningCLI of the same form.
        """

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer; what is wrong with their words is said in one line."""
        with said_plainly():
            self.recipe = Recipe.load(self._word("recipe") or {})
            super().instantiate_classes()
            if self.subcommand == "fit":
                self._check_file()
                self.model = self.recipe.wrap(self.model, self._teacher())
            else:
                self.model = self._as_saved()

    def _check_file(self) -> dict[str, Any] | None:
        """Read the checkpoint that is asked for, so that what is wrong with it is said before anything runs."""
        path = self._word("ckpt_path")
        if path is None or path in SPECIAL_PATHS or Path(path).is_dir():
            return None
        return read_checkpoint(path)

    def _as_saved(self) -> pl.LightningModule:
        """Return the model with what the checkpoint's needs: its structure, and the module around a student."""
        file = self._check_file()
        distils = is_distilled(file) if file is not None else self.recipe.distillation is not None
        model: pl.LightningModule = DistillationModule(self.model) if distils else self.model
        attach(model)
        return model

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer, with the recipe's callbacks."""
        own = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        callbacks = [*(own if isinstance(own, list) else [own]), *self.recipe.callbacks()]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _word(self, name: str) -> Any:
        found = self._get(self.config, name)
        return found.as_dict() if isinstance(found, Namespace) else found

    def _teacher(self) -> nn.Module | None:
        """Make the teacher without moving the random numbers of the run."""
        words, file = self._word("teacher"), self._word("teacher_ckpt")
        if words is None:
            if file is not None:
                raise UserError("`teacher_ckpt` needs `teacher`: the class (and arguments) that the file is of.")
            return None
        with isolate_rng():
            return cast("nn.Module", build(words) if file is None else load(words, file))


class ObjectsCLI(OptimCLI):
    """Model and data of a configuration, without a run: for the commands that take a checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the model and the data only."""
        with said_plainly():
            self.config_init = self.parser.instantiate_classes(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
