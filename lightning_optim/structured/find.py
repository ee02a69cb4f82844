"""Which channels can be removed: groups are found, tried on copies, and reported; others with the reason."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.modules import EMBEDDINGS, Experts
from lightning_optim.patterns import NOT_INCLUDED, Pattern, matches, shown
from lightning_optim.structured.allocation import Pool
from lightning_optim.structured.attention import as_heads, coupled, in_attention, proposals
from lightning_optim.structured.check import Damage, damage, trusted
from lightning_optim.structured.cores import Core
from lightning_optim.structured.experts import expert_proposals
from lightning_optim.structured.groups import ChannelGroup
from lightning_optim.structured.proof import refused_in_parts
from lightning_optim.structured.splits import with_counted_parts
from lightning_optim.structured.traced import TracedModel
from lightning_optim.structured.unreached import possible_readers, unreached_layers
from lightning_optim.tables import by_reason, by_stack, render
from lightning_optim.target import ForwardInputs, named_layers

__all__ = ["ChannelReport", "find_prunable", "known_groups"]

_UNREACHED = "not reached by the example inputs"
_NUMBER = re.compile(r"\.\d+")

Ways = list[ChannelGroup]
"""The ways in which channels of a group may leave, the likeliest first."""


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
    return any(
        matches(pattern, f"{prefix}{name}.weight", target.get_submodule(name), prefix)
        for name in group.outputs or {group.name}
    )


def find_prunable(
    module: nn.Module,
    inputs: ForwardInputs,
    roots: Iterable[str],
    left_alone: Mapping[str, str],
    *,
    check: bool = True,
    progress: bool = False,
) -> ChannelReport:
    """Find the groups that can be pruned without harm.

    A group is left out when one of its outputs belongs to a layer that is left alone, or when removing some channels
    (the same of each block) breaks the forward pass, changes an output's shape, or differs from setting them to zero.
    Queries, keys and values of attention lose whole heads.

    Args:
        module: The model.
        inputs: What its forward receives.
        roots: Names of the layers whose outputs may leave.
        left_alone: Names of layers whose outputs must stay -> why.
        check: Try each group on copies of the model, and leave those whole that a layer may read which no example
            reaches. Without it attention is left alone.
        progress: Show a progress bar on rank zero while they are tried, where it takes longer than two seconds.
    """
    traced = TracedModel(module, inputs)
    unreached = unreached_layers(module, inputs, traced)
    ways = _ways(module, traced)
    groups = {name: each[0] for name, each in ways.items()}
    left_out = _left_out(module, groups, set(roots), left_alone)
    if check and unreached:
        for name, part in possible_readers(module, groups, unreached).items():
            left_out.setdefault(name, f"may be read by {part}, {_UNREACHED}: pass several, example_inputs=[a, b]")
    left_out |= dict.fromkeys(unreached, _UNREACHED)
    candidates = {name: each for name, each in ways.items() if name not in left_out}
    if check:
        return _checked(module, inputs, traced, candidates, left_out, progress=progress)
    heads = {name for name, each in candidates.items() if in_attention(module, each[-1])}
    left_out |= dict.fromkeys(heads, "attention heads cannot be told without check=True")
    return ChannelReport({name: each[-1] for name, each in candidates.items() if name not in heads}, left_out)


def known_groups(
    module: nn.Module, inputs: ForwardInputs, names: Iterable[str], traced: TracedModel | None = None
) -> ChannelReport:
    """Find groups again that :func:`find_prunable` found in the dense model, as they are now.

    Args:
        module: The model, smaller by now.
        inputs: What its forward receives.
        names: The groups' names. In files of 0.1 heads may be named after another of their layers.
        traced: A trace of the model with these inputs, if there is one.
    """
    wanted = list(names)
    traced = TracedModel(module, inputs) if traced is None else traced
    plain, to_check, others = dict[str, ChannelGroup](), dict[str, Ways](), dict[str, Ways]()
    for first, ways in _ways(module, traced).items():
        fitting = [way for way in ways if way.name in wanted]
        fitting = fitting or [way.named(name) for way in ways if way.proposed for name in wanted if name in way.outputs]
        if not fitting:
            others[first] = ways
            continue
        if len(fitting) > 1 or fitting[-1].proposed:  # the check tells which way is right
            to_check[fitting[0].name] = fitting
        plain[fitting[-1].name] = fitting[-1]
    found = {**plain, **_checked(module, inputs, traced, to_check, {}, others).groups} if to_check else plain
    return ChannelReport({name: found[name] for name in wanted if name in found})


def _ways(module: nn.Module, traced: TracedModel) -> dict[str, Ways]:
    """Return the ways in which the channels of each group may leave, by the name of the first."""
    ways: dict[str, Ways] = {}
    for group in traced.groups():
        ways[group.name] = [*as_heads(module, group), *with_counted_parts(module, group), group]
    for name, layer in named_layers(module):
        experts = list(expert_proposals(module, name)) if isinstance(layer, Experts) else []
        if experts:
            ways[name] = experts
    for cores in coupled(traced.cores.values(), module):
        heads = list(proposals(module, cores))
        problem = "its heads cannot be told from the shapes of its layers"
        unknown = [ChannelGroup(name, 0, 1, (), problem=problem, proposed=True) for name in cores[0].sources[:1]]
        first = heads[0].name if heads else unknown[0].name
        ways[first] = heads or unknown
    return ways


def _left_out(
    module: nn.Module, groups: Mapping[str, ChannelGroup], roots: set[str], left_alone: Mapping[str, str]
) -> dict[str, str]:
    """Return why groups are left out that need not be tried."""
    left_out = {}
    tables = {name: layer for name, layer in module.named_modules() if isinstance(layer, EMBEDDINGS)}
    selected = [tables[name].weight for name in roots & tables.keys()]
    chosen_tables = {name for name, layer in tables.items() if any(layer.weight is weight for weight in selected)}
    for name, group in groups.items():
        outputs = group.outputs or {name}
        if group.proposed:  # a table of biases follows its heads, whether tables are selected or not
            outputs = outputs - tables.keys()
        if outputs & chosen_tables:  # whoever takes a table in means the width of everything that is added to its rows
            must_stay = {
                layer for layer in outputs - chosen_tables if left_alone.get(layer, NOT_INCLUDED) != NOT_INCLUDED
            }
        else:
            must_stay = outputs & left_alone.keys()
        if must_stay:
            first = min(must_stay)
            left_out[name] = left_alone[first] if first == name else f"coupled with {first} ({left_alone[first]})"
        elif not outputs & (roots | chosen_tables):
            left_out[name] = "not selected"
        elif group.problem:
            left_out[name] = group.problem
        elif not group.proposed and group.channels <= max(group.blocks, group.least):
            a_block = group.channels // group.blocks
            left_out[name] = "one channel a block" if a_block == 1 else f"{a_block} channels a block are its fewest"
    return left_out


def _checked(
    module: nn.Module,
    inputs: ForwardInputs,
    traced: TracedModel,
    candidates: Mapping[str, Ways],
    left_out: dict[str, str],
    others: Mapping[str, Ways] | None = None,
    *,
    progress: bool = False,
) -> ChannelReport:
    """Try the groups, many at a time, in the parts of the model that hold their layers.

    Attention that is refused alone is tried together with its likes, ``others`` included: a stack may pass on what
    counts its heads.
    """
    good, bad = _proven(module, inputs, traced, candidates, progress=progress)
    refused = {name: candidates[name] for name in bad if candidates[name][-1].proposed}
    likes = [(names, cores) for names, cores in _likes(traced, {**refused, **(others or {})}) if names[0] in refused]
    more = {names[0]: list(proposals(module, cores)) for names, cores in likes if len(cores) > 1}
    if more:
        together, _ = _proven(module, inputs, traced, more, progress=progress)
        good |= together
        for names, _ in likes:
            if names[0] in together:
                bad = {name: reason for name, reason in bad.items() if name not in names}
    kept = {good[name].name: good[name] for name in candidates if name in good}
    reasons = {name: _reason(module, candidates[name][-1], reason) for name, reason in bad.items()}
    return ChannelReport(kept, {**left_out, **{name: reasons[name] for name in candidates if name in reasons}})


def _likes(traced: TracedModel, refused: Mapping[str, Ways]) -> list[tuple[list[str], list[Core]]]:
    """Return the attentions of refused groups by kind: those whose names differ in numbers only."""
    kinds: dict[str, tuple[list[str], list[Core]]] = {}
    for name, ways in refused.items():
        writers = {member.layer for member in ways[0].members if member.side == "in"}
        if len(writers) == 1 and writers <= traced.cores.keys():
            (writer,) = writers
            names, cores = kinds.setdefault(_NUMBER.sub(".#", writer), ([], []))
            names.append(name)
            cores.append(traced.cores[writer])
    return list(kinds.values())


def _proven(
    module: nn.Module,
    inputs: ForwardInputs,
    traced: TracedModel,
    candidates: Mapping[str, Ways],
    *,
    progress: bool = False,
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """Return the groups that can be pruned, in the first way that is right, and why the others cannot."""
    good: dict[str, ChannelGroup] = {}

    def judge(names: Sequence[str], part: str, layer: nn.Module, received: ForwardInputs) -> dict[str, str]:
        # a part that is called again proves again what was found to be right
        ways = {name: [good.pop(name)] if name in good else candidates[name] for name in names}
        proven, refused = _first_ways(ways, partial(_probe, layer, received, traced, part))
        good.update(proven)
        return refused

    firsts = {name: ways[0] for name, ways in candidates.items()}
    bad = refused_in_parts(module, inputs, traced, firsts, judge, progress=progress)
    return {name: good[name] for name in candidates if name in good}, bad


def _first_ways(
    ways: Mapping[str, Ways], breaks: Callable[[Mapping[str, ChannelGroup], Sequence[str]], Damage | None]
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """Return the first way of each group that breaks nothing, and why the others break something."""
    good: dict[str, ChannelGroup] = {}
    reasons: dict[str, str] = {}
    for turn in range(max(map(len, ways.values()), default=0)):
        tried = {name: each[turn] for name, each in ways.items() if turn < len(each) and name not in good}
        proven, refused = trusted(tried, partial(breaks, tried))
        good |= {name: tried[name] for name in proven}
        for name, reason in refused.items():
            reasons.setdefault(name, reason)
    return good, {name: reason for name, reason in reasons.items() if name not in good}


def _reason(module: nn.Module, group: ChannelGroup, reason: str) -> str:
    if not in_attention(module, group):
        return reason
    return f"attention whose heads cannot be told apart: {reason}"


def _probe(
    layer: nn.Module,
    received: ForwardInputs,
    traced: TracedModel,
    part: str,
    groups: Mapping[str, ChannelGroup],
    names: Sequence[str],
) -> Damage | None:
    """Remove some channels of some groups, on copies: others in each group, so that nothing lines up by chance."""
    tried = {groups[name].name: groups[name] for name in names}
    leaving = {name: _some_channels(group) for name, group in tried.items()}
    try:
        removal = traced.remove(leaving, tried)
    except FAILURES as error:
        return Damage(f"torch-pruning cannot remove its channels ({first_line(error, 120)})")
    return damage(layer, received, removal.below(part))


def _some_channels(group: ChannelGroup) -> list[int]:
    """Draw up to half of the channels, the same of each block, from the group's name.

    No set that a flip or a shuffle in two halves would leave as it is: it would hide them.
    """
    pieces = group.channels // group.blocks // group.unit
    generator = parameter_generator(group.name)
    number = int(torch.randint(1, pieces // 2 + 1, (), generator=generator)) if pieces > 1 else 0
    number = max(number - number % group.multiple, min(group.multiple, pieces - 1))
    order = list(range(pieces))
    flipped, shuffled = order[::-1], [*order[::2], *order[1::2]] if pieces % 2 == 0 else order
    while True:
        drawn = torch.randperm(pieces, generator=generator)[:number].tolist()
        moved = [sorted(permuted[piece] for piece in drawn) for permuted in (flipped, shuffled) if permuted != order]
        if sorted(drawn) not in moved or number in (0, pieces):
            break
    units = [block * pieces + piece for block in range(group.blocks) for piece in drawn]
    return sorted(unit * group.unit + offset for unit in units for offset in range(group.unit))
