"""Callbacks that watch a metric, and what they need while a model is compressed."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks.windowed import mro_names

__all__ = ["check_score_is_known", "check_score_is_logged", "warn_of_plain_monitors"]


def check_score_is_logged(callbacks: Iterable[Any]) -> None:
    """Refuse a callback that monitors the score P where no PerformanceScore logs it.

    Raises:
        MisconfigurationException: With the callback and what to add.
    """
    callbacks = list(callbacks)
    if any("PerformanceScore" in mro_names(callback) for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if _is_score(monitor):
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={monitor!r}) needs PerformanceScore to log it, and the Trainer "
                "has none. Add lightning_optim.PerformanceScore() (`score` in a recipe), or monitor a "
                "metric that the module logs."
            )


def _is_score(monitor: Any) -> bool:
    return isinstance(monitor, str) and (monitor == "P" or monitor.startswith("P/"))


def warn_of_plain_monitors(technique: str, callbacks: Iterable[Any]) -> None:
    """Warn where a checkpoint or early stopping watches a metric that falls while a technique compresses."""
    plain = [callback for callback in callbacks if _prefers_the_dense_model(callback)]
    if plain:
        named = " and ".join(f"{type(c).__name__}(monitor={c.monitor!r})" for c in plain)
        rank_zero_warn(
            f"{named} watches a metric while {technique} compresses, so it prefers the epochs before. "
            "Use lightning_optim.CompressedCheckpoint, or monitor PerformanceScore's 'P', whose infeasible "
            "values are never the best."
        )


def _prefers_the_dense_model(callback: Any) -> bool:
    names = mro_names(callback)
    watches = "EarlyStopping" in names or ("ModelCheckpoint" in names and "CompressedCheckpoint" not in names)
    monitor = getattr(callback, "monitor", None)
    if monitor is None or monitor in ("step", "epoch", "P"):
        return False
    return watches and not monitor.startswith("P/")


def check_score_is_known(trainer: pl.Trainer, callback: Any, every_n_epochs: int) -> None:
    """Refuse a callback that would read the score P when it is not known, or is that of an earlier epoch.

    Args:
        trainer: The Trainer.
        callback: One of its callbacks; those that do not monitor P pass.
        every_n_epochs: Epochs between scores.

    Raises:
        MisconfigurationException: With what to pass to the callback or the Trainer.
    """
    monitor = getattr(callback, "monitor", None)
    if not _is_score(monitor):
        return
    every = trainer.check_val_every_n_epoch
    interval = trainer.val_check_interval
    if isinstance(interval, int) or interval != 1.0 or every is None:
        raise MisconfigurationException(
            f"{type(callback).__name__}(monitor={monitor!r}) needs one validation per epoch, and "
            f"val_check_interval={trainer.val_check_interval!r} asks for others: P is known at epoch ends only. "
            "Set val_check_interval=1.0."
        )
    every = math.lcm(every, every_n_epochs)
    names = mro_names(callback)
    _check_moment(callback, names)
    if every == 1:
        return
    if "ModelCheckpoint" in names:
        at_epoch_end = getattr(callback, "_save_on_train_epoch_end", None)
        if at_epoch_end is not True or callback._every_n_epochs % every:
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={monitor!r}): P is known every {every} epochs, so pass it "
                f"save_on_train_epoch_end=True and every_n_epochs={every} (or a multiple)."
            )
    elif "EarlyStopping" in names and (
        getattr(callback, "_check_on_train_epoch_end", None) is not True or callback.strict
    ):
        raise MisconfigurationException(
            f"EarlyStopping(monitor={monitor!r}): P is known every {every} epochs, so pass it "
            "check_on_train_epoch_end=True and strict=False (its patience counts every epoch)."
        )


def _check_moment(callback: Any, names: set[str]) -> None:
    """Refuse saves and checks at moments at which P is that of the epoch before."""
    name = f"{type(callback).__name__}(monitor={callback.monitor!r})"
    if "ModelCheckpoint" in names:
        if callback._every_n_train_steps >= 1 or callback._train_time_interval is not None:
            raise MisconfigurationException(
                f"{name}: P is known at epoch ends only; save by every_n_epochs, not by every_n_train_steps or "
                "train_time_interval."
            )
        if callback._save_on_train_epoch_end is False:
            raise MisconfigurationException(f"{name}: P is known at epoch ends; pass save_on_train_epoch_end=True.")
    elif "EarlyStopping" in names and callback._check_on_train_epoch_end is False:
        raise MisconfigurationException(f"{name}: P is known at epoch ends; pass check_on_train_epoch_end=True.")
