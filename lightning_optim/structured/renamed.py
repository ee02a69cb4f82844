"""The names of groups of channels after layers moved or were removed."""

from collections.abc import Iterable, Mapping

from lightning_optim.change import Changed
from lightning_optim.structured.groups import ChannelGroup

__all__ = ["renamed_groups"]


def renamed_groups(
    names: Iterable[str], groups: Mapping[str, ChannelGroup], changed: Changed, prefix: str = ""
) -> dict[str, str]:
    """Return the names that groups may have now -> the names that they had.

    A group is named by one of the layers whose outputs it holds; if that is removed, another one names it.

    Args:
        names: The groups' names before.
        groups: The groups that are known, by these names.
        changed: What became of the model's layers.
        prefix: What the groups' names begin with in the whole model; empty or ending in a dot.
    """
    renamed: dict[str, str] = {}
    for name in names:
        members = groups[name].members if name in groups else ()
        for layer in (name, *(member.layer for member in members if member.side == "out")):
            new = changed.layer(prefix + layer)
            if new is not None:
                renamed.setdefault(new.removeprefix(prefix), name)
            if new is not None and layer == name:
                break
    return renamed
