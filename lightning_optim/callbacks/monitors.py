"""What monitors of the score P need."""

from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["check_score_is_logged"]


def check_score_is_logged(callbacks: Iterable[Any]) -> None:
    """Refuse a callback that monitors the score P where no PerformanceScore logs it.

    Raises:
        MisconfigurationException: With the callback and what to add.
    """
    callbacks = list(callbacks)
    if any("PerformanceScore" in _names(callback) for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and (monitor == "P" or monitor.startswith("P/")):
            raise MisconfigurationException(
                f"{type(callback).__name__}(monitor={monitor!r}) needs PerformanceScore to log it, and the Trainer "
                "has none. Add lightning_optim.PerformanceScore() (`score` in a recipe), or monitor a "
                "metric that the module logs."
            )


def _names(callback: Any) -> set[str]:
    return {cls.__name__ for cls in type(callback).__mro__}
