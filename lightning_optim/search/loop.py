"""The loop over the trials of a search: proposes, trains, measures, records, and follows on other ranks."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import lightning.pytorch as pl
import optuna
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.progress import progress_bar
from lightning_optim.provenance import as_plain
from lightning_optim.recipe import Recipe
from lightning_optim.report.columns import Row
from lightning_optim.report.document import environment
from lightning_optim.search.objectives import Limit, Objective
from lightning_optim.search.ranks import Ranks
from lightning_optim.search.report import SearchReport
from lightning_optim.search.space import Space
from lightning_optim.search.stopping import MedianRule, Rule
from lightning_optim.search.study import DENSE, Study, counts, open_study, quietly, whose
from lightning_optim.search.training import Setting

__all__ = ["Loop"]

CAUGHT = (*FAILURES, MisconfigurationException, MemoryError, OSError)
"""What a trial may raise without ending the search."""


class _Surplus(Exception):
    """Another process began the last trial at the same time: this one is not needed."""


class _DenseFailed(Exception):
    """The dense model cannot be trained or measured, so nothing can be compared with it."""


@dataclass
class Loop:
    """A search with checked arguments; see :func:`~lightning_optim.search.run.search` for their meaning."""

    setting: Setting
    space: Space
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    noise: Mapping[str, float]
    trials: int
    name: str
    n_startup: int
    progress: bool
    monitor: str | None
    monitor_mode: Literal["max", "min"]
    stop_early: bool
    _ranks: Ranks = field(init=False)
    _study: Study = field(init=False)

    def run(self, storage: Any) -> SearchReport:
        """Run until the study has all trials; other ranks follow rank 0, and return its report."""
        self._ranks = Ranks()
        if not self._ranks.leads:
            return self._follow()
        self._study = open_study(storage, self.name, self.objectives, self._about(), self.setting.seed, self.n_startup)
        report: SearchReport | None = None
        try:
            self._lead()
            report = SearchReport.of(self._study, self._about())
        finally:
            self._ranks.send({"report": None if report is None else report.as_plain()})
        return report

    def _about(self) -> dict[str, Any]:
        """Return what the study searches, as plain types: a process that joins must agree."""
        return {
            "space": as_plain(self.space.as_plain()),
            "objectives": {objective.name: as_plain(vars(objective)) for objective in self.objectives},
            "budget": [str(limit) for limit in self.limits],
            "limits": [
                {"objective": as_plain(vars(limit.objective)), "bound": limit.bound, "at_least": limit.at_least}
                for limit in self.limits
            ],
            "noise": dict(self.noise),
            "seed": self.setting.seed,
            "comparison": as_plain(dict(self.setting.options)),
            "environment": environment(),
        }

    def _lead(self) -> None:
        shown = 0
        with progress_bar("searching", self.trials, shown=self.progress) as advance, quietly():
            while (done := len(self._counted())) < self.trials:
                for _ in range(shown, done):  # other processes may have added some
                    advance()
                shown = max(shown, done)
                try:
                    self._study.optimize(self._trial, n_trials=1, catch=(*CAUGHT, _Surplus))
                except _DenseFailed as error:
                    raise RuntimeError(str(error)) from error.__cause__

    def _counted(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if counts(trial)]

    # One trial, on rank 0.

    def _trial(self, trial: optuna.Trial) -> list[float]:
        trial.set_user_attr("owner", whose())
        before = [other for other in self._counted() if other.number < trial.number]
        if len(before) >= self.trials:
            raise _Surplus
        is_dense = trial.number == 0 or not any(_is_dense(other) for other in before)
        trial.set_user_attr(DENSE, is_dense)
        point = {} if is_dense else self.space.suggest(trial)
        began = monotonic()
        try:
            return self._values(trial, point, is_dense)
        except CAUGHT as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {first_line(error)}")
            if is_dense:
                raise _DenseFailed(f"the dense model failed, and trials are measured beside it: {error}") from error
            rank_zero_warn(f"trial {trial.number} failed and the search goes on: {first_line(error)}")
            raise
        finally:
            trial.set_user_attr("seconds", monotonic() - began)

    def _values(self, trial: optuna.Trial, point: Mapping[str, Any], is_dense: bool) -> list[float]:
        self._ranks.send({"number": trial.number, "dense": is_dense, "point": dict(point)})
        recipe = Recipe() if is_dense else self.space.recipe(point)
        trial.set_user_attr("recipe", recipe.as_plain())
        rule = Rule(self._study, self.n_startup, self._mode(), self._by_size())
        watching = self._watching(None if is_dense else rule.is_hopeless)
        with _without_chatter():
            module, trainer = self.setting.train(recipe, trial.number, watching, self._ranks.join)
        for watch in watching:
            trial.set_user_attr("curve", {str(epoch): value for epoch, value in watch.curve.items()})
        if any(watch.stopped for watch in watching):
            _say(trial.number, "stopped early: below the median of the trials that are no larger")
            raise optuna.TrialPruned
        measured = self.setting.measure(self.setting.result(module, trainer, recipe), dense=is_dense)
        values = [objective.value(measured.row, measured.notes) for objective in self.objectives]
        for limit in self.limits:
            excess = limit.excess(limit.objective.value(measured.row, measured.notes))
            trial.set_constraint(str(limit), excess)
        trial.set_user_attr("row", as_plain(measured.row))
        trial.set_user_attr("notes", measured.notes)
        named = {objective.name: value for objective, value in zip(self.objectives, values, strict=True)}
        _log(trainer, trial.number, point, {**named, **self._bounded(measured.row)})
        _say(trial.number, ", ".join(f"{name} {value:.6g}" for name, value in named.items()))
        return values

    def _bounded(self, row: Row) -> dict[str, float]:
        return {limit.objective.name: limit.objective.value(row) for limit in self.limits}

    def _mode(self) -> Literal["min", "max"]:
        return self.monitor_mode if self.monitor is not None else "max"

    def _by_size(self) -> bool:
        """Whether anything but metrics counts."""
        return any(each.needs != "metric" for each in (*self.objectives, *(limit.objective for limit in self.limits)))

    def _watching(self, hopeless: Any) -> list[MedianRule]:
        if not self.stop_early:
            return []
        score = self.setting.accuracy_of if self.monitor is None else None
        return [MedianRule(hopeless, score, self.monitor)]

    # Other ranks.

    def _follow(self) -> SearchReport:
        """Train what rank 0 proposes, until it sends the report."""
        for message in self._ranks.received():
            if "report" in message:
                if message["report"] is None:
                    raise RuntimeError("the search ended on rank 0; its error says why.")
                return SearchReport.from_plain(message["report"])
            try:
                recipe = Recipe() if message["dense"] else self.space.recipe(message["point"])
                with _without_chatter():
                    self.setting.train(recipe, message["number"], self._watching(None))
            except CAUGHT as error:
                if message["dense"]:
                    raise
                rank_zero_info(f"a trial failed on this rank too: {first_line(error)}")
        raise RuntimeError("rank 0 sent no report.")


def _is_dense(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial measures the dense model, or is about to: the first one does. One that failed is made up for."""
    is_dense = trial.number == 0 or bool(trial.user_attrs.get(DENSE))
    return is_dense and trial.state != optuna.trial.TrialState.FAIL


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Leave out what callbacks and Trainer tell of each run: a search has dozens. Warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


def _say(number: int, what: str) -> None:
    rank_zero_info(f"trial {number}: {what}")


def _log(trainer: pl.Trainer, number: int, point: Mapping[str, Any], values: Mapping[str, float]) -> None:
    """Give the trial's arguments and results to the loggers of its Trainer."""
    metrics = {"search/trial": float(number), **{f"search/{name}": value for name, value in values.items()}}
    for logger in trainer.loggers:
        logger.log_hyperparams({f"search/{name}": value for name, value in point.items()})
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
