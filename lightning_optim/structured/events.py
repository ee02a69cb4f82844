"""One pruning event: from a live model and a ratio to what leaves, checked before anything is committed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.functional.channels import Slices, channels_to_remove, group_scores
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.modules import INPUTS_FIRST, NORMS
from lightning_optim.patterns import Pattern, check_pattern, matches, shown
from lightning_optim.structured.allocation import Allocation, Pool, kept_channels, one_pool
from lightning_optim.structured.attention import as_heads, in_attention
from lightning_optim.structured.check import Damage, damage, trusted
from lightning_optim.structured.groups import ChannelGroup, Member, Removal, TracedModel
from lightning_optim.structured.splits import with_counted_parts
from lightning_optim.structured.unreached import possible_readers, unreached_layers
from lightning_optim.tables import by_reason, by_stack, render
from lightning_optim.target import ForwardInputs

__all__ = [
    "ChannelReport",
    "Event",
    "check_ratio",
    "event_damage",
    "find_prunable",
    "held_gradients",
    "known_groups",
    "plan_event",
]

_UNREACHED = "not reached by the example inputs"
_CHANNEL_DIM = {"out": 0, "in": 1}


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
class ChannelReport:
    """The groups that can be pruned, and why others are left alone."""

    groups: dict[str, ChannelGroup]
    left_out: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """Say why nothing else can be removed."""
        reasons = ", ".join(f"{name} ({reason})" for name, reason in self.left_out.items())
        return reasons or "the model has no Linear, convolution or embedding layer"

    def ratios(self, by_pattern: Mapping[Pattern, float], target: nn.Module, prefix: str = "") -> dict[str, float]:
        """Return each group's ratio: of the first pattern that matches one of its outputs, else 0.

        Raises:
            ValueError: If a pattern matches no group.
        """
        pools = self.pools(by_pattern, target, prefix)
        by_group = {name: pool.ratio for pool in pools for name in pool.names}
        return {name: by_group.get(name, 0.0) for name in self.groups}

    def pools(self, by_pattern: Mapping[Pattern, float], target: nn.Module, prefix: str = "") -> list[Pool]:
        """Return the groups of each pattern: the first that matches one of a group's outputs. Others are in no pool.

        Raises:
            ValueError: If a pattern matches no group.
        """
        found = {
            name: next((p for p in by_pattern if _matches(p, group, target, prefix)), None)
            for name, group in self.groups.items()
        }
        for pattern in by_pattern:
            if pattern not in found.values():
                raise ValueError(
                    f"pruning_ratio: {shown(pattern)} matches no group; there are {', '.join(self.groups)}."
                )
        return [
            Pool(ratio, tuple(name for name, first in found.items() if first == pattern), even=True)
            for pattern, ratio in by_pattern.items()
        ]

    def table(self, title: str, dense: Mapping[str, int], removed: Mapping[str, str]) -> str:
        """Return a table of the groups, and why other layers are left alone.

        Args:
            title: Its first line.
            dense: Channels of each group before anything left.
            removed: What is removed of each group at the end, in words.
        """
        rows = by_stack(
            (name, str(dense[name]), removed[name], ", ".join(sorted(group.layers - {name})))
            for name, group in self.groups.items()
        )
        rows += [(names, "", "-", reason) for names, reason in by_reason(self.left_out)]
        columns = ("channels of", "dense", "removed at the end", "layers that change with it, or why not")
        return render(title, columns, rows)


def _matches(pattern: Pattern, group: ChannelGroup, target: nn.Module, prefix: str) -> bool:
    outputs = {member.layer for member in group.members if member.side == "out"}
    return any(matches(pattern, f"{prefix}{name}.weight", target.get_submodule(name), prefix) for name in outputs)


def find_prunable(
    module: nn.Module, inputs: ForwardInputs, roots: Iterable[str], left_alone: Mapping[str, str], *, check: bool = True
) -> ChannelReport:
    """Find the groups that can be pruned without harm.

    A group is left out when one of its outputs belongs to a layer that is left alone, or when removing some channels
    (the same of each block) breaks the forward pass, changes an output's shape, or differs from setting them to zero.
    Queries, keys and values of hand-written attention lose whole heads.

    Args:
        module: The model.
        inputs: What its forward receives.
        roots: Names of the layers whose outputs may leave.
        left_alone: Names of layers whose outputs must stay -> why.
        check: Try each group on copies of the model, and leave those whole that a layer may read which no example
            reaches. Without it attention is left alone.
    """
    traced = TracedModel(module, inputs)
    unreached = unreached_layers(module, inputs, traced)
    groups = {group.name: group for group in traced.groups()}
    left_out = _left_out(groups, set(roots), left_alone)
    if check and unreached:
        for name, part in possible_readers(module, groups, unreached).items():
            left_out.setdefault(name, f"may be read by {part}, {_UNREACHED}: pass several, example_inputs=[a, b]")
    left_out |= dict.fromkeys(unreached, _UNREACHED)
    candidates = {name: group for name, group in groups.items() if name not in left_out}
    if check:
        return _checked(module, inputs, candidates, left_out)
    heads = {name for name, group in candidates.items() if in_attention(module, group)}
    left_out |= dict.fromkeys(heads, "attention heads cannot be told without check=True")
    return ChannelReport({name: group for name, group in candidates.items() if name not in heads}, left_out)


def known_groups(module: nn.Module, inputs: ForwardInputs, names: Iterable[str]) -> ChannelReport:
    """Find groups again that :func:`find_prunable` found in the dense model, as they are now.

    Args:
        module: The model, smaller by now.
        inputs: What its forward receives.
        names: The groups' names.
    """
    wanted = set(names)
    groups = {group.name: group for group in TracedModel(module, inputs).groups() if group.name in wanted}
    heads = {name: group for name, group in groups.items() if in_attention(module, group) or group.splits}
    return ChannelReport({**groups, **_checked(module, inputs, heads, {}).groups})


def _left_out(groups: Mapping[str, ChannelGroup], roots: set[str], left_alone: Mapping[str, str]) -> dict[str, str]:
    """Return why groups are left out that need not be tried."""
    left_out = {}
    for name, group in groups.items():
        outputs = {member.layer for member in group.members if member.side == "out"} or {name}
        coupled = sorted(outputs & left_alone.keys())
        if coupled:
            reason = left_alone[coupled[0]]
            left_out[name] = reason if coupled[0] == name else f"coupled with {coupled[0]} ({reason})"
        elif not outputs & roots:
            left_out[name] = "not selected"
        elif group.problem:
            left_out[name] = group.problem
        elif group.channels <= max(group.blocks, group.least):
            a_block = group.channels // group.blocks
            left_out[name] = "one channel a block" if a_block == 1 else f"{a_block} channels a block are its fewest"
    return left_out


def _checked(
    module: nn.Module, inputs: ForwardInputs, groups: Mapping[str, ChannelGroup], left_out: dict[str, str]
) -> ChannelReport:
    """Try the groups, many at a time: those of attention as whole heads first, then all others channel by channel."""
    good: dict[str, ChannelGroup] = {}
    ways = {name: [*as_heads(module, group), *with_counted_parts(module, group)] for name, group in groups.items()}
    for turn in range(max((len(each) for each in ways.values()), default=0)):
        heads = {name: each[turn] for name, each in ways.items() if turn < len(each) and name not in good}
        good |= {name: heads[name] for name in trusted(heads, partial(_probe, module, inputs, heads))[0]}
    names = [name for name in groups if name not in good]
    bad = trusted(names, partial(_probe, module, inputs, groups))[1]
    kept = {name: good.get(name, group) for name, group in groups.items() if name not in bad}
    reasons = {name: _reason(module, groups[name], reason) for name, reason in bad.items()}
    return ChannelReport(kept, {**left_out, **reasons})


def _reason(module: nn.Module, group: ChannelGroup, reason: str) -> str:
    if not in_attention(module, group):
        return reason
    return f"attention whose heads cannot be told apart (fused or shared projections): {reason}"


def _probe(
    module: nn.Module, inputs: ForwardInputs, groups: Mapping[str, ChannelGroup], names: Sequence[str]
) -> Damage | None:
    """Remove some channels of some groups, on copies: others in each group, so that nothing lines up by chance."""
    leaving = {name: _some_channels(groups[name]) for name in names}
    try:
        removal = _remove(TracedModel(module, inputs), groups, leaving)
    except FAILURES as error:
        return Damage(f"torch-pruning cannot remove its channels ({first_line(error, 120)})")
    return damage(module, inputs, removal)


def _some_channels(group: ChannelGroup) -> list[int]:
    """Draw up to half of the channels, the same of each block, from the group's name.

    No set that a flip or a shuffle in two halves would leave as it is: it would hide them.
    """
    pieces = group.channels // group.blocks // group.unit
    generator = parameter_generator(group.name)
    number = int(torch.randint(1, pieces // 2 + 1, (), generator=generator)) if pieces > 1 else 0
    order = list(range(pieces))
    flipped, shuffled = order[::-1], [*order[::2], *order[1::2]] if pieces % 2 == 0 else order
    while True:
        drawn = torch.randperm(pieces, generator=generator)[:number].tolist()
        moved = [sorted(permuted[piece] for piece in drawn) for permuted in (flipped, shuffled) if permuted != order]
        if sorted(drawn) not in moved or number == 0:
            break
    units = [block * pieces + piece for block in range(group.blocks) for piece in drawn]
    return sorted(unit * group.unit + offset for unit in units for offset in range(group.unit))


def _remove(traced: TracedModel, groups: Mapping[str, ChannelGroup], leaving: Mapping[str, Sequence[int]]) -> Removal:
    """Return what is left, with the attributes that count heads."""
    removal = traced.remove(leaving)
    attributes = {name: dict(values) for name, values in removal.attributes.items()}
    for name, channels in leaving.items():
        left = groups[name].channels - len(channels)
        for layer, attribute, per in groups[name].counts:
            number = tuple(int(left // each) for each in per) if isinstance(per, tuple) else int(left // per)
            attributes.setdefault(layer, {})[attribute] = number
    return replace(removal, attributes=attributes)


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


def held_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that parameters hold now, by name: what ``taylor`` needs where nothing was collected."""
    held = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
    return {name: gradient.to_dense() if gradient.is_sparse else gradient.clone() for name, gradient in held.items()}


def plan_event(
    module: nn.Module,
    inputs: ForwardInputs,
    names: Mapping[str, ChannelGroup],
    dense: Mapping[str, int],
    ratios: float | Sequence[Pool],
    allocation: Allocation,
    gradients: Mapping[str, Tensor] | None = None,
    prefix: str = "",
    *,
    last: bool = True,
) -> Event:
    """Choose what leaves the live model so that ``ratios`` of the dense channels are gone.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        names: The prunable groups by name, as :func:`find_prunable` gave them.
        dense: Channels of each group before anything left.
        ratios: Fraction to be gone, of all groups or by pool of groups; groups in no pool stay as they are.
        allocation: How channels are chosen.
        gradients: Root-mean-square gradients by parameter name, where the criterion needs them.
        prefix: What the module's names begin with in the whole model; it seeds the random criterion.
        last: Whether no event follows that could remove what does not fit into this one.
    """
    pools = [one_pool(ratios, names, allocation)] if isinstance(ratios, float) else ratios
    traced = TracedModel(module, inputs)
    now = {group.name: group for group in traced.groups() if group.name in names}
    groups = {name: names[name].now(group) for name, group in now.items()}
    scores = {name: _scores(module, group, allocation, gradients or {}, prefix) for name, group in groups.items()}
    kept = kept_channels(groups, dense, scores, pools, allocation, last=last)
    leaving, counts = {}, {}
    for name, group in groups.items():
        counts[name] = (group.channels, kept[name])
        if kept[name] < group.channels:
            leaving[name] = channels_to_remove(scores[name], kept[name], group.blocks)
    return Event(_remove(traced, groups, leaving), counts, leaving)


def event_damage(
    module: nn.Module, inputs: ForwardInputs, names: Mapping[str, ChannelGroup], event: Event
) -> str | None:
    """Say what an event would break, on copies; None when it breaks nothing.

    All groups are checked together. Where only values differ, the groups are checked in halves: one may need zeros
    where another needs its channels not to count, and then each is proven by itself.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        names: The prunable groups by name, as :func:`find_prunable` gave them.
        event: What would leave.
    """
    problem = damage(module, inputs, event.removal)
    if problem is None:
        return None
    if not problem.only_values or len(event.leaving) == 1:
        return f"{', '.join(event.leaving)}: {problem}"
    groups = {name: replace(names[name], channels=event.channels[name][0]) for name in event.leaving}

    def breaks(some: Sequence[str]) -> Damage | None:
        leaving = {name: event.leaving[name] for name in some}
        return damage(module, inputs, _remove(TracedModel(module, inputs), groups, leaving))

    _, bad = trusted(event.leaving, breaks)
    return "; ".join(f"{name}: {reason}" for name, reason in bad.items()) or None


def _scores(
    module: nn.Module, group: ChannelGroup, allocation: Allocation, gradients: Mapping[str, Tensor], prefix: str
) -> Tensor:
    slices = list(_slices(module, group, allocation, gradients, prefix))
    try:
        scores = group_scores(slices, allocation.criterion, allocation.reduction)
        return scores.view(-1, group.unit).mean(1).repeat_interleave(group.unit)
    except ValueError as error:
        raise ValueError(f"group {prefix}{group.name}: {error}") from error


def _slices(
    module: nn.Module, group: ChannelGroup, allocation: Allocation, gradients: Mapping[str, Tensor], prefix: str
) -> Iterable[Slices]:
    generator = parameter_generator(prefix + group.name) if "generator" in allocation.needs else None
    for member in group.members:
        layer = module.get_submodule(member.layer)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        norm = isinstance(layer, NORMS)
        if weight.ndim == 1 and not norm:  # slopes of a PReLU
            continue
        matrix = _of_group(layer, weight.detach(), member, group)
        if matrix is None:
            continue
        gradient = gradients.get(f"{member.layer}.weight")
        if gradient is not None:
            gradient = _of_group(layer, gradient, member, group)
        yield Slices(matrix, "norm" if norm else member.side, gradient, generator)


def _of_group(layer: nn.Module, weight: Tensor, member: Member, group: ChannelGroup) -> Tensor | None:
    """Return the weights by channel of the group, ``[channels, entries]``.

    A layer that reads one block only, such as a part of a split, speaks for the channels that leave together: those of
    one block and their likes in the others.
    """
    found = _by_channel(layer, weight, member.side, member.index, member.root, group.channels)
    if found is not None or group.blocks == 1:
        return found
    per_block = group.channels // group.blocks
    found = _by_channel(layer, weight, member.side, member.index, [r % per_block for r in member.root], per_block)
    return None if found is None else found.repeat(group.blocks, 1)


def _by_channel(
    layer: nn.Module, weight: Tensor, side: str, index: Sequence[int], root: Sequence[int], channels: int
) -> Tensor | None:
    """Return the weights by channel of the group, ``[channels, entries]``.

    None where that cannot be told: inputs of a grouped convolution, or a layer that sees only some of the channels.
    """
    dim = 0 if weight.ndim == 1 else _CHANNEL_DIM[side] ^ isinstance(layer, INPUTS_FIRST)
    entries = Counter(root)
    if weight.shape[dim] <= max(index) or len(entries) < channels or len(set(entries.values())) > 1:
        return None
    rows = weight.movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    order = torch.tensor(sorted(range(len(index)), key=lambda i: (root[i], index[i])))
    picked = rows[torch.tensor(index)[order].to(rows.device)]
    return picked.reshape(channels, -1)
