"""Build models from configuration and load checkpoints into them; nothing that a checkpoint names is imported."""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_optim import checkpoint
from lightning_optim.cli.command import UserError
from lightning_optim.distillation.student import KEY as DISTILLATION
from lightning_optim.distillation.student import student_only

__all__ = ["build", "is_distilled", "load"]


def load(words: Mapping[str, Any], path: str | Path) -> pl.LightningModule:
    """Return the model of a checkpoint; of a distillation's, the student's.

    Args:
        words: ``class_path`` and ``init_args`` of the class that wrote the file. Plain values that the file holds for
            the same arguments count instead; nothing that the file names is imported.
        path: The file.
    """
    file = checkpoint.read_checkpoint(path)
    if is_distilled(file):
        with tempfile.TemporaryDirectory() as folder:
            return load(words, student_only(path, Path(folder) / "student.ckpt"))
    saved = file.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    model: pl.LightningModule = checkpoint.load_from_checkpoint(build(words, saved), path)
    return model.eval()


def is_distilled(file: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is that of a DistillationModule, with the student in it."""
    return DISTILLATION in file and any(name.startswith("student.") for name in file["state_dict"])


def build(words: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Any:
    """Make what a configuration describes; plain values of ``saved`` take the place of arguments of the same name."""
    from jsonargparse import ArgumentParser

    arguments = dict(words.get("init_args") or {})
    over = {name: value for name, value in (saved or {}).items() if name in arguments and _is_plain(value)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "module")
    try:
        parsed = parser.parse_object({"module": {**words, "init_args": {**arguments, **over}}})
    except argparse.ArgumentError as error:
        raise UserError(f"{words['class_path']} does not take the arguments of the checkpoint: {error}") from error
    return parser.instantiate_classes(parsed).module


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
