"""Callbacks that watch a metric, and what they need while a model is compressed."""

from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks.windowed import mro_names

__all__ = ["check_score_is_logged", "warn_of_plain_monitors"]


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
        if isinstance(monitor, str) and (monitor == "P" or monitor.startswith("P/")):
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={monitor!r}) needs PerformanceScore to log it, and the Trainer "
                "has none. Add lightning_optim.PerformanceScore() (`score` in a recipe), or monitor a "
                "metric that the module logs."
            )


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
