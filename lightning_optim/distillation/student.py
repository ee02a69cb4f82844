"""The student alone: a plain checkpoint of its own class, without teacher, projectors or this package's module."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning import __version__ as lightning_version
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optim import checkpoint
from lightning_optim.distillation.hooks import call_student, is_lightning, student_view
from lightning_optim.files import written_aside

__all__ = ["student_only"]

KEY = checkpoint.DISTILLATION
"""The checkpoint's key of what a distillation module keeps besides weights."""

_PREFIX = "student."
_OF_THE_RUN = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "current_model_state",
    "averaging_state",
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    KEY,
)
_PLAIN = (int, float, str, bool, bytes, complex, type(None), Tensor)


def student_only(checkpoint_or_module: Any, path: str | Path) -> Path:
    """Write the student of a distillation as a checkpoint of its own.

    It loads into the bare student: ``StudentClass.load_from_checkpoint(path)``, and where the student was compressed
    ``lightning_optim.load_from_checkpoint(StudentClass, path)``. A plain module as student takes
    ``torch.load(path)["state_dict"]``, after ``conform(student, torch.load(path)["lightning_optim"])`` where it was
    compressed.

    Args:
        checkpoint_or_module: A checkpoint file of a DistillationModule, or the module itself.
        path: The file to write; it may be the checkpoint itself, which is then replaced.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file holds no student.
        TypeError: If the module has none.
    """
    if isinstance(checkpoint_or_module, nn.Module):
        file = _of_module(checkpoint_or_module)
    else:
        file = _of_file(checkpoint_or_module)
    with written_aside(path) as part:  # `path` may be the file that is read
        torch.save(file, part)
    return Path(path)


def _of_module(module: nn.Module) -> dict[str, Any]:
    student = getattr(module, "student", None)
    if not isinstance(student, nn.Module):
        raise TypeError(f"expected a DistillationModule or a checkpoint of one, got {type(module).__name__}.")
    saved: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning_version,
        "state_dict": module.state_dict(),
    }
    more: dict[str, Any] = {}
    hyperparameters = own_hyperparameters(student)
    if is_lightning(student):
        with student_view(saved, hyperparameters) as view:
            call_student(student, "on_save_checkpoint", view)
            more = {key: value for key, value in view.items() if key not in (*_OF_THE_RUN, checkpoint.KEY)}
            hyperparameters = {key: view[key] for key in hyperparameters if key in view}
    saved[KEY] = {"student": plain_hyperparameters(hyperparameters)}
    file = {**_alone(saved), **{key: value for key, value in more.items() if key != "state_dict"}}
    file[checkpoint.KEY] = checkpoint.plan_below(checkpoint.plain_plan(module), "student")
    return file


def _of_file(path: str | Path) -> dict[str, Any]:
    saved = checkpoint.read_checkpoint(path)
    if not any(name.startswith(_PREFIX) for name in saved["state_dict"]):
        raise ValueError(f"{str(path)!r} holds no student: it is no checkpoint of a DistillationModule.")
    return _alone(saved)


def _alone(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as the bare student would have written it without a run."""
    file = {key: value for key, value in saved.items() if key not in (*_OF_THE_RUN, checkpoint.KEY, "state_dict")}
    file["state_dict"] = OrderedDict(
        (name.removeprefix(_PREFIX), value) for name, value in saved["state_dict"].items() if name.startswith(_PREFIX)
    )
    file[checkpoint.KEY] = checkpoint.plan_below(saved.get(checkpoint.KEY, checkpoint.EMPTY), "student")
    known = saved.get(KEY, {}).get("student", {})
    if known.get("left_out"):
        rank_zero_info(
            f"The student's hyperparameters {', '.join(known['left_out'])} are no plain values and not in the file: "
            "give them when it is loaded."
        )
    return {**file, **known.get("keys", {})}


def own_hyperparameters(student: Any) -> dict[str, Any]:
    """Return what Lightning writes into a checkpoint of a LightningModule's hyperparameters."""
    if not is_lightning(student) or not student.hparams:
        return {}
    name = {student.CHECKPOINT_HYPER_PARAMS_NAME: student._hparams_name} if hasattr(student, "_hparams_name") else {}
    return {student.CHECKPOINT_HYPER_PARAMS_KEY: dict(student.hparams), **name}


def plain_hyperparameters(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a checkpoint's hyperparameters are plain values, and the names of the others."""
    name = pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    values = keys.get(name, {})
    plain = {key: value for key, value in values.items() if _is_plain(value)}
    shown = {**keys, name: plain} if name in keys else {**keys}
    return {"keys": shown, "left_out": [key for key in values if key not in plain]}


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if type(value) in (list, tuple, set):
        return all(_is_plain(each) for each in value)
    return type(value) in _PLAIN
