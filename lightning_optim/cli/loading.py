"""Loads models of checkpoints and inputs of data for the commands that deploy and compare."""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from torch import nn

from lightning_optim.cli.command import UserError, command_parser, need_jsonargparse
from lightning_optim.target import catch_forward_inputs

__all__ = [
    "PREPARE_HELP",
    "Objects",
    "dims",
    "model_and_data",
    "objects_parser",
    "prepared",
    "quiet_trainer",
]


@dataclass(frozen=True)
class Objects:
    """The objects of a configuration.

    Attributes:
        model: As the class creates it, untrained.
        data: The data; None without.
        words: Class path and arguments of the model.
    """

    model: pl.LightningModule
    data: pl.LightningDataModule | None
    words: Mapping[str, Any]


PREPARE_HELP = (
    "package.function of (model, batch) that returns the module to deploy and its inputs, if it is not the model with "
    "the inputs that its step passes"
)


def objects_parser(name: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """Return a parser for a command that takes the model and data arguments of ``fit`` and its own."""
    return command_parser(
        name,
        f"{description} Model and data are those of a configuration: --config FILE as `fit` takes it, or --model CLASS "
        "and --data CLASS (see `lightning-optim fit --help_all`).",
        example=example,
        allow_abbrev=False,
    )


def dims(text: str) -> dict[str, dict[int, str]]:
    """Read free dimensions: input name -> dimension -> its name."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{text: {{1: length}}}}', got {text!r}")
    if not all(type(place) is int for each in given.values() for place in each):
        raise argparse.ArgumentTypeError(
            f"dimensions must be whole numbers, as in '{{text: {{1: length}}}}', got {text!r}"
        )
    return {str(name): {place: str(word) for place, word in each.items()} for name, each in given.items()}


def model_and_data(command: str, arguments: Sequence[str]) -> Objects:
    """Build model and data from the arguments of ``fit``: ``--config``, ``--model``, ``--data``.

    Args:
        command: The running command, for its help text.
        arguments: Arguments that the command itself does not know.
    """
    need_jsonargparse()
    from lightning_optim.cli.lightning_cli import ObjectsCLI

    for name in ("lightning.pytorch", "lightning.fabric"):  # nothing is trained: no lines about seeds and devices
        logging.getLogger(name).setLevel(logging.WARNING)
    before = sys.argv
    sys.argv = [f"lightning-optim {command}", *arguments]
    try:
        cli = ObjectsCLI(run=False, seed_everything_default=False)
    finally:
        sys.argv = before
    return Objects(cli.model, cli.datamodule, cli.config.model.as_dict())


def prepared(objects: Objects, model: pl.LightningModule, prepare: str | None) -> tuple[nn.Module, Any]:
    """Return what is deployed of a model, and inputs of its forward.

    Args:
        objects: The configuration's objects, whose data gives a batch.
        model: The trained model.
        prepare: ``package.function`` of ``(model, batch)`` that returns both, where what is deployed is not the
            model's forward with the inputs that its step passes.
    """
    if prepare is not None:
        return cast("tuple[nn.Module, Any]", _function(prepare)(model, _batch(objects)))
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return model, example
    return _caught(objects, model)


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--prepare must name a function, as package.module.function; {path!r}: {error}") from error
    return cast("Callable[..., Any]", found)


def _batch(objects: Objects) -> Any:
    """Return the first validation batch."""
    data = _needed(objects.data)
    data.prepare_data()
    data.setup("validate")
    loader: Any = data.val_dataloader()
    return next(iter(loader[0] if isinstance(loader, (list, tuple)) else loader))


def _caught(objects: Objects, model: pl.LightningModule) -> tuple[nn.Module, Any]:
    """Return the module that the model's own validation step calls in the first batch, and its inputs."""
    with catch_forward_inputs(model) as caught:
        quiet_trainer(limit_val_batches=1).validate(model, datamodule=_needed(objects.data), verbose=False)
    called, inputs = caught.result()
    return called, inputs.kwargs or inputs.args


def _needed(data: pl.LightningDataModule | None) -> pl.LightningDataModule:
    if data is None:
        raise UserError(
            "there are no inputs: pass --data (or a --config with `data`), or an `example_input_array` to the model."
        )
    return data


def quiet_trainer(**words: Any) -> pl.Trainer:
    """Return a Trainer without files and output."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **words,
    )
