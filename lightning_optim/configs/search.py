"""The search for numbers of a configuration: one is changed, and what changes in the built model is what it counts."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_optim.configs.models import (
    Key,
    Number,
    Shapes,
    build,
    config_failures,
    config_with,
    is_config,
    settings_of,
    value_at,
)
from lightning_optim.errors import first_line
from lightning_optim.structure import PLACE

__all__ = ["LISTED", "Count", "Effect", "Search", "tiers_of"]

LISTED = "_lightning_optim_listed"
"""Attribute of a stack of blocks: the places in the user's class of the blocks that the configuration lists now."""

MOST_BUILDS = 400
"""Models built in one search, at most; one takes 2 to 3 ms a block."""

FEW_BLOCKS = 2
"""Blocks of a stack in which widths are searched; what is found is proven for all."""

MOST_BRANCHES = 4
"""Explanations of a shape that are followed, the best first."""


@dataclass(frozen=True)
class Count:
    """What a number of a configuration counts.

    Attributes:
        value: The number; None if it is not set.
        dimensions: (parameter, dimension) -> how much that dimension grows when the number grows by one.
        stacks: Container of blocks -> blocks that are added when the number grows by one.
        attributes: (module, attribute) -> growth of a number kept on a module, such as ``num_heads``.
    """

    value: Number | None
    dimensions: dict[Key, float] = field(default_factory=dict)
    stacks: dict[str, float] = field(default_factory=dict)
    attributes: dict[tuple[str, str], float] = field(default_factory=dict)


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Number | None]]:
    """Yield the numbers of a configuration, of lists and configurations inside it too, and what is None."""
    for key, value in vars(config).items():
        if key.startswith("_") or key.endswith("_token_id"):
            continue
        path = f"{prefix}{key}"
        if value is None or type(value) in (int, float):
            yield path, value
        elif is_config(value):
            yield from _fields(value, f"{path}.")
        elif isinstance(value, (list, tuple)):
            yield from ((f"{path}.{i}", item) for i, item in enumerate(value) if type(item) in (int, float))


def tiers_of(config: Any) -> list[list[str]]:
    """Return the paths of all numbers in the order in which they are tried: plain integers, lists, everything else."""
    tiers: list[list[str]] = [[], [], []]
    for path, value in _fields(config):
        is_item = path.rpartition(".")[2].isdecimal()
        tiers[2 if type(value) is not int else int(is_item)].append(path)
    return tiers


def _neighbors(value: Number) -> list[Number]:
    """Return other values of a number to try; classes accept few of them, for example multiples of the heads."""
    if type(value) is float:
        return [value + 1.0, value * 2, value / 2]
    others = (value + 1, value - 1, value * 2, value // 2, value * 3, 1)
    return list(dict.fromkeys(other for other in others if other > 0 and other != value))


@dataclass(frozen=True)
class Effect:
    """What a number counts, measured between two values; ``at`` and ``shapes`` are the first of them."""

    at: Number
    shapes: Shapes
    count: Count

    def implied(self, key: Any, live: Shapes) -> Number | None:
        """Return the value that a dimension, stack or attribute of the live model asks for."""
        for slopes, ours, theirs in (
            (self.count.dimensions, live.dimensions, self.shapes.dimensions),
            (self.count.attributes, live.numbers, self.shapes.numbers),
            (self.count.stacks, live.stacks(), self.shapes.stacks()),
        ):
            if key in slopes and key in ours and key in theirs:
                value = self.at + (ours[key] - theirs[key]) / slopes[key]
                if type(self.at) is float:
                    return value
                return int(value) if value > 0 and value == int(value) else None
        return None


def _measured(value: Number | None, at: Number, shapes: Shapes, other: Number, others: Shapes) -> Effect:
    step = other - at

    def slopes(ours: Mapping[Any, Number], theirs: Mapping[Any, Number]) -> dict[Any, float]:
        return {k: (theirs[k] - v) / step for k, v in ours.items() if k in theirs and theirs[k] != v}

    dimensions = {key: slope for key, slope in slopes(shapes.dimensions, others.dimensions).items() if key[1] >= 0}
    stacks = slopes(shapes.stacks(), others.stacks())
    return Effect(at, shapes, Count(value, dimensions, stacks, slopes(shapes.numbers, others.numbers)))


class Search:
    """Builds a model's class from changed configurations, each once.

    Args:
        model: The live model.
        config: What is changed.
        kept: Stack -> indices of the listed blocks that are left.
        live: Its shapes; by default all of them.

    Attributes:
        reason: Why the class refused the last configuration that it refused.
        best: The values with which the least differed so far.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        kept: Mapping[str, Sequence[int]] | None = None,
        live: Shapes | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.kept = kept or {}
        self.live = Shapes.of(model) if live is None else live
        self.reason = ""
        self.best: dict[str, Any] = {}
        self._built: dict[str, Shapes | None] = {}
        self._effects: dict[tuple[str, str], Effect | None] = {}

    def shapes(self, values: Mapping[str, Any]) -> Shapes | None:
        """Return what the class makes of some values; None where it refuses them."""
        key = repr(sorted(values.items()))
        if key not in self._built:
            if len(self._built) >= MOST_BUILDS:
                return None
            try:
                self._built[key] = Shapes.of(build(self.model, config_with(self.config, values)))
            except config_failures() as error:
                self.reason = first_line(error)
                self._built[key] = None
        return self._built[key]

    def effect(self, path: str, values: Mapping[str, Any]) -> Effect | None:
        """Return what a number counts, near some values; None if no other value of it can be built."""
        key = (path, repr(sorted(values.items())))
        if key not in self._effects:
            self._effects[key] = self._probed(path, values)
        return self._effects[key]

    def _probed(self, path: str, values: Mapping[str, Any]) -> Effect | None:
        now = values[path] if path in values else value_at(self.config, path)
        pairs = ((now, other) for other in _neighbors(now)) if now is not None else ((16, 17), (16, 32))
        for at, other in pairs:
            shapes = self.shapes(values if now is not None else {**values, path: at})
            others = None if shapes is None else self.shapes({**values, path: other})
            if shapes is not None and others is not None:
                return _measured(now, at, shapes, other, others)
        return None

    def moves(self, paths: Sequence[str], values: Mapping[str, Any]) -> list[tuple[int, dict[str, Any], set[Key]]]:
        """Return the changes of one number that explain some of what still differs, the best first.

        Returns:
            (what differs afterwards, the values, what the number explains).
        """
        base = self.shapes(values)
        if base is None:
            return []
        differing, found = self.live.differing(base), []
        for path in paths:
            effect = None if path in values else self._relevant(path, values, differing)
            if effect is None:
                continue
            explained = {key for key in effect.count.dimensions if key in differing}
            votes = Counter(effect.implied(key, self.live) for key in [*explained, *effect.count.stacks])
            for value, _ in [vote for vote in votes.most_common() if vote[0] not in (None, effect.count.value)][:2]:
                best = self._best(path, value, effect, values, len(differing))
                if best is not None:
                    found.append((*best, explained | {(stack, -2) for stack in effect.count.stacks}))
        return sorted(found, key=lambda move: move[0])

    def _relevant(self, path: str, values: Mapping[str, Any], differing: set[Key]) -> Effect | None:
        """Return what a number counts near some values, if it may count something that differs."""
        first = self.effect(path, {})
        if first is not None and not first.count.stacks and first.count.dimensions.keys().isdisjoint(differing):
            return None  # most numbers, which are measured once
        return self.effect(path, values)

    def _best(
        self, path: str, value: Any, effect: Effect, values: Mapping[str, Any], before: int
    ) -> tuple[int, dict[str, Any]] | None:
        """Return the values with a number changed, if less differs then; silent numbers follow where they must."""
        tried = [{**values, path: other} for other in _rounded(value, effect)]
        if effect.count.stacks:
            tried = [{**tried[0], **self._sliced(path, int(value), effect)}]
        for candidate in tried:
            for full in (candidate, {**self.companions(values), **candidate}):
                shapes = self.shapes(full)
                after = before if shapes is None else len(self.live.differing(shapes))
                if after < before:
                    return after, full
                if shapes is not None:
                    break
        return None

    def companions(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return numbers without a shape (heads of BERT) that modules of the live model show changed."""
        found = {}
        for path in tiers_of(self.config)[0]:
            effect = None if path in values else self.effect(path, {})
            value = None if effect is None else self.shown(effect)
            if value is not None:
                found[path] = value
        return found

    def shown(self, effect: Effect) -> Number | None:
        """Return the value that most of the attributes that differ ask for."""
        differing = self.live.differing_numbers(effect.shapes) & effect.count.attributes.keys()
        votes = Counter(effect.implied(key, self.live) for key in differing)
        votes.pop(None, None)
        return votes.most_common(1)[0][0] if votes else None

    def _sliced(self, path: str, blocks: int, effect: Effect) -> dict[str, Any]:
        """Return the lists that have an item for each block, with those of the blocks that are left."""
        lists = self._lists(path, int(effect.at), {}) if blocks < effect.at else []
        if not lists:
            return {}
        stack = next(iter(effect.count.stacks))
        kept = self.kept.get(stack) or _kept_places(self.model, stack, int(effect.at)) or self._alike(stack)
        values = {name: value_at(self.config, name) for name in lists}
        return {name: type(items)(items[place] for place in kept) for name, items in values.items()}

    def _lists(self, path: str, blocks: int, values: Mapping[str, Any]) -> list[str]:
        """Return the lists beside a number of blocks that have an item for each of them."""
        owner = path.rpartition(".")[0]
        holder = self.config if not owner else value_at(self.config, owner)
        names = [] if isinstance(holder, (list, tuple)) else [name for name in vars(holder) if not name.startswith("_")]
        paths = [f"{owner}.{name}" if owner else name for name in names]
        lists = {name: self._value(name, values) for name in paths}
        return [
            name
            for name, items in lists.items()
            if isinstance(items, (list, tuple)) and len(items) == blocks and self._needs_all(name, values, items)
        ]

    def _value(self, path: str, values: Mapping[str, Any]) -> Any:
        return values[path] if path in values else value_at(self.config, path)

    def _needs_all(self, path: str, values: Mapping[str, Any], items: Sequence[Any]) -> bool:
        """Whether class or configuration reject a list with an item less, as one with an item for each block."""
        if self.shapes({**values, path: items[:-1]}) is None:
            return True
        shorter = config_with(self.config, {**values, path: items[:-1]})
        try:
            type(shorter).from_dict(shorter.to_dict())
        except config_failures():
            return True
        return False

    def _alike(self, stack: str) -> list[int]:
        """Return the first listed blocks that are of the kinds of the live ones, in order."""
        listed = [settings_of(block) for block in build(self.model, self.config).get_submodule(stack).children()]
        left = [settings_of(block) for block in self.model.get_submodule(stack).children()]
        telling = {key for key in listed[0] if any(other.get(key) != listed[0][key] for other in listed)}
        kept: list[int] = []
        for place, settings in enumerate(listed):
            wanted = left[len(kept)] if len(kept) < len(left) else None
            if wanted is not None and all(settings.get(key) == wanted.get(key) for key in telling):
                kept.append(place)
        return kept if len(kept) == len(left) else list(range(len(left)))

    def counting_blocks(self) -> list[str]:
        """Return the numbers that count the blocks of a stack, told by their values first."""
        base = self.shapes({})
        sizes = set() if base is None else set(base.stacks().values())
        effects = {
            path: self.effect(path, {}) for path, value in _fields(self.config) if type(value) is int and value in sizes
        }
        return [path for path, effect in effects.items() if effect is not None and effect.count.stacks]

    def shallow(self, blocks: Mapping[str, Any]) -> "Search | None":
        """Return a search over the first two blocks of each stack, which costs a fraction of one over all.

        Args:
            blocks: Values with which the class makes as many blocks as the live model has.

        Returns:
            None if that is no smaller, or blocks differ in width.
        """
        values = dict(blocks)
        stacks: set[str] = set()
        for path in self.counting_blocks():
            effect = self.effect(path, {})
            now = blocks.get(path, value_at(self.config, path))
            if effect is not None and now > FEW_BLOCKS:
                stacks.update(effect.count.stacks)
                lists = {name: self._value(name, blocks) for name in self._lists(path, now, blocks)}
                values |= {path: FEW_BLOCKS, **{name: items[:FEW_BLOCKS] for name, items in lists.items()}}
        if not stacks or self.uneven():
            return None
        live = self.live.first_blocks(stacks, FEW_BLOCKS)
        search = Search(self.model, config_with(self.config, values), live=live)
        return None if search.shapes({}) is None else search

    def uneven(self) -> set[Key]:
        """Return the dimensions that have more sizes over the blocks of the live model than over those of the built.

        Their names are those of :func:`without_blocks`.
        """
        base = self.shapes({})
        built = {} if base is None else base.sizes()
        return {key for key, sizes in self.live.sizes().items() if len(sizes) > max(1, len(built.get(key, ())))}

    def explore(self, paths: Sequence[str], values: dict[str, Any], solved: list[dict[str, Any]]) -> dict[str, Any]:
        """Follow the explanations of what differs; collect the complete ones and return the best incomplete one."""
        shapes = self.shapes(values)
        if shapes is None:
            return values
        if not self.live.differing(shapes):
            if values not in solved:
                solved.append(values)
            return values
        moves = self.moves(paths, values)
        explained = Counter(key for _, _, keys in moves for key in keys)
        forced = [move for move in moves if any(explained[key] == 1 for key in move[2])]
        best = values
        self.best = min(self.best, values, key=self.remaining)
        for _, further, _ in forced[:1] or moves[:MOST_BRANCHES]:
            best = min(best, self.explore(paths, further, solved), key=self.remaining)
        return best

    def remaining(self, values: Mapping[str, Any]) -> int:
        """Return how many dimensions differ from those of the live model."""
        shapes = self.shapes(values)
        return sys.maxsize if shapes is None else len(self.live.differing(shapes))

    def numbers_differing(self, values: Mapping[str, Any]) -> int:
        """Return how many numbers on modules are not those of the live model."""
        shapes = self.shapes(values)
        return sys.maxsize if shapes is None else len(self.live.differing_numbers(shapes))

    def with_shown(self, paths: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
        """Add numbers that shapes leave open, as far as modules of the live model then hold more equal numbers.

        Heads of BERT show in no shape; those of a class that divides its width by them need other numbers changed with
        them.
        """
        for path in paths:
            shapes = self.shapes(values)
            if shapes is None or not self.live.differing_numbers(shapes):
                return values
            effect = None if path in values else self.effect(path, values)
            value = None if effect is None else self.shown(effect)
            if value is not None:
                solved = [values]
                self.explore(paths, {**values, path: value}, solved)
                values = min(solved, key=self.numbers_differing)
        return values


def _rounded(value: Number, effect: Effect) -> list[Number]:
    """Return a value; a ratio in the forms whose product may be cut off to the right integer."""
    if type(value) is int or not effect.count.dimensions:
        return [value]
    slope = max(effect.count.dimensions.values(), key=abs)
    return [round(value, 3), value, value + 0.5 / slope]


def _kept_places(model: nn.Module, stack: str, listed: int) -> list[int] | None:
    """Return which of the listed blocks are left, where a plan watches the stack."""
    container = model.get_submodule(stack)
    places = [vars(block).get(PLACE) for block in container.children()]
    before = list(vars(container).get(LISTED, map(str, range(listed))))
    return [before.index(place) for place in places] if all(place in before for place in places) else None
