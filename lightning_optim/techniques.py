"""The techniques that change a model in a running ``fit``: one row each.

Whatever has to know all techniques reads this table: the keys of a recipe and their windows, the order inside a step,
the events that a report marks, the tests of what every technique promises, and the documentation. A callback class is
named by its dotted path, so that the modules that define the callbacks can read the table too.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["TECHNIQUES", "Technique", "Techniques", "windows"]

RESERVED = frozenset(
    [
        "as_plain",
        "callbacks",
        "checkpoint",
        "description",
        "distillation",
        "load",
        "score",
        "stages",
        "techniques",
        "to_yaml",
        "wrap",
    ]
)
"""Public attributes of a Recipe, which has one for each technique too."""

GAP = 0.1
"""Fraction of the run before the first window and after each."""


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    Args:
        name: Key in a recipe, and its attribute there: a Python identifier.
        callback: A subclass of :class:`~lightning_optim.callbacks.base.CompressionCallback`, or its dotted path.
        first: The argument of the callback that a bare value in a recipe sets.
        window: The two arguments of the callback that hold start and end of its window; empty if it takes none.
        order: Where several techniques act in the same step, those with a lower order act first. The techniques of the
            package have 5 (blocks), 10 (channels), 15 (low rank), 20 (weights) and 30 (integers).
        logs: What the names of the metrics begin with that the callback logs at an event; by default the name and "/".

    Raises:
        TypeError: If ``callback`` is neither a class nor a dotted path, or ``order`` is no number.
        ValueError: If ``name`` cannot be an attribute of a recipe, ``window`` does not have two names, or the class has
            no argument of one of the names.

    Examples:
        >>> TECHNIQUES["weight_pruning"].first
        'sparsity'
    """

    name: str
    callback: type[Any] | str
    first: str
    window: tuple[str, ...] = ("start", "end")
    order: float = 100
    logs: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in RESERVED:
            raise ValueError(
                f"`name` of a technique must be a Python identifier that is no attribute of Recipe, got {self.name!r}."
            )
        if not isinstance(self.callback, type) and not (isinstance(self.callback, str) and "." in self.callback):
            raise TypeError(f"`callback` must be a class or its dotted path, got {self.callback!r}.")
        if isinstance(self.order, bool) or not isinstance(self.order, (int, float)):
            raise TypeError(f"`order` must be a number, got {self.order!r}.")
        object.__setattr__(self, "window", tuple(self.window))
        object.__setattr__(self, "logs", self.logs or f"{self.name}/")
        if len(self.window) not in (0, 2):
            raise ValueError(f"`window` must name two arguments, or be empty, got {self.window!r}.")
        if isinstance(self.callback, type):
            known = inspect.signature(self.callback).parameters
            missing = [name for name in (self.first, *self.window) if name not in known]
            if missing:
                raise ValueError(
                    f"{self.callback.__name__} has no argument {missing[0]!r}; its arguments are {', '.join(known)}."
                )

    @property
    def callback_class(self) -> type[Any]:
        """The class of the callback, imported when it is asked for."""
        if isinstance(self.callback, type):
            return self.callback
        module, _, name = self.callback.rpartition(".")
        found: type[Any] = getattr(import_module(module), name)
        return found


class Techniques(Mapping[str, Technique]):
    """Techniques by name, in the order in which they act."""

    def __init__(self) -> None:
        self._rows: dict[str, Technique] = {}

    def register(self, technique: Technique) -> Technique:
        """Add a technique, ours or a user's.

        Raises:
            TypeError: If it is no :class:`Technique`.
            ValueError: If the name is taken.
        """
        if not isinstance(technique, Technique):
            raise TypeError(
                f"a row of the table is a Technique(name, callback, first, window, order), got {technique!r}."
            )
        if technique.name in self._rows:
            raise ValueError(f"technique {technique.name!r} is already registered; choose another name.")
        self._rows[technique.name] = technique
        return technique

    def unregister(self, name: str) -> None:
        """Take a technique out of the table.

        Raises:
            KeyError: If there is none of that name.
        """
        del self._rows[name]

    def of(self, callback: object) -> Technique | None:
        """Return the technique of a callback, that of its nearest class; None without one. It imports nothing."""
        for cls in type(callback).__mro__:
            path = f"{cls.__module__}.{cls.__qualname__}"
            for technique in self._rows.values():
                if technique.callback is cls or technique.callback == path:
                    return technique
        return None

    def order_of(self, callback: object) -> float:
        """Return where a callback acts in a step; one whose class is not in the table acts last."""
        technique = self.of(callback)
        return max(row.order for row in self._rows.values()) if technique is None else technique.order

    def __getitem__(self, name: str) -> Technique:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._rows, key=lambda name: self._rows[name].order))

    def __len__(self) -> int:
        return len(self._rows)


TECHNIQUES = Techniques()
"""Rows in the order in which the techniques act; ``TECHNIQUES.register(Technique(...))`` adds one."""

TECHNIQUES.register(
    Technique(
        "depth_pruning",
        "lightning_optim.callbacks.depth_pruning.DepthPruning",
        first="pruning_ratio",
        order=5,
        logs="depth/",
    )
)
TECHNIQUES.register(
    Technique(
        "channel_pruning",
        "lightning_optim.callbacks.channel_pruning.ChannelPruning",
        first="pruning_ratio",
        order=10,
        logs="channels/",
    )
)
TECHNIQUES.register(
    Technique(
        "low_rank",
        "lightning_optim.callbacks.low_rank.LowRankFactorization",
        first="energy",
        order=15,
    )
)
TECHNIQUES.register(
    Technique(
        "weight_pruning",
        "lightning_optim.callbacks.weight_pruning.WeightPruning",
        first="sparsity",
        order=20,
        logs="pruning/",
    )
)
TECHNIQUES.register(
    Technique(
        "quantization",
        "lightning_optim.callbacks.quantization.QuantizationAwareTraining",
        first="weight_bits",
        window=("start", "freeze"),
        order=30,
    )
)


def windows(count: int) -> list[tuple[float, float]]:
    """Return the windows of techniques that share a run, as fractions of it.

    A tenth of the run comes before the first window and after each, for training and recovery (less with more than four
    techniques, whose windows take half of the run). Of the rest the last technique gets 3 parts, the one before it 4,
    and so on: earlier techniques change more.

    Args:
        count: How many techniques there are.

    Returns:
        ``(start, end)`` of each, in the order in which they act.

    Examples:
        >>> windows(2)
        [(0.1, 0.5), (0.6, 0.9)]
        >>> windows(3)
        [(0.1, 0.35), (0.45, 0.65), (0.75, 0.9)]
    """
    gap = min(GAP, 0.5 / (count + 1))
    parts = range(count + 2, 2, -1)
    share = (1.0 - gap * (count + 1)) / max(sum(parts), 1)
    found = []
    start = gap
    for part in parts:
        found.append((round(start, 4), round(start + part * share, 4)))
        start += part * share + gap
    return found
