"""What a search trains: model, data, Trainer and teacher of a configuration, made anew for every trial."""

import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_optim.cli.command import UserError, said_plainly
from lightning_optim.cli.lightning_cli import ObjectsCLI
from lightning_optim.cli.loading import quiet_trainer
from lightning_optim.cli.mistakes import check_strategy
from lightning_optim.search import SearchReport, search

__all__ = ["Searched"]


class _SearchCLI(ObjectsCLI):
    """A configuration whose objects are made when a trial needs them."""

    teacher: nn.Module | None

    def instantiate_classes(self) -> None:
        """Make the data and the teacher, which all trials share."""
        with said_plainly():
            super().instantiate_classes()
            check_strategy(self._get(self.config_init, "trainer", default={}).get("strategy"))
            if self.datamodule is None and not is_overridden("train_dataloader", self.model):
                raise UserError("`search` has no data: give --data CLASS (or `data` in the configuration).")
            self.teacher = self._teacher()

    def make_module(self) -> pl.LightningModule:
        """Return a new model, with the configuration's optimizer if it has one."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self._get(self.config_init, "model")
        self._add_configure_optimizers_method_to_model(None)
        model: pl.LightningModule = self.model
        return model

    def make_trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        """Return a new Trainer, with the configuration's callbacks before the recipe's."""
        made = self.parser.instantiate_classes(self.config)
        own = self._get(made, "trainer", default={}).get("callbacks") or []
        self.config_init = made
        both = [*(own if isinstance(own, list) else [own]), *callbacks]
        return LightningCLI.instantiate_trainer(self, callbacks=both)


class Searched:
    """A configuration to search for.

    Args:
        arguments: Of ``fit``: ``--config``, ``--model``, ``--data``, ``--trainer...``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        before = sys.argv
        sys.argv = ["lightning-optim search", *arguments]
        try:
            self._cli = _SearchCLI(run=False, seed_everything_default=0, save_config_callback=None)
        finally:
            sys.argv = before

    def search(self, *, on: str, metric: str, **options: Any) -> SearchReport:
        """Search by what the model's own loop logs.

        Args:
            on: "validate" or "test".
            metric: Name of the logged metric that is the accuracy.
            options: Of :func:`~lightning_optim.search`.
        """
        seed = self._cli.config.seed_everything
        monitor = {"monitor": metric} if on == "validate" else {"stop_early": False}  # only validation runs in a fit
        return search(
            **{**options, **monitor},
            make_module=self._cli.make_module,
            make_trainer=self._cli.make_trainer,
            evaluate=lambda model: {"accuracy": self._logged(model, on, metric)},
            seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
            datamodule=self._cli.datamodule,
            teacher=self._cli.teacher,
        )

    def _logged(self, model: Any, on: str, metric: str) -> float:
        """Return what the model's own loop logs on the data."""
        (logged,) = getattr(quiet_trainer(), on)(model, datamodule=self._cli.datamodule, verbose=False)
        if metric not in logged:
            raise UserError(f"--accuracy {metric}: {on} logged {', '.join(sorted(logged)) or 'nothing'}.")
        return float(logged[metric])
