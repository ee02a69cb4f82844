"""CompressedCheckpoint: a ModelCheckpoint that never keeps a model that is not compressed yet."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optim.callbacks.base import compressions

__all__ = ["CompressedCheckpoint"]


class CompressedCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose top-k counts only once every compression callback has reached its end.

    A plain ModelCheckpoint that monitors accuracy keeps the best of the dense epochs. This one takes the same
    arguments, writes ``last.ckpt`` as usual (so a killed run resumes), and leaves the top-k alone until the model is
    as compressed as was asked. Without a compression callback in the Trainer it is a plain ModelCheckpoint.

    Raises:
        ValueError: For ``save_last="link"``: before the end there is no top-k file to link to.

    Examples:
        >>> CompressedCheckpoint(monitor="val_acc", mode="max", save_last=True).save_last
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.save_last == "link":
            raise ValueError(
                "save_last='link' needs a top-k file at every save, and CompressedCheckpoint keeps none before the "
                "compression ends. Pass save_last=True."
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a Trainer that would not treat it as a checkpoint callback."""
        if type(trainer).__module__.startswith("pytorch_lightning"):
            raise MisconfigurationException(
                "CompressedCheckpoint is a ModelCheckpoint of `lightning`, which a Trainer of `pytorch_lightning` does "
                "not know. Import the Trainer from lightning.pytorch."
            )
        super().setup(trainer, pl_module, stage)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if _compressed(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_last:
            self._last_global_step_saved = trainer.global_step  # ModelCheckpoint writes "last" only beside a save

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when no model was ever as compressed as asked."""
        super().on_train_end(trainer, pl_module)
        if self.save_top_k != 0 and not _compressed(trainer) and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                "CompressedCheckpoint kept no model: the run ended before every compression callback reached its end. "
                "Train longer, or lower `end`."
            )


def _compressed(trainer: pl.Trainer) -> bool:
    return all(callback.reached_end for callback in compressions(trainer))
