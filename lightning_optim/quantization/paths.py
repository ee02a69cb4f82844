"""Paths from one layer to another, which stay the same when both move."""

from torch import nn

__all__ = ["found_from", "relative_path"]


def relative_path(name: str, other: str) -> str:
    """Return the path from one dotted name to another: a dot for each module upwards.

    Examples:
        >>> relative_path("blocks.0.conv", "blocks.0.norm"), relative_path("stem.0", "norm")
        ('.norm', '..norm')
    """
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return "." * (len(parts) - shared) + ".".join(others[shared:])


def found_from(root: nn.Module, name: str, path: str) -> nn.Module | None:
    """Return the module at a path from the layer ``name``; None if there is none."""
    rest = path.lstrip(".")
    upwards = len(path) - len(rest)
    parts = name.split(".")
    if upwards > len(parts):
        return None
    try:
        return root.get_submodule(".".join([*parts[: len(parts) - upwards], rest]))
    except AttributeError:
        return None
