"""Recipes: which techniques compress a model together, in one run, with windows that fit."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.callbacks.channel_pruning import ChannelPruning
from lightning_optim.callbacks.compressed_checkpoint import CompressedCheckpoint
from lightning_optim.callbacks.performance_score import PerformanceScore
from lightning_optim.callbacks.quantization import QuantizationAwareTraining
from lightning_optim.callbacks.weight_pruning import WeightPruning
from lightning_optim.distillation.module import DistillationModule
from lightning_optim.provenance import as_plain

__all__ = ["Recipe", "recipe_names"]

Words = Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """A word of a recipe.

    Attributes:
        makes: The class that takes its words.
        first: The word that a bare value stands for.
        window: The words of its window; empty where it has none.
        given: What the recipe does not say, since it is given when the recipe is used.
    """

    makes: Callable[..., Any]
    first: str
    window: tuple[str, ...] = ()
    given: tuple[str, ...] = ("example_inputs",)

    @property
    def known(self) -> list[str]:
        """The words it takes."""
        return [name for name in _arguments(self.makes) if name not in self.given]


def _arguments(makes: Callable[..., Any]) -> list[str]:
    """Return what a class takes; CompressedCheckpoint passes everything on to ModelCheckpoint."""
    own = inspect.signature(makes).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if not passes_on:
        return list(own)
    return list(inspect.signature(pl.callbacks.ModelCheckpoint).parameters)


_PARTS: Mapping[str, _Part] = {
    "channel_pruning": _Part(ChannelPruning, "pruning_ratio", ("start", "end")),
    "weight_pruning": _Part(WeightPruning, "sparsity", ("start", "end")),
    "quantization": _Part(QuantizationAwareTraining, "weight_bits", ("start", "freeze")),
    "distillation": _Part(DistillationModule, "loss", given=("student", "teacher", "example_inputs")),
    "score": _Part(PerformanceScore, "accuracy"),
    "checkpoint": _Part(CompressedCheckpoint, "monitor"),
}
_STAGES = ("channel_pruning", "weight_pruning", "quantization")
"""In this order they act, each on what the one before left."""

_TOGETHER: Mapping[tuple[str, ...], tuple[tuple[float, float], ...]] = {
    ("channel_pruning", "weight_pruning"): ((0.1, 0.4), (0.5, 0.75)),
    ("channel_pruning", "quantization"): ((0.1, 0.5), (0.6, 0.9)),
    ("weight_pruning", "quantization"): ((0.1, 0.5), (0.6, 0.9)),
    ("channel_pruning", "weight_pruning", "quantization"): ((0.1, 0.35), (0.45, 0.65), (0.75, 0.9)),
}
"""Windows of several techniques in one run: a tenth of it to recover after each, and some before the first."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Techniques that compress a model together in one run; in Python, or as a YAML file of the same words.

    Each word holds the arguments of one class, or just its first: ``weight_pruning=0.8`` is ``{"sparsity": 0.8}``, and
    ``True`` takes all as they are. Windows that are not given are laid out so that channels leave first, then weights
    become zero, then rounding begins, each after time to recover; given ones must be in that order.

    Args:
        description: What it is for, in words.
        channel_pruning: Of :class:`ChannelPruning`.
        weight_pruning: Of :class:`WeightPruning`.
        quantization: Of :class:`QuantizationAwareTraining`.
        distillation: Of :class:`DistillationModule`, without student and teacher.
        score: Of :class:`PerformanceScore`.
        checkpoint: Of :class:`CompressedCheckpoint`.

    Raises:
        ValueError: For unknown words (the known ones are listed), windows that overlap or mix steps with fractions,
            and whatever the classes refuse.
        TypeError: If a part is neither a mapping nor its first value.

    Examples:
        >>> recipe = Recipe(channel_pruning=0.5, quantization=True)
        >>> [type(callback).__name__ for callback in recipe.callbacks()]
        ['ChannelPruning', 'QuantizationAwareTraining']
        >>> recipe.quantization["start"]
        0.6
    """

    description: str = ""
    channel_pruning: Any = None
    weight_pruning: Any = None
    quantization: Any = None
    distillation: Any = None
    score: Any = None
    checkpoint: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.description, str):
            raise TypeError(f"`description` must be a text, got {self.description!r}.")
        for name, part in _PARTS.items():
            object.__setattr__(self, name, _as_words(name, part, getattr(self, name)))
        self._fill_in_windows()
        self._check_windows()
        self.callbacks()  # the classes check their own words
        self._check_distillation()

    @classmethod
    def load(cls, source: "str | Path | Words | Recipe") -> "Recipe":
        """Return a recipe: one that comes with the package, a YAML file, or the words themselves.

        Args:
            source: A name of :func:`recipe_names`, a path that ends in ``.yaml`` or ``.yml``, a mapping, or a recipe.

        Raises:
            ValueError: For a name or word that is unknown, and a file that holds no mapping.
            FileNotFoundError: If there is no such file.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._of(source, "a recipe")
        if not isinstance(source, (str, Path)):
            raise TypeError(f"a recipe is a name, a path or its words, got {source!r}.")
        text, where = _read(source)
        try:
            words = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is no YAML: {error}") from error
        if not isinstance(words, Mapping):
            raise ValueError(f"{where} must hold the words of a recipe ({', '.join(_names())}), got {words!r}.")
        return cls._of(words, where)

    @classmethod
    def _of(cls, words: Words, where: str) -> "Recipe":
        unknown = [str(word) for word in words if word not in _names()]
        if unknown:
            raise ValueError(f"{where} has no word {', '.join(map(repr, unknown))}; known: {', '.join(_names())}.")
        return cls(**words)

    @property
    def stages(self) -> tuple[str, ...]:
        """The techniques it has that change the model, in the order in which they act."""
        return tuple(name for name in _STAGES if getattr(self, name) is not None)

    def callbacks(self, *, example_inputs: Any = None) -> list[pl.Callback]:
        """Return new callbacks, for ``Trainer(callbacks=...)``.

        A recipe that distils has one more: a fit of a module that :meth:`wrap` did not return raises.

        Args:
            example_inputs: What the model's forward receives, for the callbacks that would else catch it from the first
                batch.
        """
        names = (*self.stages, *(name for name in ("score", "checkpoint") if getattr(self, name) is not None))
        guards = [] if self.distillation is None else [_NeedsDistillation()]
        return [*(self._make(name, example_inputs) for name in names), *guards]

    def _make(self, name: str, example_inputs: Any) -> pl.Callback:
        part, words = _PARTS[name], dict(getattr(self, name))
        if "example_inputs" in _arguments(part.makes):
            words["example_inputs"] = example_inputs
        try:
            callback = cast("pl.Callback", part.makes(**words))
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}`: {error}") from error
        if name in _STAGES:
            callback.recipe = self._run_by(name)  # type: ignore[attr-defined]  # a CompressionCallback
        return callback

    def wrap(self, module: nn.Module, teacher: Any = None, **options: Any) -> Any:
        """Return what the Trainer fits: the module itself, or where the recipe distils a module around it.

        Args:
            module: The model to compress.
            teacher: Who teaches it, as :class:`DistillationModule` takes it.
            options: More arguments of :class:`DistillationModule`, over the recipe's.

        Raises:
            ValueError: If there is a teacher or an option and the recipe has no ``distillation``.
        """
        if self.distillation is not None:
            wrapped = DistillationModule(module, teacher, **{**self.distillation, **options})
            wrapped.recipe = self._run_by("distillation")
            return wrapped
        if teacher is not None or options:
            got = "a teacher was given" if teacher is not None else f"got {', '.join(options)}"
            raise ValueError(f"this recipe has no `distillation`, and {got}. Add distillation=True, or take it out.")
        return module

    def as_plain(self) -> dict[str, Any]:
        """Return its words as plain types, without those that are absent: what a checkpoint and a YAML file hold."""
        words = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: as_plain(value) for name, value in words.items() if value is not None and value != ""}

    def _run_by(self, name: str) -> dict[str, Any]:
        """Return the words for the checkpoints of a run with one technique: others say for themselves that they ran."""
        others = {*_STAGES, "distillation"} - {name}
        return {word: value for word, value in self.as_plain().items() if word not in others}

    def to_yaml(self) -> str:
        """Return the words as YAML, windows filled in."""
        return cast("str", yaml.safe_dump(self.as_plain(), sort_keys=False, allow_unicode=True))

    def __hash__(self) -> int:
        return hash(str(self.as_plain()))

    def __str__(self) -> str:
        return self.to_yaml().rstrip()

    # Checks.

    def _fill_in_windows(self) -> None:
        for name, window in zip(self.stages, _TOGETHER.get(self.stages, ()), strict=False):
            words = getattr(self, name)
            defaults = dict(zip(_PARTS[name].window, window, strict=True))
            object.__setattr__(self, name, {**defaults, **words})

    def _check_windows(self) -> None:
        scheduled = [name for name in self.stages if getattr(self, name).get("sparsity") != "hold"]
        self._check_units(scheduled)
        for earlier, later in pairwise(scheduled):
            end_word, start_word = _PARTS[earlier].window[1], _PARTS[later].window[0]
            end, start = getattr(self, earlier)[end_word], getattr(self, later)[start_word]
            if isinstance(end, (int, float)) and isinstance(start, (int, float)) and end > start:
                raise ValueError(
                    f"`{earlier}` has {end_word}={end!r}, `{later}` has {start_word}={start!r}: the windows overlap. "
                    f"Channels leave first, then weights, then rounding begins; give `{later}` a later {start_word}, "
                    f"or `{earlier}` an earlier {end_word}."
                )

    def _check_units(self, scheduled: Sequence[str]) -> None:
        """Refuse steps beside fractions where several techniques have to fit; 0 is both."""
        if len(scheduled) < 2:
            return
        words = {(name, word): getattr(self, name)[word] for name in scheduled for word in _PARTS[name].window}
        steps = [key for key, value in words.items() if type(value) is int and value != 0]
        fractions = [key for key, value in words.items() if isinstance(value, float)]
        if steps and fractions:
            said = ", ".join(f"`{name}` has {word}={words[name, word]!r}" for name, word in (steps[0], fractions[0]))
            raise ValueError(f"{said}: give all windows of a recipe as fractions, or all as steps.")

    def _check_distillation(self) -> None:
        """Let the class check its words on a student without layers, except those that name layers."""
        if self.distillation is None:
            return
        words = {name: value for name, value in self.distillation.items() if name not in ("features", "logits_from")}
        is_plain = "optimizer" in words or "task_loss" in words
        try:
            DistillationModule(nn.Identity() if is_plain else _NoStudent(), **words)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`distillation`: {error}") from error


class _NeedsDistillation(pl.Callback):
    """Belongs to the callbacks of a recipe that distils: a run without its teacher would be another run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise where the module that is fitted has no teacher around it."""
        if stage == "fit" and not isinstance(pl_module, DistillationModule):
            raise MisconfigurationException(
                f"the recipe of these callbacks distils, and the Trainer fits a {type(pl_module).__name__} that nobody "
                "teaches. Call trainer.fit(recipe.wrap(module, teacher), ...), or take `distillation` out of the "
                "recipe: dataclasses.replace(recipe, distillation=None)."
            )


class _NoStudent(pl.LightningModule):
    """Stands for the student while a recipe's words are checked."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> None:
        return None


def recipe_names() -> dict[str, str]:
    """Return the recipes that come with the package: name and what it is for."""
    return {name: Recipe.load(name).description for name in sorted(_shipped())}


def _shipped() -> dict[str, Any]:
    folder = resources.files("lightning_optim").joinpath("recipes")
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


def _read(source: str | Path) -> tuple[str, str]:
    """Return a recipe's text, and how errors call it."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no recipe file {str(source)!r}.")
        try:
            return path.read_text(encoding="utf-8"), f"the recipe {str(source)!r}"
        except UnicodeDecodeError as error:
            raise ValueError(f"the recipe {str(source)!r} is no UTF-8 text: {error}") from error
    shipped = _shipped()
    if str(source) not in shipped:
        raise ValueError(
            f"unknown recipe {str(source)!r}; known: {', '.join(sorted(shipped))}. For a file of your own give a path "
            "that ends in .yaml."
        )
    return shipped[str(source)].read_text(encoding="utf-8"), f"the recipe {str(source)!r}"


def _names() -> list[str]:
    return [field.name for field in fields(Recipe)]


def _as_words(name: str, part: _Part, given: Any) -> Words | None:
    """Return a part's words as a mapping of its own; None where it is absent."""
    if given is None or given is False:
        return None
    if given is True:
        return {}
    if not isinstance(given, Mapping):
        if not isinstance(given, (int, float, str)):
            raise TypeError(f"`{name}` must be a mapping of {part.first} and other words, or just that; got {given!r}.")
        return {part.first: given}
    unknown = [str(word) for word in given if word not in part.known]
    if unknown:
        raise ValueError(
            f"`{name}` has no word {', '.join(map(repr, unknown))}; known: {', '.join(part.known)}."
            + (" Example inputs are given to `callbacks(example_inputs=...)`." if "example_inputs" in unknown else "")
        )
    return {word: _patterns(value) if word in ("include", "exclude") else _own(value) for word, value in given.items()}


def _own(value: Any) -> Any:
    """Return a copy of nested mappings and lists: what the caller has may change."""
    if isinstance(value, Mapping):
        return {key: _own(each) for key, each in value.items()}
    return [_own(each) for each in value] if isinstance(value, list) else value


def _patterns(given: Any) -> Any:
    """Turn ``"torch.nn.Linear"`` into the class; names and glob patterns stay."""
    if not isinstance(given, (list, tuple)):
        return given  # the class says what it expects
    return [_layer_class(each) if isinstance(each, str) and each.startswith("torch.nn.") else each for each in given]


def _layer_class(path: str) -> type[nn.Module]:
    found = getattr(nn, path.removeprefix("torch.nn."), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path!r} is no layer class of torch.nn.")
    return found
