"""Provenance of a checkpoint: model, data, versions, recipe and metrics, as plain types."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim._version import __version__

__all__ = ["as_plain", "provenance"]

_PACKAGES = ("torch", "lightning", "torch-pruning")


def provenance(module: nn.Module, trainer: Any, callbacks: Iterable[Any] = ()) -> dict[str, Any]:
    """Describe the run that writes a checkpoint.

    Args:
        module: The LightningModule that is saved.
        trainer: Its Trainer; None if the file is written without one.
        callbacks: The compression callbacks, for the recipe they come from.

    Returns:
        ``model`` (class), ``versions``, and for a run ``data`` (name or class, and number of training samples),
        ``recipe``, ``run`` (strategy, precision, processes, planned length) and ``metrics``: plain types.
    """
    about: dict[str, Any] = {"model": _name_of(module), "versions": dict(_versions())}
    student = getattr(module, "student", None)
    if isinstance(student, nn.Module):
        about["student"] = _name_of(student)
    recipes = _recipes((*callbacks, module))
    if recipes:
        about["recipe"] = recipes[0] if len(recipes) == 1 else recipes
    if trainer is not None:
        about |= {"data": _data(trainer), "run": _run(trainer), "metrics": _metrics(trainer)}
    return about


def _recipes(sources: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the recipes of a run, each with the arguments of the techniques that were used."""
    recipes: list[dict[str, Any]] = []
    for source in sources:
        words = getattr(source, "recipe", None)
        if not isinstance(words, Mapping):
            continue
        same = [known for known in recipes if all(known.get(word, value) == value for word, value in words.items())]
        if same:
            same[0].update(words)
        else:
            recipes.append(dict(words))
    return recipes


def _name_of(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


@cache
def _versions() -> Mapping[str, str]:
    found = {"lightning_optim": __version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # Lightning may be there as `pytorch-lightning` alone
            found[name] = metadata.version(name)
    return found | {"torch": str(torch.__version__)}  # with the build (+cu130), which its metadata may leave out


def _data(trainer: Any) -> dict[str, Any]:
    """Describe the data: the DataModule or else the dataset, and the number of training samples if it is known."""
    dataset = getattr(getattr(trainer, "train_dataloader", None), "dataset", None)
    found: dict[str, Any] = {}
    source = trainer.datamodule if trainer.datamodule is not None else dataset
    if source is not None:
        found["name"] = _name_of(source)
        with suppress(Exception):  # the user's own code: a description must never cost the file
            own = getattr(source, "name", None)
            found["name"] = as_plain(own) if isinstance(own, str) and own else found["name"]
    with suppress(Exception):  # a stream has no length, a closed file none any more
        found["samples"] = len(dataset)  # type: ignore[arg-type]
    return found


def _run(trainer: Any) -> dict[str, Any]:
    return {
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "processes": int(trainer.world_size),
        "max_epochs": trainer.max_epochs,
        "max_steps": int(trainer.max_steps),
    }


def _metrics(trainer: Any) -> dict[str, float]:
    """Return the last logged values, as numbers."""
    logged = trainer.callback_metrics
    return {name: float(value) for name, value in logged.items() if isinstance(value, (Tensor, int, float))}


def as_plain(value: Any) -> Any:
    """Return plain types, for a checkpoint or YAML: classes and functions by name, dataclasses as their fields."""
    if isinstance(value, Mapping):
        return {str(as_plain(key)): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [as_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if callable(value) and not isinstance(value, Enum):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"torch.nn.{name}" if getattr(nn, name, None) is value else f"{value.__module__}.{name}"
    return _builtin(value)


def _builtin(value: Any) -> Any:
    """Return a number or string of a built-in type: ``weights_only=True`` reads no NumPy scalars and no enums."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return as_plain(value.value)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    item = getattr(value, "item", None)  # a NumPy scalar, a tensor of one number
    if callable(item) and getattr(value, "size", 1) == 1:
        with suppress(ValueError, TypeError, RuntimeError):
            return _builtin(item())
    return str(value)
