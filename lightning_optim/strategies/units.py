"""Finds the units of fully sharded training: the parts of a model that are gathered together.

A device holds a whole unit while it computes, so a unit should be a repeated block: small compared with the model, and
large enough to be worth the latency of its collective.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_optim.modules import COMPILED_CHILD, without_compiler
from lightning_optim.sharding import own_class

__all__ = ["Units", "find_units"]

NamedModules = list[tuple[str, nn.Module]]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NO_UNIT = (nn.ModuleList, nn.ModuleDict)  # they have no forward, so nothing would gather them
_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""They read the weights of their children directly, so that nothing would gather those."""
LARGEST_BLOCK = 1 / 2
"""A repeated class makes units if none of its instances holds a larger fraction of the model."""
LEAST_COVERED = 1 / 20
"""A further repeated class makes units if its instances together hold at least this fraction of the model."""
LARGEST_BY_SIZE = 1 / 8
SMALLEST_BY_SIZE = 1 / 50


@dataclass(frozen=True)
class Units:
    """The units of a model.

    Attributes:
        named: Dotted names and modules, innermost first: the order in which they are sharded.
        how: How they were found, for the log.
        covered: Fraction of the parameters in units; the rest belongs to the root.
    """

    named: NamedModules
    how: str
    covered: float

    def __str__(self) -> str:
        classes: dict[str, int] = defaultdict(int)
        for _, module in self.named:
            classes[_class_of(module).__name__] += 1
        counted = ", ".join(f"{count} x {name}" for name, count in classes.items()) or "none, the root alone"
        return f"{counted} ({self.how}); they hold {self.covered:.1%} of the parameters"


def find_units(module: nn.Module, units: Literal["auto"] | Sequence[str] = "auto") -> Units:
    """Return the modules that are sharded as units.

    The first of these that applies: the given names; the classes in ``_no_split_modules`` (Hugging Face); classes with
    several instances, none of which holds more than half of the model; parts by size. The rest of the model is divided
    by size too, unless names were given. A module that shares a parameter with a module outside of it stays in the
    root.

    Args:
        module: The whole model.
        units: ``"auto"``, or class names and dotted module names.

    Returns:
        The units; none for a model that cannot be divided.

    Raises:
        ValueError: If the module has no parameters, or a given name is neither a class nor a module of it.
    """
    total = _size(module)
    if not total:
        raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to shard or train.")
    if units == "auto":
        found, how = _automatic(module, total)
    else:
        found, how = _given(module, units), "as given"
    shared = _shared_parameters(module)
    kept = [(name, part) for name, part in found if not _leaks(part, shared)]
    kept.sort(key=lambda unit: -unit[0].count("."))
    return Units(kept, how, _size(nn.ModuleList([part for _, part in kept])) / total)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _given(module: nn.Module, units: Sequence[str]) -> NamedModules:
    if isinstance(units, str):
        raise ValueError(f"`units` must be 'auto' or a list of class or module names, got {units!r}.")
    named = _parts(module)
    for wanted in units:
        if not any(wanted in (name, _class_of(part).__name__) for name, part in named):
            classes = sorted({_class_of(part).__name__ for _, part in named})
            raise ValueError(
                f"units: {wanted!r} is neither a class nor a module of {type(module).__name__}. Classes with "
                f"parameters: {', '.join(classes)}."
            )
    return [(name, part) for name, part in named if {name, _class_of(part).__name__} & set(units)]


def _parts(module: nn.Module) -> NamedModules:
    """Return the parts with parameters; a compiled part is represented by torch.compile's wrapper."""
    named = [(name, part) for name, part in module.named_modules() if name and _size(part)]
    return [(name, part) for name, part in named if not name.endswith(COMPILED_CHILD)]


def _class_of(part: nn.Module) -> type[nn.Module]:
    return own_class(without_compiler(part))


def _automatic(module: nn.Module, total: int) -> tuple[NamedModules, str]:
    declared = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    opaque = [name for name, part in module.named_modules() if isinstance(part, _OPAQUE)]
    named = [
        (name, part)
        for name, part in module.named_modules()
        if name and _size(part) and not any(_is_below(name, above) for above in opaque)
    ]
    found = [(name, part) for name, part in named if _class_of(part).__name__ in declared]
    how = "_no_split_modules"
    if not found:
        found, classes = _repeated(named, total)
        how = f"repeated: {', '.join(classes)}" if classes else "by size"
    found += [unit for name, child in module.named_children() for unit in _by_size(name, child, found, total)]
    return found, how


def _repeated(named: NamedModules, total: int) -> tuple[NamedModules, list[str]]:
    """Return the outermost instances of repeated classes, starting with the class that covers most."""
    by_class: dict[type[nn.Module], NamedModules] = defaultdict(list)
    for name, part in named:
        if any(True for _ in part.children()) and not isinstance(part, _CONTAINERS):
            by_class[_class_of(part)].append((name, part))
    candidates = []
    for cls, instances in by_class.items():
        outer = [(n, m) for n, m in instances if not any(_is_below(n, other) for other, _ in instances)]
        sizes = [_size(part) for _, part in outer]
        if len(outer) > 1 and max(sizes) <= LARGEST_BLOCK * total:
            candidates.append((round(sum(sizes) / total, 3), len(outer), cls.__name__, outer))
    candidates = [one for one in candidates if not _lies_in_others(one[3], [each[3] for each in candidates])]
    candidates.sort(key=lambda candidate: (-candidate[0], -candidate[1], candidate[2]))
    found: NamedModules = []
    classes = []
    for _, _, name, outer in candidates:
        free = [(n, m) for n, m in outer if not any(_related(n, unit) for unit, _ in found)]
        if len(free) > 1 and sum(_size(part) for _, part in free) >= LEAST_COVERED * total:
            found += free
            classes.append(name)
    return found, classes


def _lies_in_others(instances: NamedModules, candidates: Sequence[NamedModules]) -> bool:
    """Whether all instances of a class lie in other repeated ones, as attention lies in encoder and decoder layers."""
    others = [name for candidate in candidates if candidate is not instances for name, _ in candidate]
    return all(any(_is_below(name, other) for other in others) for name, _ in instances)


def _by_size(name: str, part: nn.Module, units: NamedModules, total: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield units of the rest of the model, divided while they are large; small parts stay in the root."""
    size = _size(part)
    if any(name == unit or _is_below(name, unit) for unit, _ in units) or size < SMALLEST_BY_SIZE * total:
        return
    divided = any(_is_below(unit, name) for unit, _ in units)
    children = list(part.named_children())
    small_enough = size <= LARGEST_BY_SIZE * total or not children or isinstance(part, _OPAQUE)
    if small_enough and not divided and not isinstance(part, _NO_UNIT):
        yield name, part
        return
    for child_name, child in children:
        yield from _by_size(f"{name}.{child_name}", child, units, total)


def _is_below(name: str, above: str) -> bool:
    return name.startswith(f"{above}.")


def _related(name: str, other: str) -> bool:
    return name == other or _is_below(name, other) or _is_below(other, name)


def _shared_parameters(module: nn.Module) -> dict[int, set[nn.Module]]:
    """Return the modules that hold a parameter, by its id, where several do."""
    holders: dict[int, set[nn.Module]] = defaultdict(set)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            holders[id(parameter)].add(part)
    return {parameter: parts for parameter, parts in holders.items() if len(parts) > 1}


def _leaks(part: nn.Module, shared: dict[int, set[nn.Module]]) -> bool:
    """Whether a module outside of the part holds one of its parameters."""
    inside = set(part.modules())
    return any(not shared[id(p)] <= inside for p in part.parameters() if id(p) in shared)
