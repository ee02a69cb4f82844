"""Channel pruning in one call, without a Trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_optim.checkpoint import plain_plan
from lightning_optim.checks import check_flags
from lightning_optim.functional.channels import ChannelCriterion
from lightning_optim.measure.size import SIZES
from lightning_optim.structured.allocation import Allocation, one_pool, shortfall
from lightning_optim.structured.events import (
    ChannelReport,
    check_ratio,
    event_damage,
    find_prunable,
    plan_event,
    statistics_of,
)
from lightning_optim.structured.groups import Removal
from lightning_optim.structured.removal import ChannelRemoval
from lightning_optim.structured.selection import refuse_shared, select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.tables import Listed, Listing, Plotted, by_reason, by_stack, new_figure
from lightning_optim.target import ForwardInputs, Pattern, as_forward_calls, find_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PruningReport", "prune_channels"]


@dataclass(frozen=True)
class PruningReport(Listed, Plotted):
    """What left a model; its plot shows what each group had and has.

    Attributes:
        channels: (before, after) of each group, by the name of the layer whose outputs they are.
        parameters: (before, after) of the pruned module.
        left_out: Groups that were left alone, and why.
        plan: What of the architecture differs from the user's class, for :func:`lightning_optim.conform`.
    """

    channels: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    left_out: dict[str, str]
    plan: dict[str, Any]

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the groups' channels that left."""
        before, after = (sum(pair[i] for pair in self.channels.values()) for i in (0, 1))
        return 1 - after / before

    def listing(self) -> Listing:
        """Return what left each group, and why others were left alone."""
        rows = by_stack((name, str(before), str(after), "") for name, (before, after) in self.channels.items())
        rows += [(names, "", "", reason) for names, reason in by_reason(self.left_out)]
        before, after = self.parameters
        sentence = f"{self.pruning_ratio:.1%} of the channels removed; parameters {before:,} -> {after:,}"
        return Listing(("channels of", "before", "after", "why not"), rows, before=[sentence])

    def _figure(self) -> "Figure":
        unit, counts = self._counts()
        figure = new_figure(6, 1.2 + 0.25 * len(counts))
        axes = figure.subplots()
        places = range(len(counts))
        axes.barh(places, [before for before, _ in counts.values()], color="0.85", label="before")
        axes.barh(places, [after for _, after in counts.values()], color="C0", label="after")
        axes.set_yticks(places, list(counts), parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit}; parameters {self.parameters[0]:,} -> {self.parameters[1]:,}")
        axes.legend(frameon=False)
        return figure

    def _counts(self) -> tuple[str, dict[str, tuple[int, int]]]:
        """Return what the plot counts, and (before, after) by name."""
        return "channels", self.channels


def prune_channels(
    model: nn.Module,
    /,
    example_inputs: Any,
    *,
    pruning_ratio: float | dict[Pattern, float] = 0.5,
    criterion: str | ChannelCriterion = "magnitude",
    scope: Literal["global", "layer"] = "global",
    round_to: int | None = None,
    reduction: Literal["mean", "sum", "max"] = "mean",
    check: bool = True,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> PruningReport:
    """Remove channels from a model in place, once; the arguments are those of ``ChannelPruning``.

    The pruned model is an ordinary model of its class with smaller layers: train it, save it, export it. Build its
    optimizer afterwards. Files that a Trainer saves from a LightningModule pruned here are loaded by
    :func:`lightning_optim.load_from_checkpoint`; for a plain module, ``conform(fresh, report.plan)`` makes a fresh one
    the same shape, so that ``load_state_dict`` takes its weights.

    Args:
        model: Any module. It is unchanged when an error is raised.
        example_inputs: What the forward of the pruned module receives: a tensor, a tuple, or a dict of keywords; a list
            of these where one call does not reach all layers.
        pruning_ratio: Fraction of the channels to remove, in (0, 1), or by layer ``{pattern: ratio}``; reached within
            one unit of one group, else a warning says what kept it.
        criterion: Name in ``functional.channels.CHANNEL_CRITERIA`` or a callable ``(slices) -> [channels]``.
            ``"taylor"`` reads the gradients that the parameters hold: call ``backward`` before. ``"activation"`` looks
            at ``example_inputs``: pass typical ones.
        scope: ``"global"`` ranks the channels of all groups together, ``"layer"`` takes the same fraction of each.
        round_to: Keep multiples of this. None: 8 on CUDA, no rounding on a CPU.
        reduction: How the layers of a group decide together: ``"mean"``, ``"sum"`` or ``"max"``.
        check: Try everything on copies first: removing must equal setting to zero, norms taken over the channels that
            stay.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly the layers whose outputs may leave, instead of all but embeddings and the last Linear/Conv.
        exclude: Layers whose outputs stay.
        progress: Show a progress bar on rank zero where it takes longer than two seconds.

    Returns:
        What left, and why other layers were left alone.

    Raises:
        ValueError: If nothing can be removed, the model cannot be traced, or an argument is out of range.
        RuntimeError: If the check finds that the removal as a whole would do damage.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> report = prune_channels(net, torch.zeros(1, 8), pruning_ratio=0.75)
        >>> report.channels, net[0].weight.shape
        ({'0': (32, 8)}, torch.Size([8, 8]))
    """
    ratio = check_ratio(pruning_ratio)
    check_flags(progress=progress)
    allocation = Allocation.of(criterion, scope=scope, reduction=reduction, round_to=round_to)
    prefix, target = find_target(model, module)
    refuse_shared(model, target, prefix)
    inputs = as_forward_calls(example_inputs)
    if round_to is None and any(parameter.device.type == "cuda" for parameter in target.parameters()):
        allocation = allocation.rounded(8)
    found = find_prunable(
        target, inputs, *select_roots(target, prefix, include, exclude), check=check, progress=progress
    )
    if not found.groups:
        raise ValueError(f"prune_channels can remove nothing: {found.reasons()}.")
    removal, channels = _planned(target, inputs, found, ratio, allocation, prefix, check)
    before = SIZES["parameters"](target)
    ChannelRemoval(prefix, removal, configs=True)(model)
    return PruningReport(channels, (int(before), int(SIZES["parameters"](target))), found.left_out, plain_plan(model))


def _planned(
    target: nn.Module,
    inputs: ForwardInputs,
    found: ChannelReport,
    ratio: float | Mapping[Pattern, float],
    allocation: Allocation,
    prefix: str,
    check: bool,
) -> tuple[Removal, dict[str, tuple[int, int]]]:
    dense = {name: group.channels for name, group in found.groups.items()}
    pools = found.pools(ratio, target, prefix) if isinstance(ratio, Mapping) else [one_pool(ratio, dense, allocation)]
    statistics = statistics_of(target, inputs, found.groups, allocation)
    traced = TracedModel(target, inputs)
    event = plan_event(target, inputs, found.groups, dense, pools, allocation, statistics, prefix, traced=traced)
    problem = event_damage(target, inputs, found.groups, event, traced) if check else None
    if problem is not None:
        raise RuntimeError(f"prune_channels changed nothing: {problem}.")
    kept = {name: after for name, (_, after) in event.channels.items()}
    miss = shortfall(found.groups, dense, kept, pools, allocation.round_to)
    if miss.exceeds:
        rank_zero_warn(f"prune_channels: {miss.sentence()}")
    return event.removal, event.channels
