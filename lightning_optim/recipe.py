"""Recipes: which techniques compress a model together, in one run, with windows that fit."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.callbacks.compressed_checkpoint import CompressedCheckpoint
from lightning_optim.callbacks.performance_score import PerformanceScore
from lightning_optim.distillation.module import DistillationModule
from lightning_optim.provenance import as_plain
from lightning_optim.techniques import TECHNIQUES, windows
from lightning_optim.window import Window

__all__ = ["Recipe", "recipe_names"]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """A key of a recipe.

    Attributes:
        makes: The class that takes its arguments.
        first: The argument that a bare value sets.
        later: Arguments that are given when the recipe is used.
    """

    makes: Callable[..., Any]
    first: str
    later: tuple[str, ...] = ("example_inputs",)

    @property
    def known(self) -> list[str]:
        """The arguments it takes in a recipe."""
        return [name for name in _arguments_of(self.makes) if name not in self.later]


def _arguments_of(makes: Callable[..., Any]) -> list[str]:
    """Return the arguments of a class; CompressedCheckpoint passes all on to ModelCheckpoint."""
    own = inspect.signature(makes).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if not passes_on:
        return list(own)
    return list(inspect.signature(pl.callbacks.ModelCheckpoint).parameters)


_OTHERS: Mapping[str, _Part] = {
    "distillation": _Part(DistillationModule, "loss", later=("student", "teacher", "example_inputs")),
    "score": _Part(PerformanceScore, "accuracy"),
    "checkpoint": _Part(CompressedCheckpoint, "monitor"),
}
"""Keys beside the techniques of the table."""


def _part(name: str) -> _Part:
    if name in _OTHERS:
        return _OTHERS[name]
    technique = TECHNIQUES[name]
    return _Part(technique.callback_class, technique.first)


def _keys() -> list[str]:
    return ["description", *TECHNIQUES, *_OTHERS]


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """Techniques that compress a model together in one run; in Python, or as a YAML file of the same keys.

    Each key holds the arguments of one class, or only the first: ``weight_pruning=0.8`` is ``{"sparsity": 0.8}``, and
    ``True`` uses the defaults. Where several techniques share the run, windows that are not given are laid out in the
    order in which the techniques act, with time to recover after each; windows that are given must keep that order.

    Args:
        description: What the recipe is for.
        techniques: Techniques by name, as :func:`dataclasses.replace` passes them on; a keyword of the same name wins.
        distillation: Arguments of :class:`DistillationModule`, without student and teacher.
        score: Arguments of :class:`PerformanceScore`.
        checkpoint: Arguments of :class:`CompressedCheckpoint`.
        named: Techniques by name, as keywords: ``channel_pruning``, ``weight_pruning``, ``quantization``, and every
            other one in ``lightning_optim.techniques.TECHNIQUES``; each takes the arguments of its callback.

    Raises:
        ValueError: For unknown arguments (the error lists the known ones), windows that overlap or mix steps with
            fractions, and whatever the classes reject.
        TypeError: For an unknown key, or a key that holds neither a mapping nor a single value.

    Examples:
        >>> recipe = Recipe(channel_pruning=0.5, quantization=True)
        >>> [type(callback).__name__ for callback in recipe.callbacks()]
        ['ChannelPruning', 'QuantizationAwareTraining']
        >>> recipe.quantization["start"]
        0.6
    """

    description: str = ""
    techniques: Mapping[str, Arguments] = field(default_factory=dict)
    distillation: Arguments | None = None
    score: Arguments | None = None
    checkpoint: Arguments | None = None

    def __init__(
        self,
        *,
        description: str = "",
        techniques: Mapping[str, Any] | None = None,
        distillation: Any = None,
        score: Any = None,
        checkpoint: Any = None,
        **named: Any,
    ) -> None:
        if not isinstance(description, str):
            raise TypeError(f"`description` must be a string, got {description!r}.")
        asked = {**(techniques or {}), **named}
        unknown = [name for name in asked if name not in TECHNIQUES]
        if unknown:
            raise TypeError(f"unknown technique {unknown[0]!r} in a recipe; known: {', '.join(TECHNIQUES)}.")
        others = {"distillation": distillation, "score": score, "checkpoint": checkpoint}
        for name, value in {"description": description, "techniques": _in_order(asked)}.items():
            object.__setattr__(self, name, value)
        for name, value in others.items():
            object.__setattr__(self, name, _checked(name, value))
        self._check_windows()  # here the classes check their arguments
        self._check_distillation()

    def __getattr__(self, name: str) -> Any:
        """Return the arguments of a technique by its name, None where the recipe does not have it."""
        if name not in TECHNIQUES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__.get("techniques", {}).get(name)

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Any] | Recipe") -> "Recipe":
        """Return a recipe: one that comes with the package, a YAML file, or a mapping of its keys.

        Args:
            source: A name of :func:`recipe_names`, a path that ends in ``.yaml`` or ``.yml``, a mapping, or a recipe.

        Raises:
            ValueError: For an unknown name or key, and a file that holds no mapping.
            FileNotFoundError: If there is no such file.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._of(source, "a recipe")
        if not isinstance(source, (str, Path)):
            raise TypeError(f"a recipe is a name, a path or a mapping of its keys, got {source!r}.")
        text, where = _read(source)
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is not valid YAML: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{where} must be a mapping with keys of {', '.join(_keys())}, got {content!r}.")
        return cls._of(content, where)

    @classmethod
    def _of(cls, content: Mapping[str, Any], where: str) -> "Recipe":
        unknown = [str(key) for key in content if key not in _keys()]
        if unknown:
            raise ValueError(f"{where} has unknown keys {', '.join(map(repr, unknown))}; known: {', '.join(_keys())}.")
        return cls(**content)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its techniques, in the order in which they act."""
        return tuple(self.techniques)

    def callbacks(self, *, example_inputs: Any = None) -> list[pl.Callback]:
        """Return new callbacks, for ``Trainer(callbacks=...)``.

        A recipe with ``distillation`` has one more: it raises where the fitted module does not come from :meth:`wrap`.

        Args:
            example_inputs: What the model's forward receives, for the callbacks that otherwise take it from the first
                batch.
        """
        names = (*self.stages, *(name for name in ("score", "checkpoint") if getattr(self, name) is not None))
        guards = [] if self.distillation is None else [_NeedsDistillation()]
        return [*(self._make(name, example_inputs) for name in names), *guards]

    def _make(self, name: str, example_inputs: Any) -> Any:
        part, arguments = _part(name), dict(getattr(self, name))
        if "example_inputs" in _arguments_of(part.makes):
            arguments["example_inputs"] = example_inputs
        try:
            callback = part.makes(**arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}`: {error}") from error
        if name in self.techniques:
            callback.recipe = self._with_only(name)
        return callback

    def wrap(self, module: nn.Module, teacher: Any = None, **options: Any) -> Any:
        """Return the module for ``trainer.fit``: the given one, or for a recipe with ``distillation`` one around it.

        Args:
            module: The model to compress.
            teacher: As :class:`DistillationModule` takes it.
            options: More arguments of :class:`DistillationModule`, which override the recipe's.

        Raises:
            ValueError: If there is a teacher or an option and the recipe has no ``distillation``.
        """
        if self.distillation is not None:
            wrapped = DistillationModule(module, teacher, **{**self.distillation, **options})
            wrapped.recipe = self._with_only("distillation")
            return wrapped
        if teacher is not None or options:
            got = "a teacher was given" if teacher is not None else f"got {', '.join(options)}"
            raise ValueError(f"this recipe has no `distillation`, and {got}. Add distillation=True, or take it out.")
        return module

    def as_plain(self) -> dict[str, Any]:
        """Return the keys that are set as plain types: what a checkpoint and a YAML file hold."""
        keys = {"description": self.description, **self.techniques}
        keys |= {name: getattr(self, name) for name in _OTHERS}
        return {name: as_plain(value) for name, value in keys.items() if value is not None and value != ""}

    def _with_only(self, name: str) -> dict[str, Any]:
        """Return the keys for the checkpoints of a run with one technique: the others report themselves if they run."""
        left_out = {*self.techniques, "distillation"} - {name}
        return {key: value for key, value in self.as_plain().items() if key not in left_out}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, windows filled in."""
        return cast("str", yaml.safe_dump(self.as_plain(), sort_keys=False, allow_unicode=True))

    def __hash__(self) -> int:
        return hash(str(self.as_plain()))

    def __repr__(self) -> str:
        keys = {"description": self.description, **self.techniques, **{name: getattr(self, name) for name in _OTHERS}}
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in keys.items() if value not in (None, ''))})"

    def __str__(self) -> str:
        return self.to_yaml().rstrip()

    # Checks.

    def _check_windows(self) -> None:
        """Reject windows that overlap; a technique that has nothing left to do (``sparsity="hold"``) has none."""
        made: dict[str, Any] = dict(zip(self.stages, self.callbacks(), strict=False))  # these come first
        timed = {name: callback for name, callback in made.items() if TECHNIQUES[name].window}
        open_windows = {name: callback.window for name, callback in timed.items() if not callback.reached_end}
        _check_units(open_windows)
        for (earlier, before), (later, after) in pairwise(open_windows.items()):
            if before.end > after.start:
                (_, end), (start, _) = before.names, after.names
                raise ValueError(
                    f"`{earlier}` has {end}={before.end!r}, `{later}` has {start}={after.start!r}: the windows "
                    f"overlap. `{earlier}` acts first: give `{later}` a later {start}, or `{earlier}` an earlier {end}."
                )

    def _check_distillation(self) -> None:
        """Let the class check its arguments on a student without layers, except those that name layers."""
        if self.distillation is None:
            return
        arguments = {key: value for key, value in self.distillation.items() if key not in ("features", "logits_from")}
        is_plain = "optimizer" in arguments or "task_loss" in arguments
        try:
            DistillationModule(nn.Identity() if is_plain else _NoStudent(), **arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`distillation`: {error}") from error


class _NeedsDistillation(pl.Callback):
    """Guards a recipe with ``distillation``: a run without its teacher would be a different run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the fitted module was not wrapped for distillation."""
        if stage == "fit" and not isinstance(pl_module, DistillationModule):
            raise MisconfigurationException(
                f"the recipe of these callbacks distils, and the Trainer fits a {type(pl_module).__name__} without a "
                "teacher. Call trainer.fit(recipe.wrap(module, teacher), ...), or take `distillation` out of the "
                "recipe: dataclasses.replace(recipe, distillation=None)."
            )


class _NoStudent(pl.LightningModule):
    """Stands for the student while a recipe's arguments are checked."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> None:
        return None


def recipe_names() -> dict[str, str]:
    """Return the recipes that come with the package: name and description."""
    return {name: Recipe.load(name).description for name in sorted(_shipped())}


def _shipped() -> dict[str, Any]:
    folder = resources.files("lightning_optim").joinpath("recipes")
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


def _read(source: str | Path) -> tuple[str, str]:
    """Return a recipe's YAML, and how errors name it."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no recipe file {str(source)!r}.")
        try:
            return path.read_text(encoding="utf-8"), f"the recipe {str(source)!r}"
        except UnicodeDecodeError as error:
            raise ValueError(f"the recipe {str(source)!r} is not UTF-8 text: {error}") from error
    shipped = _shipped()
    if str(source) not in shipped:
        raise ValueError(
            f"unknown recipe {str(source)!r}; known: {', '.join(sorted(shipped))}. For a file of your own give a path "
            "that ends in .yaml."
        )
    return shipped[str(source)].read_text(encoding="utf-8"), f"the recipe {str(source)!r}"


def _in_order(asked: Mapping[str, Any]) -> dict[str, Arguments]:
    """Return the arguments of each technique that is asked for, in order, with windows where several share the run."""
    checked = {name: _checked(name, asked[name]) for name in TECHNIQUES if name in asked}
    techniques = {name: arguments for name, arguments in checked.items() if arguments is not None}
    timed = [name for name in techniques if TECHNIQUES[name].window]
    if len(timed) > 1:
        for name, window in zip(timed, windows(len(timed)), strict=True):
            techniques[name] = {**dict(zip(TECHNIQUES[name].window, window, strict=True)), **techniques[name]}
    return techniques


def _check_units(open_windows: Mapping[str, Window]) -> None:
    """Reject a mix of step counts and fractions when several techniques share a run (0 counts as either)."""
    moments = [
        (name, key, value)
        for name, window in open_windows.items()
        for key, value in zip(window.names, (window.start, window.end), strict=True)
    ]
    steps = [moment for moment in moments if type(moment[2]) is int and moment[2] != 0]
    fractions = [moment for moment in moments if isinstance(moment[2], float)]
    if len(open_windows) > 1 and steps and fractions:
        both = ", ".join(f"`{name}` has {key}={value!r}" for name, key, value in (steps[0], fractions[0]))
        raise ValueError(f"{both}: give all windows of a recipe as fractions, or all as steps.")


def _checked(name: str, value: Any) -> Arguments | None:
    """Return the arguments under a key as a dict of its own; None where it is absent."""
    if value is None or value is False:
        return None
    if value is True:
        return {}
    part = _part(name)
    if not isinstance(value, Mapping):
        if not isinstance(value, (int, float, str)):
            raise TypeError(f"`{name}` must be a mapping of arguments, or a value for {part.first}; got {value!r}.")
        return {part.first: value}
    unknown = [str(argument) for argument in value if argument not in part.known]
    if unknown:
        raise ValueError(
            f"`{name}` has no argument {', '.join(map(repr, unknown))}; known: {', '.join(part.known)}."
            + (" Pass example inputs to `callbacks(example_inputs=...)`." if "example_inputs" in unknown else "")
        )
    return {key: _own(item, patterns=key in ("include", "exclude")) for key, item in value.items()}


def _own(value: Any, *, patterns: bool = False) -> Any:
    """Copy nested mappings and lists, since the caller may change theirs; ``"torch.nn.Linear"`` becomes the class.

    Args:
        value: An argument.
        patterns: Whether the items of a list are patterns; the keys of a mapping always may be.
    """
    if isinstance(value, Mapping):
        return {_layer_class(key): _own(item) for key, item in value.items()}
    if patterns and isinstance(value, (list, tuple)):
        return [_layer_class(item) for item in value]
    return [_own(item) for item in value] if isinstance(value, list) else value


def _layer_class(pattern: Any) -> Any:
    if not isinstance(pattern, str) or not pattern.startswith("torch.nn."):
        return pattern
    cls = getattr(nn, pattern.removeprefix("torch.nn."), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{pattern!r} is no layer class of torch.nn.")
    return cls
