"""Layers by their place in a stack: ``"model.layers.-1"`` is the last block, however many there are."""

import re
from collections.abc import Callable

from torch import nn

from lightning_optim.modules import without_compiler
from lightning_optim.structure import children_of

__all__ = ["followed", "is_from_end", "plain_name"]

_FROM_END = re.compile(r"-\d+")
_STACKS = (nn.ModuleList, nn.Sequential)


def is_from_end(part: str) -> bool:
    """Whether a part of a dotted name is a place that counts from the end of a stack.

    Examples:
        >>> [is_from_end(part) for part in ("-1", "1", "layers")]
        [True, False, False]
    """
    return _FROM_END.fullmatch(part) is not None


def plain_name(root: nn.Module, name: str, argument: str) -> str:
    """Return a layer's name as ``named_modules`` has it now: places from the end become the names of these blocks.

    Args:
        root: The student or a teacher.
        name: Dotted name, in which negative numbers count from the end of a ``ModuleList`` or ``Sequential``.
        argument: Where the name comes from, for the error.

    Raises:
        ValueError: If a place is out of range, or counts from the end of what is no stack.

    Examples:
        >>> plain_name(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "-2", "feature")
        '0'
    """
    parts: list[str] = []
    module: object = root
    for part in name.split("."):
        stack = without_compiler(module) if isinstance(module, nn.Module) else None
        where = ".".join(parts) or type(root).__name__
        if is_from_end(part) and stack is not None and not isinstance(stack, _STACKS):
            raise ValueError(
                f"{argument}: {name!r} counts from the end of {where}, which is no ModuleList or Sequential but "
                f"{type(stack).__name__}."
            )
        if isinstance(stack, _STACKS) and re.fullmatch(r"-?\d+", part):
            blocks = list(children_of(stack))
            if is_from_end(part):
                if int(part) < -len(blocks):
                    raise ValueError(_out_of_range(argument, name, where, len(blocks)))
                part = blocks[int(part)]
            elif part not in blocks and int(part) >= len(blocks):
                raise ValueError(_out_of_range(argument, name, where, len(blocks)))
        parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def _out_of_range(argument: str, name: str, where: str, blocks: int) -> str:
    places = f"places 0 to {blocks - 1}, or -1 to -{blocks} from the end" if blocks else "no place"
    return f"{argument}: {name!r} is out of range: {where} holds {blocks} layers, {places}."


def followed(name: str, present: Callable[[str], str | None]) -> str | None:
    """Return a layer's name after layers moved; None if it is gone.

    A place from the end stays as it is: it means the block that is there now.

    Args:
        name: The name before.
        present: Returns the present name of a layer that was there before, None if it is gone.

    Examples:
        >>> followed("parts.2.layers.-1.mlp", {"parts.2.layers": "parts.1.layers"}.get)
        'parts.1.layers.-1.mlp'
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if is_from_end(part)), len(parts))
    now = present(".".join(parts[:first]))
    return None if now is None else ".".join(part for part in (now, *parts[first:]) if part)
