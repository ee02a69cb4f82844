"""One pruning event: from a live model and a ratio to what leaves, checked before anything is committed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_optim.functional.channels import Slices, channels_to_remove, group_scores
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.modules import NORMS, copy_module
from lightning_optim.patterns import Pattern, check_pattern
from lightning_optim.structured.allocation import Allocation, Pool, kept_channels, one_pool
from lightning_optim.structured.check import SHAPE, Damage, damage, trusted
from lightning_optim.structured.find import ChannelReport, find_prunable, known_groups
from lightning_optim.structured.groups import ChannelGroup, Member, Removal, dimension_of
from lightning_optim.structured.proof import refused_in_parts
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import ForwardInputs

__all__ = [
    "ChannelReport",
    "Event",
    "check_ratio",
    "event_damage",
    "find_prunable",
    "known_groups",
    "leaving_channels",
    "plan_event",
    "statistics_of",
]


def check_ratio(ratio: float | dict[Pattern, float]) -> float | dict[Pattern, float]:
    """Return a pruning ratio, or ratios by pattern, as floats.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is not in (0, 1), or there is none.
    """
    if isinstance(ratio, dict):
        if not ratio:
            raise ValueError("`pruning_ratio` as a dict maps patterns to fractions, got an empty one.")
        for pattern in ratio:
            check_pattern("pruning_ratio", pattern)
        return {pattern: float(check_ratio(value)) for pattern, value in ratio.items()}  # type: ignore[arg-type]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"`pruning_ratio` must be a fraction in (0, 1) or a dict of them, got {ratio!r}.")
    if not 0.0 < ratio < 1.0:
        hint = f" For {ratio:g} % of the channels pass {ratio / 100:g}." if 1 < ratio < 100 else ""
        raise ValueError(f"`pruning_ratio` must be a fraction in (0, 1), got {ratio!r}.{hint}")
    return float(ratio)


@dataclass(frozen=True)
class Event:
    """What leaves the live model at once.

    Attributes:
        removal: What is left of the parameters and attributes.
        channels: (now, after) of each group.
        leaving: The channels that leave, by group; groups that lose none are not there.
    """

    removal: Removal
    channels: dict[str, tuple[int, int]]
    leaving: dict[str, list[int]]


def statistics_of(
    module: nn.Module, inputs: ForwardInputs, groups: Mapping[str, ChannelGroup], allocation: Allocation
) -> dict[str, dict[str, Tensor]]:
    """Return what a criterion needs where nothing was collected.

    That is the gradients that parameters hold, and statistics of the layers' inputs in one forward pass.

    Args:
        module: The model; it is not touched.
        inputs: What its forward receives.
        groups: The groups that are to be ranked.
        allocation: How channels are chosen.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for statistic in allocation.needs:
        if statistic == "gradient":
            parameters = module.named_parameters(remove_duplicate=False)
            held = {name: p.grad.detach() for name, p in parameters if p.grad is not None}
            found[statistic] = {name: g.to_dense() if g.is_sparse else g.clone() for name, g in held.items()}
        elif statistic != "generator":
            copied = copy_module(module, share_weights=True)
            collector = STATISTICS[statistic]()
            for name in {m.layer for group in groups.values() for m in group.members if m.side == "in"}:
                layer = copied.get_submodule(name)
                if collector.problem(f"{name}.weight", layer) is None:
                    collector.attach(f"{name}.weight", layer)
                    layer.training = True  # it looks at layers that train; a Linear does the same in both modes
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                inputs.call_each(copied)
            found[statistic] = {name: collector.value(name, lambda sums: sums) for name in collector.sums}
    return found


def plan_event(
    module: nn.Module,
    inputs: ForwardInputs,
    names: Mapping[str, ChannelGroup],
    dense: Mapping[str, int],
    ratios: float | Sequence[Pool],
    allocation: Allocation,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    prefix: str = "",
    *,
    last: bool = True,
    chosen: Mapping[str, Sequence[int]] | None = None,
    traced: TracedModel | None = None,
) -> Event:
    """Choose what leaves the live model so that ``ratios`` of the dense channels are gone.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        names: The prunable groups by name, as :func:`find_prunable` gave them.
        dense: Channels of each group before anything left.
        ratios: Fraction to be gone, of all groups or by pool of groups; groups in no pool stay as they are.
        allocation: How channels are chosen.
        statistics: What the criterion needs besides the weights: name of the statistic -> parameter name -> values.
        prefix: What the module's names begin with in the whole model; it seeds the random criterion.
        last: Whether no event follows that could remove what does not fit into this one.
        chosen: Channels that were chosen before, by group: they are the first to leave.
        traced: A trace of the model with these inputs, if there is one.
    """
    traced = TracedModel(module, inputs) if traced is None else traced
    groups = _as_traced(names, traced)
    pools = [one_pool(ratios, names, allocation)] if isinstance(ratios, float) else ratios
    leaving = leaving_channels(module, groups, dense, pools, allocation, statistics, prefix, last=last, chosen=chosen)
    counts = {name: (group.channels, group.channels - len(leaving.get(name, ()))) for name, group in groups.items()}
    return Event(traced.remove(leaving, groups), counts, leaving)


def leaving_channels(
    module: nn.Module,
    groups: Mapping[str, ChannelGroup],
    dense: Mapping[str, int],
    pools: Sequence[Pool],
    allocation: Allocation,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    prefix: str = "",
    *,
    last: bool = True,
    chosen: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[int]]:
    """Choose which channels of each group are to leave; groups that lose none are not there.

    Args:
        module: The model as it is.
        groups: The prunable groups as they are now, by name.
        dense: Channels of each group before anything left.
        pools: What is to be gone of which groups; groups in no pool stay as they are.
        allocation: How channels are chosen.
        statistics: As for :func:`plan_event`.
        prefix: As for :func:`plan_event`.
        last: As for :func:`plan_event`.
        chosen: As for :func:`plan_event`.
    """
    scores = {name: _scores(module, group, allocation, statistics or {}, prefix) for name, group in groups.items()}
    for name, channels in (chosen or {}).items():
        scores[name][channels] = scores[name].min() - 1.0
    kept = kept_channels(groups, dense, scores, pools, allocation, last=last)
    return {
        name: channels_to_remove(scores[name], kept[name], group.blocks)
        for name, group in groups.items()
        if kept[name] < group.channels
    }


def _as_traced(names: Mapping[str, ChannelGroup], traced: TracedModel) -> dict[str, ChannelGroup]:
    """Return groups as a trace sees them; those that were proposed are those of the present model already."""
    now = {group.name: group for group in traced.groups()}
    return {
        name: group if group.proposed else group.now(now[name])
        for name, group in names.items()
        if group.proposed or name in now
    }


def event_damage(
    module: nn.Module,
    inputs: ForwardInputs,
    names: Mapping[str, ChannelGroup],
    event: Event,
    traced: TracedModel | None = None,
) -> str | None:
    """Say what an event would break, on copies; None when it breaks nothing.

    Groups whose layers lie in one part of the model are checked in that part, others all together. Where only values
    differ, the groups are checked in halves: one may need zeros where another needs its channels not to count, and then
    each is proven by itself.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        names: The prunable groups by name, as :func:`find_prunable` gave them.
        event: What would leave.
        traced: A trace of the model with these inputs, if there is one.
    """
    traced = TracedModel(module, inputs) if traced is None else traced
    groups = _as_traced(names, traced)
    problems: dict[str, str] = {}

    def judge(names: Sequence[str], part: str, layer: nn.Module, received: ForwardInputs) -> dict[str, str]:
        leaving = names if part else list(event.leaving)

        def breaks(some: Sequence[str]) -> Damage | None:
            removal = traced.remove({name: event.leaving[name] for name in some}, groups)
            return damage(layer, received, removal.below(part))

        problem = breaks(leaving)
        if problem is None:
            return {}
        if problem.only_values and len(leaving) > 1:
            return trusted(leaving, breaks)[1]
        if problem.reason == SHAPE:
            return dict.fromkeys(names, SHAPE)
        problems[", ".join(leaving)] = problem.reason
        return {}

    leaving = {name: groups[name] for name in event.leaving}
    problems.update(refused_in_parts(module, inputs, traced, leaving, judge))
    return "; ".join(f"{names}: {reason}" for names, reason in problems.items()) or None


def _scores(
    module: nn.Module,
    group: ChannelGroup,
    allocation: Allocation,
    statistics: Mapping[str, Mapping[str, Tensor]],
    prefix: str,
) -> Tensor:
    slices = list(_slices(module, group, allocation, statistics, prefix))
    try:
        scores = group_scores(slices, allocation.criterion, allocation.reduction)
        return scores.view(-1, group.unit).mean(1).repeat_interleave(group.unit)
    except ValueError as error:
        missing = [name for name in allocation.needs if name != "generator" and not statistics.get(name)]
        hint = f" It needs {', '.join(missing)}, of which nothing was seen since the last event." if missing else ""
        raise ValueError(f"group {prefix}{group.name}: {error}{hint}") from error


def _slices(
    module: nn.Module,
    group: ChannelGroup,
    allocation: Allocation,
    statistics: Mapping[str, Mapping[str, Tensor]],
    prefix: str,
) -> Iterable[Slices]:
    generator = parameter_generator(prefix + group.name) if "generator" in allocation.needs else None
    for member in group.members:
        layer = module.get_submodule(member.layer)
        leaf = "weight" if member.parameter is None else member.parameter[0]
        weight = layer._parameters.get(leaf)
        if not isinstance(weight, Tensor):
            continue
        norm = isinstance(layer, NORMS)
        if weight.ndim == 1 and not norm:  # slopes of a PReLU
            continue
        matrix = _of_group(layer, weight.detach(), member, group)
        if matrix is None:
            continue
        values: dict[str, Tensor | None] = {}
        for statistic, by_weight in statistics.items():
            value = by_weight.get(f"{member.layer}.{leaf}")
            if value is None or (value.shape != weight.shape and member.side != "in"):  # of inputs
                continue
            values[statistic] = _of_group(layer, value, member, group)
        yield Slices(matrix, "norm" if norm else member.side, generator=generator, **values)


def _of_group(layer: nn.Module, weight: Tensor, member: Member, group: ChannelGroup) -> Tensor | None:
    """Return the weights by channel of the group, ``[channels, entries]``.

    A layer that reads one block only, such as a part of a split, speaks for the channels that leave together: those of
    one block and their likes in the others.
    """
    dim = dimension_of(layer, weight, member)
    found = _by_channel(weight, dim, member.index, member.root, group.channels)
    if found is not None or group.blocks == 1:
        return found
    per_block = group.channels // group.blocks
    found = _by_channel(weight, dim, member.index, [root % per_block for root in member.root], per_block)
    return None if found is None else found.repeat(group.blocks, 1)


def _by_channel(weight: Tensor, dim: int, index: Sequence[int], root: Sequence[int], channels: int) -> Tensor | None:
    """Return the weights by channel of the group, ``[channels, entries]``.

    None where that cannot be told: inputs of a grouped convolution, or a layer that sees only some of the channels.
    """
    entries = Counter(root)
    if weight.shape[dim] <= max(index) or len(entries) < channels or len(set(entries.values())) > 1:
        return None
    rows = weight.movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    order = torch.tensor(sorted(range(len(index)), key=lambda i: (root[i], index[i])))
    picked = rows[torch.tensor(index)[order].to(rows.device)]
    return picked.reshape(channels, -1)
