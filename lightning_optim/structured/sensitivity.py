"""Sensitivity: what the model loses when channels of one group at a time, or one block, are removed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor, nn

from lightning_optim.calls import try_forward
from lightning_optim.checks import check_choice
from lightning_optim.depth.sensitivity import BlockSensitivityReport, block_sensitivity
from lightning_optim.functional.channels import ChannelCriterion
from lightning_optim.modules import copy_module
from lightning_optim.structured.allocation import Allocation
from lightning_optim.structured.events import ChannelReport, check_ratio, find_prunable, plan_event, statistics_of
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.selection import refuse_shared, select_roots
from lightning_optim.tables import Listed, Listing, Plotted, new_figure
from lightning_optim.target import ForwardInputs, Pattern, as_forward_calls, find_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SensitivityReport", "sensitivity"]


RATIOS = (0.1, 0.3, 0.5, 0.7)
"""Shares of channels that are tried."""
_ADVICE = (
    "a tensor, a tuple of arguments or a dict of keyword arguments is expected: of a loader's (images, labels), "
    "example_inputs=images."
)


@dataclass(frozen=True)
class SensitivityReport(Listed, Plotted):
    """The metric with a share of one group's channels removed, and nothing else; its plot is a heat map of the drops.

    Attributes:
        baseline: The metric of the model as it is.
        ratios: Shares that were tried, rising.
        scores: Group name (that of a layer whose outputs they are) -> the metric at each ratio.
        left_out: Groups that cannot be pruned, and why.
    """

    baseline: float
    ratios: tuple[float, ...]
    scores: dict[str, tuple[float, ...]]
    left_out: dict[str, str]

    def drops(self, name: str) -> tuple[float, ...]:
        """Return what a group's removal costs at each ratio: baseline minus score, negative where it gains."""
        return tuple(self.baseline - score for score in self.scores[name])

    def listing(self) -> Listing:
        """Return the drops, the most sensitive group first."""
        rows = [(name, *(f"{drop:.4f}" for drop in self.drops(name))) for name in self._by_drop()]
        columns = ("removed from", *(f"{ratio:.0%}" for ratio in self.ratios))
        return Listing(columns, rows, title=f"metric lost, of {self.baseline:.4f}")

    def table(self) -> str:
        """Return the drops as a text table."""
        return str(self)

    def _by_drop(self) -> list[str]:
        return sorted(self.scores, key=lambda name: -sum(self.drops(name)))

    def _figure(self) -> "Figure":
        names = self._by_drop()
        figure = new_figure(2.5 + 0.8 * len(self.ratios), 1.2 + 0.3 * len(names))
        axes = figure.subplots()
        image = axes.imshow([self.drops(name) for name in names], aspect="auto", cmap="viridis_r")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(self.ratios)), [f"{ratio:.0%}" for ratio in self.ratios])
        axes.set_xlabel("channels removed")
        figure.colorbar(image, label=f"metric lost, of {self.baseline:.4g}")
        return figure

    def targets(self, *, max_drop: float) -> dict[str, float]:
        """Return the largest ratio of each group up to which no ratio costs more than ``max_drop``.

        Each group was tried alone; together they cost more, and training wins some of it back.

        Args:
            max_drop: What may be lost, in the metric's units.

        Returns:
            Group name -> ratio, without the groups that cannot bear any: what ``ChannelPruning(pruning_ratio=...)``
            and :func:`prune_channels` take.

        Raises:
            ValueError: If no group can bear the smallest ratio.
        """
        found = {}
        for name in self.scores:
            bearable = [drop <= max_drop for drop in self.drops(name)]
            number = bearable.index(False) if False in bearable else len(bearable)
            if number:
                found[name] = self.ratios[number - 1]
        if not found:
            least = min(self.drops(name)[0] for name in self.scores)
            raise ValueError(
                f"no group loses at most max_drop={max_drop} at the ratio {self.ratios[0]}; the least is {least:.4g}. "
                "Allow more, or try smaller ratios."
            )
        return found


@overload
def sensitivity(
    model: nn.Module,
    /,
    evaluate: Callable[[nn.Module], float],
    example_inputs: Any,
    *,
    what: Literal["channels"] = "channels",
    ratios: Sequence[float] = ...,
    criterion: str | ChannelCriterion = ...,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> SensitivityReport: ...


@overload
def sensitivity(
    model: nn.Module,
    /,
    evaluate: Callable[[nn.Module], float],
    example_inputs: Any,
    *,
    what: Literal["blocks"],
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> BlockSensitivityReport: ...


def sensitivity(
    model: nn.Module,
    /,
    evaluate: Callable[[nn.Module], float],
    example_inputs: Any,
    *,
    what: Literal["channels", "blocks"] = "channels",
    ratios: Sequence[float] = RATIOS,
    criterion: str | ChannelCriterion = "magnitude",
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> SensitivityReport | BlockSensitivityReport:
    """Measure what each group of coupled layers costs when a share of its channels is removed, or each block.

    Calls ``evaluate`` once for the model as it is, and once for every group and ratio, or for every block, each time on
    a copy in eval mode and without gradients, all others left whole; the model itself is not touched. Costs one more
    copy of the model at a time (none for blocks: their copy shares the weights).

    Args:
        model: Any module.
        evaluate: Takes a copy of ``model`` and returns the metric, higher is better.
        example_inputs: What the forward of the pruned module receives: a tensor, a tuple, or a dict of keywords; a list
            of these where one call does not reach all layers.
        what: ``"channels"``, or ``"blocks"``: the metric without each block that ``DepthPruning`` could remove.
        ratios: Shares of channels to remove, in (0, 1).
        criterion: Name in ``functional.channels.CHANNEL_CRITERIA`` or a callable. ``"taylor"`` reads the gradients
            that the parameters hold.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly the layers whose outputs may leave, instead of all but embeddings and the last Linear/Conv;
            the stacks or blocks that may leave.
        exclude: Layers whose outputs stay; stacks or blocks that stay.
        progress: Show a progress bar (on rank zero).

    Returns:
        The metric of every group at every ratio, or without every block.

    Raises:
        ValueError: If forward fails with ``example_inputs``, nothing can be removed, a ratio is out of range, or the
            metric is not finite.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> rows = torch.randn(32, 8)
        >>> loss = lambda model: -float(model(rows).square().mean())
        >>> report = sensitivity(net, loss, rows, ratios=(0.25, 0.5), progress=False)
        >>> ratios = report.targets(max_drop=0.5)  # {layer: ratio}, which ChannelPruning takes
    """
    check_choice("what", what, ("channels", "blocks"))
    if what == "blocks":
        if tuple(ratios) != RATIOS or criterion != "magnitude":
            raise ValueError("`ratios` and `criterion` are those of channels; a block is removed as a whole.")
        return block_sensitivity(
            model,
            lambda copied: _metric(evaluate, copied),
            example_inputs,
            module=module,
            include=include,
            exclude=exclude,
            progress=progress,
        )
    if not ratios:
        raise ValueError("`ratios` must have at least one fraction in (0, 1), got none.")
    rising = tuple(sorted(float(check_ratio(ratio)) for ratio in ratios))  # type: ignore[arg-type]
    allocation = Allocation.of(criterion, scope="layer", reduction="mean", round_to=None)
    prefix, target = find_target(model, module)
    refuse_shared(model, target, prefix)
    inputs = as_forward_calls(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        duplicate = copy_module(target)
        for call in (inputs, *inputs.further):
            try_forward(duplicate, call, argument="`example_inputs`", advice=_ADVICE)
    found = find_prunable(target, inputs, *select_roots(target, prefix, include, exclude))
    if not found.groups:
        raise ValueError(f"sensitivity can remove nothing: {found.reasons()}.")
    statistics = statistics_of(target, inputs, found.groups, allocation)
    baseline = _metric(evaluate, copy_module(model))
    steps = [(name, ratio) for name in found.groups for ratio in rising]
    hidden = not progress or getattr(rank_zero_only, "rank", 0) != 0
    scores: dict[str, list[float]] = {}
    for name, ratio in track(steps, "sensitivity", disable=hidden):
        smaller = _smaller(model, prefix, inputs, found, name, ratio, allocation, statistics)
        scores.setdefault(prefix + name, []).append(_metric(evaluate, smaller))
    left_out = {prefix + name: reason for name, reason in found.left_out.items()}
    return SensitivityReport(baseline, rising, {name: tuple(each) for name, each in scores.items()}, left_out)


def _smaller(
    model: nn.Module,
    prefix: str,
    inputs: ForwardInputs,
    found: ChannelReport,
    name: str,
    ratio: float,
    allocation: Allocation,
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    """Return a copy of the model without that share of one group."""
    smaller = copy_module(model)
    target = smaller.get_submodule(prefix.rstrip("."))
    group = {name: found.groups[name]}
    event = plan_event(target, inputs, group, {name: group[name].channels}, ratio, allocation, statistics, prefix)
    apply_removal(target, event.removal)
    return smaller


def _metric(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        value = float(evaluate(model))
    if not math.isfinite(value):
        raise ValueError(f"`evaluate` must return a finite metric, got {value}.")
    return value
