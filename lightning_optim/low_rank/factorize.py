"""Low rank in one call, without a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from lightning_optim.calls import batch_calls, batch_count, try_batch
from lightning_optim.checkpoint import plain_plan
from lightning_optim.functional.low_rank import LOW_RANK_CRITERIA, LowRankCriterion
from lightning_optim.functional.statistics import STATISTICS, Collector, needs_of
from lightning_optim.low_rank.change import NOT_SEEN, Decided, Factorization, LayerRank, decide, rank_listing
from lightning_optim.low_rank.selection import DEFAULT_ENERGY, RankGoal, reasons, select_layers
from lightning_optim.measure.size import SIZES
from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.progress import progress_bar as progress
from lightning_optim.tables import Listed, Listing
from lightning_optim.target import ForwardInputs, Pattern, Selection, Weight, find_target

__all__ = ["FactorizationReport", "check_criterion", "factorize"]


@dataclass(frozen=True)
class FactorizationReport(Listed):
    """What became of the layers of a model.

    Attributes:
        ranks: What each layer became that is two now, by its name.
        left_out: Layers that stayed one, and why.
        parameters: (before, after) of the module.
        plan: What of the architecture differs from the user's class, for :func:`lightning_optim.conform`.

    Examples:
        >>> from torch import nn
        >>> report = factorize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2)), rank=4, criterion="svd")
        >>> report.ranks["0"].rank
        4
    """

    ranks: dict[str, LayerRank]
    left_out: dict[str, str]
    parameters: tuple[int, int]
    plan: dict[str, Any]

    def listing(self) -> Listing:
        """Return the layers that became two, and why others did not."""
        before, after = self.parameters
        sentence = f"{len(self.ranks)} layers became two of low rank; parameters {before:,} -> {after:,}"
        return rank_listing(self.ranks, self.left_out, before=[sentence])


def factorize(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    energy: float | dict[Pattern, float] = DEFAULT_ENERGY,
    rank: int | float | dict[Pattern, int | float] | None = None,
    criterion: str | LowRankCriterion | dict[str, Any] = "second_moment",
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
    progress_bar: bool = True,
) -> FactorizationReport:
    """Make Linear layers and 1x1 convolutions of a model two of low rank, in place, once, without training.

    The words are those of :class:`~lightning_optim.LowRankFactorization`. Layers where two factors would not be smaller
    stay as they are, and the report names them.

    Args:
        model: A LightningModule or any module; its mode is kept.
        dataloader: Batches for its forward: a tensor, a dict of keyword arguments, or a tuple, of which forward gets as
            many leading items as it requires. The criteria "svd" and "random" need none.
        energy: Fraction of the energy that each layer keeps, in (0, 1]; or by layer ``{pattern: energy}``.
        rank: Instead of ``energy``: the rank (int), a fraction of the full rank (float), or by layer
            ``{pattern: rank}``.
        criterion: Name in ``functional.low_rank.LOW_RANK_CRITERIA`` or a callable ``(weight, stats) -> Directions``.
        module: Dotted name of the part to factorize; default the whole model.
        include: Exactly the layers to factorize, instead of the default: all but the last Linear/Conv.
        exclude: Layers that stay whole.
        inputs: Returns the arguments of forward for a batch, if the rule above does not fit.
        batches: Number of batches to use; default all.
        progress_bar: Whether a progress bar is shown.

    Returns:
        Ranks, the layers left out with their reasons, and the plan.

    Raises:
        ValueError: If nothing is selected, the criterion needs inputs and there are none, forward fails with the
            arguments taken from a batch, or an argument is out of range. The model is then unchanged.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> report = factorize(net, [torch.randn(64, 32)], rank=8, progress_bar=False)
        >>> report.ranks["0"].rank, report.parameters
        (8, (1188, 676))
        >>> net[0].reduce, net[0].expand
        (Linear(in_features=32, out_features=8, bias=False), Linear(in_features=8, out_features=32, bias=True))
    """
    goal = RankGoal.of(energy, rank)
    rule = check_criterion(criterion)
    needs = [name for name in needs_of(rule) if name in STATISTICS]
    prefix, target = find_target(model, module)
    selection = select_layers(target, prefix, goal=goal, needs=needs, include=include, exclude=exclude, root=model)
    if not selection.chosen:
        raise ValueError(f"factorize can change nothing: {reasons(selection)}.")
    collectors = {name: STATISTICS[name]() for name in needs}
    if collectors:
        if dataloader is None:
            raise ValueError(
                f"the criterion needs {', '.join(each.title for each in collectors.values())}: pass a dataloader, or "
                "criterion='svd', which looks at the weights alone."
            )
        calls = batch_calls(model, dataloader, inputs, batches)
        _collect(model, calls, inputs, collectors, selection, batch_count(dataloader, batches), progress_bar)
    before = int(SIZES["parameters"](target))
    decided: dict[str, Decided] = {}
    with progress("factorizing", len(selection.chosen), shown=progress_bar) as advance:
        for name, weight in selection.chosen.items():
            decided[name] = Decided(None, None, NOT_SEEN)
            if all(name in collector for collector in collectors.values()):
                collected = {key: collector.value(name, _as_it_is) for key, collector in collectors.items()}
                decided[name] = decide(name, weight, goal, prefix, rule, collected)
            advance()
    Factorization.of(decided)(model)
    ranks = {name: each.becomes for name, each in decided.items() if each.becomes is not None}
    stay = {name: each.stays for name, each in decided.items() if each.becomes is None}
    after = int(SIZES["parameters"](target))
    return FactorizationReport(ranks, {**stay, **selection.left_out}, (before, after), plain_plan(model))


def check_criterion(criterion: Any) -> LowRankCriterion:
    """Return the criterion of a name, ``{name: arguments}``, or a callable as it is."""
    found = LOW_RANK_CRITERIA.resolve(criterion)
    needs_of(found)
    return found


def _as_it_is(sums: Tensor) -> Tensor:
    return sums


def _collect(
    model: nn.Module,
    calls: Iterator[ForwardInputs],
    inputs: Callable[[Any], Any] | None,
    collectors: Mapping[str, Collector],
    selection: Selection,
    total: int | None,
    progress_bar: bool,
) -> None:
    """Call the model with the batches, and let the collectors read the layers' inputs."""
    first = next(calls, None)
    if first is None:
        raise ValueError("the dataloader has no batch to take inputs from.")
    with evaluating(model), without_fast_path():
        try_batch(model, first, inputs)
        with _collecting(collectors, selection.chosen):
            for received in track(chain([first], calls), "reading inputs", total, disable=not progress_bar):
                received.call(model)


@contextmanager
def _collecting(collectors: Mapping[str, Collector], weights: Mapping[str, Weight]) -> Iterator[None]:
    """Collect the statistics of calls in eval mode, which the collectors' own hooks leave out."""
    handles = []
    for collector in collectors.values():
        for name, weight in weights.items():

            def add(layer: nn.Module, args: tuple[Any, ...], *, collector: Any = collector, name: str = name) -> None:
                collector.add(name, collector.measure(layer, args[0].detach().float()))

            handles.append(weight.layer.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
