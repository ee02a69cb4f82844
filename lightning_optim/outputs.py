"""The tensors in a forward's output: the one place that looks into tuples, dicts, dataclasses and other objects."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lightning_optim._upstream import tree_leaves

__all__ = ["output_fields", "output_tensors"]

_OPAQUE = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType)


def output_fields(output: Any, *, objects: bool = True) -> dict[str, Any] | None:
    """Return the named parts of an output.

    Args:
        output: The output of a forward.
        objects: Whether the attributes of any other object count too; otherwise only those of a mapping, a
            dataclass, a NamedTuple or a namespace.

    Returns:
        The parts in order; None for a tensor, a plain sequence, a number, ...

    Examples:
        >>> output_fields(SimpleNamespace(logits=1, hidden=2))
        {'logits': 1, 'hidden': 2}
        >>> output_fields((1, 2)) is None
        True
    """
    if isinstance(output, _OPAQUE):
        return None
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
    elif isinstance(output, tuple):
        names = list(getattr(output, "_fields", ()))
    elif isinstance(output, SimpleNamespace) or (objects and hasattr(output, "__dict__")):
        names = list(vars(output))
    elif objects:  # no __dict__; numbers, strings and lists have no slots either
        slots = getattr(type(output), "__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
    else:
        return None
    return {name: getattr(output, name) for name in names if hasattr(output, name)} or None


def output_tensors(output: Any, *, objects: bool = True) -> list[Tensor]:
    """Return every tensor in an output: a tensor, or any nesting of sequences, mappings, dataclasses and objects.

    Args:
        output: The output of a forward.
        objects: As in :func:`output_fields`.

    Returns:
        The tensors in the order of their parts; one that occurs twice is returned twice.

    Examples:
        >>> from torch import zeros
        >>> [t.shape for t in output_tensors({"logits": zeros(2), "hidden": [SimpleNamespace(last=zeros(3))]})]
        [torch.Size([2]), torch.Size([3])]
    """
    return list(_tensors(output, objects, ()))


def _tensors(output: Any, objects: bool, above: tuple[int, ...]) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in above:  # an object may lead back to itself
            sequence = isinstance(leaf, (list, tuple)) and not hasattr(leaf, "_fields")  # a subclass: a leaf to pytrees
            parts = leaf if sequence else (output_fields(leaf, objects=objects) or {}).values()
            for part in parts:
                yield from _tensors(part, objects, (*above, id(leaf)))
