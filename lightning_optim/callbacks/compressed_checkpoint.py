"""CompressedCheckpoint: a ModelCheckpoint that only keeps compressed models."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optim import _upstream
from lightning_optim.callbacks.base import callbacks_of, compressions
from lightning_optim.callbacks.logged import MetricsSince
from lightning_optim.callbacks.monitors import check_score_is_logged

__all__ = ["CompressedCheckpoint"]


class CompressedCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that fills its top-k only after every compression callback has finished.

    A plain ModelCheckpoint that monitors accuracy would keep the best dense epoch. This one has the same arguments,
    writes ``last.ckpt`` as usual (so a killed run resumes), and does not touch the top-k until the model is fully
    compressed. Without a compression callback in the Trainer, every epoch counts.

    A model is never kept for a metric value of an earlier model: the metric must have been logged in this epoch, after
    the last time a model could be kept, and must not be NaN. Otherwise one warning says so.

    Raises:
        ValueError: For ``save_last="link"``: before the end there is no top-k file to link to.

    Examples:
        >>> CompressedCheckpoint(monitor="val_acc", mode="max", save_last=True).save_last
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _upstream.check(self)
        if self.save_last == "link":
            raise ValueError(
                "save_last='link' needs a top-k file at every save, and CompressedCheckpoint keeps none before the "
                "compression ends. Pass save_last=True."
            )
        self._logged = MetricsSince()
        self._passed_over = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject a Trainer that would not treat it as a checkpoint callback, or that logs nothing to monitor."""
        if type(trainer).__module__.startswith("pytorch_lightning"):
            raise MisconfigurationException(
                "CompressedCheckpoint is a ModelCheckpoint of `lightning`, which a Trainer of `pytorch_lightning` does "
                "not know. Import the Trainer from lightning.pytorch."
            )
        if stage == "fit":
            check_score_is_logged(callbacks_of(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Require that the metric is logged again from here on."""
        super().on_train_epoch_start(trainer, pl_module)
        self._logged.begin(trainer)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        problem = self._problem(trainer, monitor_candidates)
        self._logged.begin(trainer)
        if problem is not None and _compressed(trainer):
            self._passed_over = True
            rank_zero_warn(
                f"CompressedCheckpoint keeps no model where {self.monitor!r} {problem}. Log it in every validation, or "
                "monitor a metric that is."
            )
        if problem is None and _compressed(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_last:
            self._last_global_step_saved = trainer.global_step  # ModelCheckpoint writes "last" only beside a save

    def _problem(self, trainer: pl.Trainer, candidates: dict[str, Tensor]) -> str | None:
        """Return why the monitored value does not belong to this model; None if it does."""
        if self.monitor is None or self.monitor not in candidates:  # ModelCheckpoint raises for an unknown name
            return None
        if self.monitor in trainer.callback_metrics and self.monitor not in self._logged.read(trainer):
            return "was last logged for an earlier model"
        return "is NaN" if bool(torch.isnan(torch.as_tensor(candidates[self.monitor])).any()) else None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the run kept no model."""
        super().on_train_end(trainer, pl_module)
        if self.save_top_k == 0 or getattr(trainer, "fast_dev_run", False):
            return
        if not _compressed(trainer):
            rank_zero_warn(
                "CompressedCheckpoint kept no model: the run ended before every compression callback reached its end. "
                "Train longer, or lower `end`."
            )
        elif self._passed_over and not self.best_model_path:
            rank_zero_warn(
                f"CompressedCheckpoint kept no model: {self.monitor!r} had no value of its own in any epoch after the "
                "compression ended."
            )


def _compressed(trainer: pl.Trainer) -> bool:
    return all(callback.reached_end for callback in compressions(trainer))
