"""Stops hopeless trials by the median rule of the study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import optuna
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_optim.callbacks.base import compressions
from lightning_optim.measure.size import SIZES
from lightning_optim.target import find_target

__all__ = ["SIZE_NAMES", "MedianRule", "Rule"]

SIZE_NAMES = ("parameters", "nonzero", "bits")
"""What must be no larger for a model to be compared with a trial that is smaller than it."""

PEERS = 3
"""Fewer have no median worth the name."""


@dataclass(frozen=True)
class Rule:
    """The median rule of a study.

    Optuna's pruners take studies of one objective, and by accuracy alone the median rule would stop what is small. A
    trial is therefore compared only with finished trials that are no larger, by the accuracies after the compression
    has ended. The rule itself is Optuna's ``MedianPruner``.

    Attributes:
        study: The study.
        n_startup: No trial stops before so many are complete.
        mode: Whether the watched value is to be large or small.
        by_size: Whether anything but accuracy counts.
    """

    study: optuna.Study
    n_startup: int
    mode: Literal["min", "max"] = "max"
    by_size: bool = True

    def is_hopeless(self, curve: Mapping[int, float], sizes: Mapping[str, float]) -> bool:
        """Whether a running trial is to stop.

        Args:
            curve: Epoch -> watched value, of the epochs since the compression has ended.
            sizes: Of its model, by the names in ``SIZE_NAMES``.
        """
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        peers = [trial for trial in done if trial.user_attrs.get("curve") and self._is_peer(trial, sizes)]
        if len(done) < self.n_startup or len(peers) < PEERS:
            return False
        alone = optuna.create_study(direction="maximize" if self.mode == "max" else "minimize")
        alone.add_trials([_with_curve(_as_curve(trial.user_attrs["curve"]), TrialState.COMPLETE) for trial in peers])
        rule = optuna.pruners.MedianPruner(n_startup_trials=0, n_min_trials=PEERS)
        return rule.prune(alone, _with_curve(curve, TrialState.RUNNING))

    def _is_peer(self, trial: FrozenTrial, sizes: Mapping[str, float]) -> bool:
        row = trial.user_attrs.get("row", {})
        return not self.by_size or all(row.get(name, float("inf")) <= sizes[name] for name in SIZE_NAMES)


def _as_curve(stored: Mapping[str, float]) -> dict[int, float]:
    return {int(epoch): value for epoch, value in stored.items()}  # JSON has no whole numbers as keys


def _with_curve(curve: Mapping[int, float], state: TrialState) -> FrozenTrial:
    value = list(curve.values())[-1] if state == TrialState.COMPLETE else None
    return create_trial(state=state, value=value, intermediate_values=dict(curve))


@dataclass
class MedianRule(pl.Callback):
    """Watches a trial after each validation, and ends its training where the rule says that it is hopeless.

    Args:
        hopeless: Tells from curve and sizes; None on ranks that follow rank 0.
        score: Function of the LightningModule, for the watched value; None reads ``monitor``.
        monitor: Name of a metric that the module logs in validation.
    """

    hopeless: Callable[[Mapping[int, float], Mapping[str, float]], bool] | None
    score: Callable[[Any], float] | None = None
    monitor: str | None = None
    curve: dict[int, float] = field(default_factory=dict)
    stopped: bool = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the trial; in the last epoch there is nothing left to save."""
        if trainer.sanity_checking or not all(callback.reached_end for callback in compressions(trainer)):
            return
        hopeless = False
        if trainer.is_global_zero:
            self.curve[trainer.current_epoch] = self._value(trainer, pl_module)
            target = find_target(pl_module)[1]
            sizes = {name: SIZES[name](target) for name in SIZE_NAMES}
            is_last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
            hopeless = not is_last and self.hopeless is not None and self.hopeless(self.curve, sizes)
        if trainer.strategy.broadcast(hopeless):
            self.stopped = True
            trainer.should_stop = True

    def _value(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        if self.monitor is None:
            return float("nan") if self.score is None else self.score(pl_module)
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            names: Sequence[str] = sorted(logged)
            raise MisconfigurationException(
                f"`monitor` is {self.monitor!r}, and validation logged {', '.join(names) or 'nothing'}. Name a metric "
                "that validation_step logs."
            )
        return float(logged[self.monitor])
