"""Removal of blocks from a model, for good or for the time of a ``with`` block."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_optim.checkpoint import plan_of
from lightning_optim.depth.configs import counts_of, numbers_of
from lightning_optim.structure import change_configs, children_of

__all__ = ["BlockRemoval", "keys_left", "without"]

_NUMBERED = re.compile(r"(.*?)(\d+)$")


@dataclass(frozen=True)
class BlockRemoval:
    """A removal of blocks as a change of the whole model (:data:`lightning_optim.change.Change`).

    Blocks that stay move up, and what numbers or counts them follows: attributes such as ``layer_idx``, the counts of
    the module around, and the configuration. The plan of what it is applied to follows.

    Attributes:
        places: Stack -> places of the blocks that are removed, by its present name and order.
    """

    places: Mapping[str, Sequence[int]]

    def __call__(self, root: nn.Module) -> None:
        """Remove the blocks from a model, or from an averaged copy of it."""
        plan = plan_of(root)
        changes = _follow(root, self.places)
        for stack in self.places:
            plan.track(stack)
        for name, attributes in changes.items():
            plan.track(name, *attributes)
        configs: dict[nn.Module, dict[str, Any]] = {}
        for name, attributes in changes.items():
            layer = root.get_submodule(name)
            for attribute, value in attributes.items():
                if "." in attribute:
                    configs.setdefault(layer, {})[attribute] = value
                else:
                    setattr(layer, attribute, value)
        for stack, places in self.places.items():
            _drop(root.get_submodule(stack), places)
        change_configs(root, configs)


@contextmanager
def without(
    root: nn.Module, places: Mapping[str, Sequence[int]], stand_ins: Mapping[nn.Module, nn.Module] | None = None
) -> Iterator[None]:
    """Remove blocks from a model inside the ``with`` block, and put them back.

    Args:
        root: A model of one's own: its configuration is changed in place.
        places: As for :class:`BlockRemoval`.
        stand_ins: Block -> the module that takes its place for that time.
    """
    undo: list[tuple[Any, str, Any]] = []
    held: list[tuple[nn.Module, dict[str, Any]]] = []
    stand_ins = stand_ins or {}
    try:
        for name, attributes in _follow(root, places).items():
            for attribute, value in attributes.items():
                holder, _, leaf = attribute.rpartition(".")
                owner: Any = root.get_submodule(name)
                owner = getattr(owner, holder) if holder else owner
                undo.append((owner, leaf, getattr(owner, leaf)))
                setattr(owner, leaf, value)
        stacks = {id(layer): layer for layer in root.modules() if stand_ins.keys() & set(layer._modules.values())}
        stacks |= {id(layer): layer for layer in map(root.get_submodule, places)}
        for layer in stacks.values():
            held.append((layer, dict(layer._modules)))
        for stack, gone in places.items():
            _drop(root.get_submodule(stack), gone)
        for layer in stacks.values():
            for key, block in layer._modules.items():
                if block is not None and block in stand_ins:
                    layer._modules[key] = stand_ins[block]
        yield
    finally:
        for layer, modules in held:
            layer._modules.clear()
            layer._modules.update(modules)
        for owner, leaf, value in reversed(undo):
            setattr(owner, leaf, value)


def _follow(root: nn.Module, places: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Return what follows a removal, by the present name of the module that holds the attribute."""
    changes: dict[str, dict[str, Any]] = {}
    for stack, gone in places.items():
        blocks = len(children_of(root.get_submodule(stack)))
        kept = [place for place in range(blocks) if place not in gone]
        for found in (numbers_of(root, stack, kept), counts_of(root, stack, kept)):
            for name, attributes in found.items():
                _merge(changes.setdefault(name, {}), attributes)
    return changes


def _merge(changes: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add attributes; two stacks change other entries of the same list of stages."""
    for name, value in more.items():
        before = changes.get(name)
        both = isinstance(before, (list, tuple)) and isinstance(value, (list, tuple)) and len(before) == len(value)
        changes[name] = type(value)(map(min, before, value)) if both and name.endswith("depths") else value  # type: ignore[arg-type]


def _drop(stack: nn.Module, places: Sequence[int]) -> None:
    blocks = list(children_of(stack).items())
    kept = [pair for place, pair in enumerate(blocks) if place not in places]
    keys = keys_left([key for key, _ in blocks], len(kept))
    names = [key for key, _ in kept] if keys is None else keys
    stack._modules.clear()
    stack._modules.update({key: block for key, (_, block) in zip(names, kept, strict=True)})


def keys_left(keys: Sequence[str], left: int) -> list[str] | None:
    """Return the names of a stack with fewer blocks; None where they do not count up, so that each keeps its own.

    Examples:
        >>> keys_left(["0", "1", "2"], 2)
        ['0', '1']
        >>> keys_left(["encoder_layer_1", "encoder_layer_2", "encoder_layer_3"], 2)
        ['encoder_layer_1', 'encoder_layer_2']
        >>> keys_left(["stem", "body", "head"], 2)
    """
    parsed = [_NUMBERED.fullmatch(key) for key in keys]
    if not all(parsed):
        return None
    stems = {match[1] for match in parsed if match}
    numbers = [int(match[2]) for match in parsed if match]
    if len(stems) > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return list(keys[:left])
