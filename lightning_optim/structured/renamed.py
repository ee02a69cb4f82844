"""The names of groups of channels after layers moved or were removed."""

from collections.abc import Iterable, Mapping, Sequence

from lightning_optim.change import Changed

__all__ = ["renamed_groups"]


def renamed_groups(
    names: Iterable[str], outputs: Mapping[str, Sequence[str]], changed: Changed, prefix: str = ""
) -> dict[str, str]:
    """Return the names that groups may have now -> the names that they had.

    A group is named by one of the layers whose outputs it holds; if that is removed, another one names it.

    Args:
        names: The groups' names before.
        outputs: The layers whose outputs each group holds, by these names.
        changed: What became of the model's layers.
        prefix: What the groups' names begin with in the whole model; empty or ending in a dot.
    """
    renamed: dict[str, str] = {}
    for name in names:
        for layer in (name, *outputs.get(name, ())):
            new = changed.layer(prefix + layer)
            if new is not None:
                renamed.setdefault(new.removeprefix(prefix), name)
            if new is not None and layer == name:
                break
    return renamed
