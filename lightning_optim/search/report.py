"""The result of a search: its trials, the front, and their presentations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_optim.recipe import Recipe
from lightning_optim.report.columns import Column, Row, formatted
from lightning_optim.report.document import Card, Documented, Report, Section, as_json
from lightning_optim.search.objectives import Limit, Objective, read_limit
from lightning_optim.tables import Plotted

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

__all__ = ["SearchReport", "Trial"]

COMPLETE = "complete"


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: In the study; 0 is the dense model.
        state: In Optuna's words: "complete", "pruned" (stopped early), "fail", "running" or "waiting".
        values: By name of objective, and of what the budget bounds; empty unless complete.
        intervals: The range of each value: two whose ranges overlap are equal.
        arguments: The open arguments, by name.
        settings: The recipe as plain types, windows filled in; empty for the dense model, and where the recipe rejected
            the arguments.
        row: Its row of the comparison with the dense model.
        error: The sentence of a trial that failed.
        seconds: It took.
        dense: Whether it is the dense model.
        excess: Bound of the budget -> by how much it is broken; 0 or below where it is kept.

    Examples:
        >>> settings = {"channel_pruning": {"pruning_ratio": 0.5}}
        >>> trial = Trial(3, "complete", {"accuracy": 0.98, "bits": 0.25}, settings=settings)
        >>> trial.label, trial.feasible, trial.recipe.channel_pruning["pruning_ratio"]
        ('trial 3', True, 0.5)
    """

    number: int
    state: str
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    row: Row = field(default_factory=dict)
    error: str = ""
    seconds: float | None = None
    dense: bool = False
    excess: dict[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """Its recipe; that of the dense model is empty."""
        return Recipe.load(self.settings)

    @property
    def feasible(self) -> bool:
        """Whether it is complete and keeps the budget."""
        return self.state == COMPLETE and all(excess <= 0 for excess in self.excess.values())

    @property
    def label(self) -> str:
        """How figures and tables call it."""
        return "dense" if self.dense else f"trial {self.number}"


@dataclass
class SearchReport(Documented, Plotted):
    """The result of :func:`~lightning_optim.search`; ``print(report)`` shows the front.

    Its plot is the front: the first objective against the second, or over the trials where there is one only.

    Attributes:
        objectives: What was optimized.
        trials: All trials of the study, by number.
        limits: The budget.
        importances: Objective -> open argument -> its importance, as Optuna computes it; the sum over arguments is 1.
        environment: Versions and machine.

    Examples:
        >>> report = search(...)  # doctest: +SKIP
        >>> for trial in report.front:  # doctest: +SKIP
        ...     print(trial.label, trial.values)
        >>> report.best(accuracy=">=0.98").recipe.callbacks()  # doctest: +SKIP
    """

    objectives: tuple[Objective, ...]
    trials: list[Trial]
    limits: tuple[Limit, ...] = ()
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    environment: str = ""

    @classmethod
    def of(cls, study: "optuna.Study", about: Mapping[str, Any]) -> "SearchReport":
        """Read the trials of a study.

        Args:
            study: Made by ``search``.
            about: What it searches.
        """
        from lightning_optim.search.study import counts
        from lightning_optim.search.weighing import importances

        objectives = tuple(Objective(**fields) for fields in about["objectives"].values())
        limits = tuple(_limit(fields) for fields in about["limits"])
        found = [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]
        measured = {each.name: each for each in (*objectives, *(limit.objective for limit in limits))}
        return cls(
            objectives=objectives,
            trials=[_read(trial, list(measured.values()), limits, about["noise"]) for trial in found],
            limits=limits,
            importances=importances(study, objectives, found),
            environment=about["environment"],
        )

    # What was found.

    @property
    def front(self) -> list[Trial]:
        """The trials that keep the budget and that no other one beats, best first objective first.

        A trial is beaten where another one is no worse in every objective, and better beyond the noise in one. So of
        trials within the noise of each other all are on the front: see :meth:`equals`.
        """
        kept = [trial for trial in self.trials if trial.feasible]
        front = [trial for trial in kept if not any(self._beats(other, trial) for other in kept)]
        first = self.objectives[0]
        sign = 1 if first.mode == "min" else -1
        return sorted(front, key=lambda trial: (sign * trial.values[first.name], trial.number))

    def equals(self, trial: Trial) -> list[Trial]:
        """Return the other trials of the front that are within the noise of a trial in every objective."""
        return [
            other
            for other in self.front
            if other.number != trial.number and all(_overlap(other, trial, each) for each in self.objectives)
        ]

    def _beats(self, one: Trial, other: Trial) -> bool:
        no_worse = not any(each.better(other.values[each.name], one.values[each.name]) for each in self.objectives)
        better = [each for each in self.objectives if each.better(one.values[each.name], other.values[each.name])]
        return no_worse and any(not _overlap(one, other, each) for each in better)

    def best(self, **bounds: Any) -> Trial:
        """Return the best trial within bounds: ``report.best(accuracy=">=0.98")`` is the smallest that is so accurate.

        Args:
            bounds: By objective (or what the budget bounds): ``">=0.98"``, or a number that is an upper bound of what
                should be small, a lower one of what should be large. All objectives but one need a bound, or all; then
                the first one decides.

        Raises:
            ValueError: If a name is unknown, more than one objective is left open, or no trial is within the bounds;
                the message names the nearest.
        """
        known = {each.name: each for each in self._measured()}
        unknown = [name for name in bounds if name not in known]
        if unknown:
            raise ValueError(f"`best` has no {unknown[0]!r}; measured: {', '.join(known)}.")
        left = [objective for objective in self.objectives if objective.name not in bounds]
        if len(left) > 1:
            names = " and ".join(objective.name for objective in left)
            raise ValueError(
                f"{names} are both open, and no trial is the best in both. Bound all but one: "
                f"best({left[0].name}='{'>=' if left[0].mode == 'max' else '<='}...')."
            )
        limits = [read_limit("best", known[name], bound) for name, bound in bounds.items()]
        decides = left[0] if left else self.objectives[0]
        done = [trial for trial in self.trials if trial.feasible]
        within = [
            trial for trial in done if all(limit.excess(trial.values[limit.objective.name]) <= 0 for limit in limits)
        ]
        if not within:
            raise ValueError(self._nothing(limits, done))
        sign = 1 if decides.mode == "min" else -1
        return min(within, key=lambda trial: (sign * trial.values[decides.name], trial.number))

    def _nothing(self, limits: Sequence[Limit], done: Sequence[Trial]) -> str:
        words = " and ".join(map(str, limits)) or "the budget"
        if not done:
            budget = " and ".join(map(str, self.limits))
            return "no trial is complete" + (f" and keeps the budget {budget}." if budget else ".")
        nearest = min(done, key=lambda t: max(limit.excess(t.values[limit.objective.name]) for limit in limits))
        values = ", ".join(f"{limit.objective.name} {nearest.values[limit.objective.name]:g}" for limit in limits)
        return f"no trial has {words}; the nearest is {nearest.label} with {values}. Lower the bound, or search on."

    def _measured(self) -> list[Objective]:
        return list(
            {each.name: each for each in (*self.objectives, *(limit.objective for limit in self.limits))}.values()
        )

    def chosen(self) -> Trial | None:
        """Return the trial whose recipe the page shows.

        With one objective it is the best one. With several it is the one on the front that is nearest to the best
        value of each objective, as fractions of the ranges on the front.
        """
        front = [trial for trial in self.front if not trial.dense] or self.front
        if not front or len(self.objectives) == 1:
            return front[0] if front else None
        everyone = self.front

        def distance(trial: Trial) -> float:
            total = 0.0
            for each in self.objectives:
                values = [other.values[each.name] for other in everyone]
                span = max(values) - min(values)
                best = min(values) if each.mode == "min" else max(values)
                total += 0.0 if span == 0 else ((trial.values[each.name] - best) / span) ** 2
            return total

        return min(front, key=lambda trial: (distance(trial), trial.number))

    # What it is read in.

    def columns(self) -> list[Column]:
        """Return the columns of the table: state, objectives with their ranges, arguments."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.arguments))
        return [
            Column("name", "trial"),
            Column("state", "state"),
            *(Column(each.name, each.title, _interval_form(each)) for each in self._measured()),
            Column("equal", "equal within the noise"),
            *(Column(f"argument/{name}", name) for name in names),
        ]

    def rows(self, trials: Sequence[Trial]) -> list[Row]:
        """Return the rows of the table for some trials."""
        return [self._row(trial) for trial in trials]

    def _row(self, trial: Trial) -> Row:
        intervals = {f"{name}/range": interval for name, interval in trial.intervals.items()}
        equal = ", ".join(other.label for other in self.equals(trial)) if trial in self.front else ""
        arguments = {f"argument/{name}": _shown(value) for name, value in trial.arguments.items()}
        broken = trial.state == COMPLETE and not trial.feasible
        state = "over budget" if broken else trial.state
        kind = {"kind": "dense" if trial.dense else "compressed"}
        return {
            "name": trial.label,
            **kind,
            "state": state,
            **trial.values,
            **intervals,
            "equal": equal or None,
        } | arguments

    def reading(self) -> list[str]:
        """Return the sentences that say how the numbers are to be read."""
        sentences = [
            "A trial leaves the front where another one is no worse in every objective and better beyond the noise in "
            "one. In brackets the range of a value: of a time over the rounds of its measurement, of a metric the "
            "noise that was given. Trials whose ranges overlap in every objective are equal.",
        ]
        if self.limits:
            sentences.append(f"Budget: {' and '.join(map(str, self.limits))}.")
        ties = sum(bool(self.equals(trial)) for trial in self.front)
        if ties:
            sentences.append(f"{ties} of {len(self.front)} trials on the front equal another one within the noise.")
        counted = {state: sum(trial.state == state for trial in self.trials) for state in ("pruned", "fail", "running")}
        words = {"pruned": "stopped early", "fail": "failed", "running": "still run"}
        others = [f"{count} {words[state]}" for state, count in counted.items() if count]
        sentences.append(f"{len(self.trials)} trials" + (f", of which {', '.join(others)}." if others else "."))
        sentences += [f"{trial.label} failed: {trial.error}" for trial in self.trials if trial.error]
        return sentences

    def as_document(self, *, figures: bool = False) -> Report:
        """Return the report as title, table of the front, notes, figures and the table of all trials.

        Args:
            figures: Whether figures are drawn, which needs matplotlib (the extra ``report``).
        """
        names = " and ".join(objective.name for objective in self.objectives)
        columns = self.columns()
        front = self.rows(self.front)
        summary = f"{len(self.trials)} trials; {len(front)} on the front of {names}."
        document = Report("Search", summary, _filled(columns, front), front, self.reading(), footer=self.environment)
        document.cards = self._cards()
        if figures:
            from lightning_optim.search.figures import search_figures

            document.figures = search_figures(self)
        every = self.rows(self.trials)
        document.sections = [*self._recipes(), Section("All trials", columns=_filled(columns, every), rows=every)]
        return document

    def _cards(self) -> list[Card]:
        chosen = self.chosen()
        if chosen is None:
            return []
        return [Card(chosen.label, [(f"{value:.4g}", name) for name, value in chosen.values.items()])]

    def _recipes(self) -> list[Section]:
        chosen = self.chosen()
        if chosen is None or chosen.dense:
            return []
        text = (
            "On the front, nearest to the best value of every objective. `report.best(...)` chooses another."
            if len(self.objectives) > 1
            else "The best trial."
        )
        return [Section(f"The recipe of {chosen.label}", text, code=chosen.recipe.to_yaml())]

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``report.md`` with its figures, ``report.json`` and ``best.yaml`` to a folder.

        Returns:
            The path of the page.
        """
        chosen = self.chosen()
        best = {} if chosen is None or chosen.dense else {"best.yaml": chosen.recipe.to_yaml()}
        return self.as_document(figures=True).write(folder, {"report.json": as_json(self.as_plain()), **best})

    def _figure(self) -> "Figure":
        from lightning_optim.search.figures import front_figure

        return front_figure(self)

    def as_plain(self) -> dict[str, Any]:
        """Return everything as plain types; :meth:`from_plain` reads it."""
        return {
            "objectives": [asdict(objective) for objective in self.objectives],
            "limits": [asdict(limit) for limit in self.limits],
            "trials": [asdict(trial) for trial in self.trials],
            "importances": self.importances,
            "environment": self.environment,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SearchReport":
        """Read what :meth:`as_plain` returned, also after JSON."""
        trials = [
            Trial(**{**fields, "intervals": {name: tuple(ends) for name, ends in fields["intervals"].items()}})
            for fields in plain["trials"]
        ]
        return cls(
            objectives=tuple(Objective(**fields) for fields in plain["objectives"]),
            trials=trials,
            limits=tuple(map(_limit, plain["limits"])),
            importances={name: dict(shares) for name, shares in plain["importances"].items()},
            environment=plain["environment"],
        )


def _limit(fields: Mapping[str, Any]) -> Limit:
    return Limit(Objective(**fields["objective"]), fields["bound"], fields["at_least"])


def _read(
    trial: "optuna.trial.FrozenTrial",
    measured: Sequence[Objective],
    limits: Sequence[Limit],
    noise: Mapping[str, float],
) -> Trial:
    facts = trial.user_attrs
    row = facts.get("row", {})
    is_complete = trial.state.name.lower() == COMPLETE
    values = {each.name: each.value(row) for each in measured} if is_complete else {}
    return Trial(
        number=trial.number,
        state=trial.state.name.lower(),
        values=values,
        intervals={each.name: each.interval(row, noise) for each in measured} if is_complete else {},
        arguments=dict(trial.params),
        settings=facts.get("recipe", {}),
        row=row,
        error=facts.get("error", ""),
        seconds=facts.get("seconds"),
        dense=bool(facts.get("dense", trial.number == 0)),
        excess={str(limit): limit.excess(values[limit.objective.name]) for limit in limits} if is_complete else {},
    )


def _overlap(one: Trial, other: Trial, objective: Objective) -> bool:
    (low, high), (other_low, other_high) = one.intervals[objective.name], other.intervals[objective.name]
    return low <= other_high and other_low <= high


def _interval_form(objective: Objective) -> Any:
    def form(row: Row) -> str:
        low, high = row.get(f"{objective.name}/range", (None, None))
        whole = float(row[objective.name]).is_integer() and abs(row[objective.name]) >= 100
        shown = "{:,.0f}" if whole else "{:#.4g}"
        span = "" if low is None or low == high else f" [{formatted(low, shown)}, {formatted(high, shown)}]"
        return formatted(row[objective.name], shown) + span

    return form


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [columns[0], *(column for column in columns[1:] if any(row.get(column.key) is not None for row in rows))]
