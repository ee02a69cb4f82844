"""Attention heads: the projections of an attention lose whole heads, and the numbers that count them follow.

Which channels of which layer belong to a head is proposed from the layers' shapes and from the numbers that the module
keeps, and proven by the check: heads are independent of each other, so removing one equals setting it to zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn

from lightning_optim.modules import EMBEDDINGS
from lightning_optim.structured.cores import Core
from lightning_optim.structured.groups import ChannelGroup, Member, inputs_of, is_linear, outputs_of
from lightning_optim.structured.numbers import (
    holders,
    is_heads,
    is_queries_per_head,
    is_shared,
    is_width_of_head,
    numbers_of,
)

__all__ = ["FEWEST_HEADS", "as_heads", "counts_heads", "coupled", "in_attention", "proposals"]

FEWEST_HEADS = 2
"""An attention keeps this many heads: with one it could not be told from other layers when a run is resumed."""

_FEW_SHARED = 3
"""Up to so many key/value heads stay, and each of them loses queries; of more, some leave with their queries."""

_DIVISORS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64)

Part = tuple[str, int]
"""``("q", head)``, ``("k", head)`` or ``("v", head)``: what a run of consecutive channels of a projection is."""


@dataclass(frozen=True)
class Heads:
    """How an attention may be divided into heads.

    Attributes:
        queries: Number of query heads.
        shared: Number of key/value heads; a divisor of ``queries``.
        width: Channels of one head that the output layer reads.
    """

    queries: int
    shared: int
    width: int

    @property
    def each(self) -> int:
        """Queries of one key/value head."""
        return self.queries // self.shared


def counts_heads(module: nn.Module, core: Core) -> bool:
    """Tell whether the modules around an attention keep a number of heads, or the width of one."""
    names = holders([*core.sources, core.writer])
    numbers = [*numbers_of(module, names), *numbers_of(module, names, configs=True)]
    keys = [key.removeprefix("config.") for _, key, _ in numbers]
    return any(is_heads(key) or is_width_of_head(key) for key in keys)


def coupled(cores: Iterable[Core], module: nn.Module) -> list[list[Core]]:
    """Return the attentions in groups that lose the same heads: those that read one table of biases.

    Args:
        cores: The attentions.
        module: The model.
    """
    groups: list[tuple[set[str], list[Core]]] = []
    for core in cores:
        tables = {name for name in core.sources if isinstance(module.get_submodule(name), EMBEDDINGS)}
        read = {*core.sources, *core.parameters} if tables else set(core.sources)
        together = [group for group in groups if group[0] & read]
        members = [each for _, others in together for each in others]
        groups = [group for group in groups if group not in together]
        groups.append((read.union(*(names for names, _ in together)), [*members, core]))
    return [members for _, members in groups]


def proposals(module: nn.Module, cores: Sequence[Core]) -> Iterator[ChannelGroup]:
    """Yield the ways in which heads may leave some attentions together, the likeliest first.

    Queries leave with the keys and values that they read; where few keys and values are shared by many queries
    (multi-query attention), each keeps equally many queries.

    Args:
        module: The model.
        cores: Attentions that lose the same heads; one mostly.

    Yields:
        Candidates to be checked.
    """
    names = holders([name for core in cores for name in (*core.sources, core.writer)])
    for heads in _possible_heads(module, cores, names):
        for members, name, by_queries in _memberships(module, cores, heads):
            pieces = heads.each if by_queries else heads.shared
            if pieces < 2:  # nothing could leave, and so nothing be proven
                continue
            channels = heads.width * (heads.queries if by_queries else heads.shared)
            fewest = max(heads.shared, FEWEST_HEADS) if by_queries else FEWEST_HEADS
            if not by_queries and heads.each > 1 and len(_projections(module, cores[0])) > 1:
                fewest = 1  # one key/value head may stay: it has several queries
            group = ChannelGroup(
                name,
                channels,
                heads.shared if by_queries else 1,
                tuple(members),
                unit=heads.width,
                least=heads.width * fewest,
                proposed=True,
            )
            yield from _with_numbers(module, group, heads, names, by_queries)


def _possible_heads(module: nn.Module, cores: Sequence[Core], names: Sequence[str]) -> Iterator[Heads]:
    """Yield divisions into heads that the shapes allow: by numbers that the modules keep, else by any divisor."""
    core = cores[0]
    reads = inputs_of(module.get_submodule(core.writer))
    numbers = [
        (key.removeprefix("config."), value)
        for configs in (False, True)
        for _, key, value in numbers_of(module, names, configs=configs)
        if value > 0
    ]
    widths = [value for key, value in numbers if is_width_of_head(key)]
    widths += [reads // value for key, value in numbers if is_heads(key) and not is_shared(key) and reads % value == 0]
    kept = [value for key, value in numbers if is_heads(key) and is_shared(key)]
    outs = [outputs_of(layer) for layer in _projections(module, core)]
    for width in dict.fromkeys(widths or [reads // count for count in _DIVISORS if reads % count == 0]):
        if reads % width or reads < width:
            continue
        queries = reads // width
        smaller = [out // width for out in outs if out < reads and out % width == 0]
        fused = [(out - reads) // (2 * width) for out in outs if out > reads and (out - reads) % (2 * width) == 0]
        for shared in dict.fromkeys([*smaller, *kept, *fused, queries]):
            if 0 < shared <= queries and queries % shared == 0:
                yield Heads(queries, shared, width)


def _projections(module: nn.Module, core: Core) -> list[nn.Module]:
    layers = [module.get_submodule(name) for name in core.sources]
    return [layer for layer in layers if is_linear(layer)]


def _memberships(module: nn.Module, cores: Sequence[Core], heads: Heads) -> Iterator[tuple[list[Member], str, bool]]:
    """Yield the members if these are the heads, the layer that gives the name, and whether only queries leave."""
    layouts = [list(_layouts(module, core, heads)) for core in cores]
    if not all(layouts):
        return
    for turn in range(max(map(len, layouts))):
        parts = [each[min(turn, len(each) - 1)] for each in layouts]
        ways = [False]
        if heads.each > 1:  # a fused projection has one name for both ways: which one it is must show in its shape
            few = heads.shared <= (_FEW_SHARED if len(parts[0]) > 1 else 1)
            ways = [few, not few] if len(parts[0]) > 1 else [few]
        for by_queries in ways:
            members = [
                member
                for core, part in zip(cores, parts, strict=True)
                for member in _members(module, core, part, heads, by_queries)
            ]
            tables = list(_tables(module, cores, heads, by_queries))
            first = parts[0]
            kinds = "q" if by_queries else "kv"
            name = [name for name, each in first.items() if any(kind in kinds for kind, _ in each)][-1]
            if tables:
                yield [*members, *tables], name, by_queries
            yield members, name, by_queries


def _layouts(module: nn.Module, core: Core, heads: Heads) -> Iterator[dict[str, list[Part]]]:
    """Yield what each projection's channels may be, as equal runs in their order."""
    names = [name for name in core.sources if is_linear(module.get_submodule(name))]
    outs = [outputs_of(module.get_submodule(name)) for name in names]
    queries = [("q", head) for head in range(heads.queries)]
    keys, values = ([(kind, head) for head in range(heads.shared)] for kind in "kv")
    if len(names) == 1:
        total = heads.queries + 2 * heads.shared
        if outs[0] == total * heads.width:
            yield {names[0]: [*queries, *keys, *values]}
            each = heads.each
            mixed = [
                [*queries[each * head : each * (head + 1)], keys[head], values[head]] for head in range(heads.shared)
            ]
            yield {names[0]: [part for group in mixed for part in group]}
        return
    found: dict[str, list[Part]] = {}
    for place, (name, out) in enumerate(zip(names, outs, strict=True)):
        if out == 2 * heads.shared * heads.width and len(names) == 2 and place == 1:
            found[name] = [*keys, *values]
        elif heads.shared < heads.queries and out == heads.shared * heads.width:
            found[name] = keys if not any("k" in (kind for kind, _ in each) for each in found.values()) else values
        elif out % heads.queries == 0 and out >= heads.queries:
            found[name] = queries if heads.shared < heads.queries or not found else keys
        else:
            return
    kinds = {kind for each in found.values() for kind, _ in each}
    if "q" in kinds and (heads.shared == heads.queries or "k" in kinds):
        yield found


def _members(
    module: nn.Module, core: Core, parts: dict[str, list[Part]], heads: Heads, by_queries: bool
) -> Iterator[Member]:
    def piece(part: Part) -> int | None:
        kind, head = part
        if by_queries:
            return head if kind == "q" else None
        return head // heads.each if kind == "q" else head

    for name, runs in parts.items():
        width = outputs_of(module.get_submodule(name)) // len(runs)
        member = _member(name, "out", [piece(part) for part in runs], width, heads.width)
        if member.index:
            yield member
    yield _member(core.writer, "in", [piece(("q", head)) for head in range(heads.queries)], heads.width, heads.width)


def _member(
    name: str, side: str, pieces: Sequence[int | None], width: int, unit: int, leaf: str | None = None
) -> Member:
    """Return a member whose channels are equal runs, each of one piece of the group; of a layer or a vector in it."""
    index, root = [], []
    for place, piece in enumerate(pieces):
        if piece is not None:
            index += [place * width + offset for offset in range(width)]
            root += [piece * unit + offset % unit for offset in range(width)]
    return Member(name, side, tuple(index), tuple(root), None if leaf is None else (leaf, 0))


def _tables(module: nn.Module, cores: Sequence[Core], heads: Heads, by_queries: bool) -> Iterator[Member]:
    """Yield what holds a number a query head (a table of biases, a parameter), or one a channel (a norm of queries)."""
    every = range(heads.queries)
    root = tuple(heads.width * (head if by_queries else head // heads.each) for head in every)
    for name in dict.fromkeys(name for core in cores for name in core.sources):
        layer = module.get_submodule(name)
        if isinstance(layer, EMBEDDINGS) and outputs_of(layer) == heads.queries:
            yield Member(name, "out", tuple(every), root)
    for name in dict.fromkeys(name for core in cores for name in core.parameters):
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if isinstance(layer, EMBEDDINGS) or is_linear(layer):
            continue
        shape = layer.get_parameter(leaf).shape
        dims = [dim for dim, size in enumerate(shape) if size == heads.queries]
        if dims:
            yield Member(owner, "out", tuple(every), root, (leaf, dims[-1]))
        elif shape == (heads.queries * heads.width,):
            yield _member(owner, "out", [place // heads.width for place in root], heads.width, heads.width, leaf)
        elif shape == (heads.shared * heads.width,) and not by_queries:
            yield _member(owner, "out", range(heads.shared), heads.width, heads.width, leaf)


def _with_numbers(
    module: nn.Module, group: ChannelGroup, heads: Heads, names: Sequence[str], by_queries: bool
) -> Iterator[ChannelGroup]:
    """Yield a group with the numbers that may count its heads: of the modules, of whole widths too, of the config."""
    one = Fraction(heads.width) if by_queries else Fraction(heads.width, heads.each)  # channels a query head

    def counted(*, configs: bool) -> tuple[list[tuple[str, str, Any]], list[tuple[str, str, Any]]]:
        heads_of, wholes = [], []
        for layer, key, value in numbers_of(module, names, configs=configs):
            plain = key.removeprefix("config.")
            if is_width_of_head(plain):
                continue
            if is_queries_per_head(plain):
                if by_queries and value == heads.each:
                    heads_of.append((layer, key, Fraction(heads.width * heads.shared)))
            elif is_heads(plain):
                if is_shared(plain) or value != heads.queries:
                    if not by_queries and value == heads.shared:
                        heads_of.append((layer, key, Fraction(heads.width)))
                else:
                    heads_of.append((layer, key, one))
            elif value == heads.queries * heads.width:
                wholes.append((layer, key, one / heads.width))
            elif not by_queries and value == heads.shared * heads.width:
                wholes.append((layer, key, Fraction(1)))
        return heads_of, wholes

    own, wholes = counted(configs=False)
    of_config, _ = counted(configs=True)
    tie = next((f"config {id(module.get_submodule(layer).config)}" for layer, _, _ in of_config), "")
    yield replace(group, counts=tuple(own))
    if wholes:
        yield replace(group, counts=tuple(own + wholes))
    if of_config:
        yield replace(group, counts=tuple(own + of_config), tie=tie)
    if of_config and wholes:
        yield replace(group, counts=tuple(own + wholes + of_config), tie=tie)


# Attention that stays in torch-pruning's graph: its projections are convolutions, or nothing takes its result.


def in_attention(module: nn.Module, group: ChannelGroup) -> bool:
    """Tell whether the layers whose outputs these are belong to one module that counts heads."""
    heads = group.proposed and any(member.parameter is None for member in group.members)
    return heads or (not group.proposed and _attention(module, group) is not None)


def as_heads(module: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """Yield a group that torch-pruning followed as one that loses whole heads, in the ways that a module counts them.

    Args:
        module: The model.
        group: Channels of any layers.

    Yields:
        Candidates to be checked; none where the heads cannot be told, or queries share their keys.
    """
    name = _attention(module, group)
    if name is None or any(member.index != tuple(range(group.channels)) for member in group.members):
        return  # no attention, or a fused projection
    numbers = {key: value for _, key, value in numbers_of(module, [name])}
    heads = {key: value for key, value in numbers.items() if is_heads(key)}
    count = next(iter(heads.values()))
    shared = any(value != count for key, value in numbers.items() if is_shared(key))
    if shared or count < FEWEST_HEADS or group.channels % count or set(heads.values()) != {count} or group.blocks > 1:
        return
    width = group.channels // count
    counts = tuple((name, key, width) for key in heads)
    group = replace(group, unit=width, least=FEWEST_HEADS * width)
    yield replace(group, counts=counts)
    wholes = tuple((name, key, 1) for key, value in numbers.items() if value == group.channels and key not in heads)
    if wholes:
        yield replace(group, counts=counts + wholes)


def _attention(module: nn.Module, group: ChannelGroup) -> str | None:
    """Return the name of the module that holds all layers whose outputs these are and counts heads, if there is one."""
    found = {name.rpartition(".")[0] for name in group.outputs}
    if len(found) != 1:
        return None
    holder = found.pop()
    return holder if any(is_heads(key) for _, key, _ in numbers_of(module, [holder])) else None
