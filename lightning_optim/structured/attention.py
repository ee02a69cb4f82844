"""Attention heads: projections of hand-written attention lose whole heads, and the module's counts of them follow."""

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lightning_optim.structured.groups import ChannelGroup

__all__ = ["FEWEST_HEADS", "as_heads", "in_attention"]

FEWEST_HEADS = 2
"""An attention keeps this many heads: with one it could not be told from other layers when a run is resumed."""

_COUNT = re.compile(r"h|(n|num|n_|num_)?(attention_|attn_)?heads?")
_SHARED_COUNT = re.compile(r".*(kv|key_value|query_groups?).*")


def in_attention(module: nn.Module, group: ChannelGroup) -> bool:
    """Tell whether the layers whose outputs these are belong to one module that counts heads."""
    return _attention(module, group) is not None


def as_heads(module: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """Yield the group as one that loses whole heads, in the ways that the module may count them.

    The layers whose outputs leave together are the queries, keys and values; the module that holds them has an
    attribute such as ``num_heads``. Heads are independent of each other, so removing some equals setting them to
    zero, and the check tells which way is right: only the number of heads follows, or attributes that hold the whole
    width as well (``embed_dim``, ``all_head_size``).

    Args:
        module: The model.
        group: Channels of any layers.

    Yields:
        Candidates to be checked; none where the heads cannot be told, or queries share their keys.
    """
    name = _attention(module, group)
    if name is None or any(member.index != tuple(range(group.channels)) for member in group.members):
        return  # no attention, or a fused projection
    numbers = {key: value for key, value in vars(module.get_submodule(name)).items() if type(value) is int}
    heads = {key: value for key, value in numbers.items() if _COUNT.fullmatch(key)}
    count = next(iter(heads.values()))
    shared = any(value != count for key, value in numbers.items() if _SHARED_COUNT.fullmatch(key))
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
    outputs = {member.layer for member in group.members if member.side == "out"}
    holders = {name.rpartition(".")[0] for name in outputs}
    if len(holders) != 1:
        return None
    holder = holders.pop()
    numbers = (key for key, value in vars(module.get_submodule(holder)).items() if type(value) is int)
    return holder if any(_COUNT.fullmatch(key) for key in numbers) else None
