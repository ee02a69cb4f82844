"""The student's part of a checkpoint, and a plain checkpoint of the student alone."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning import __version__ as lightning_version
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optim import checkpoint
from lightning_optim.distillation.hooks import call_student, is_lightning
from lightning_optim.files import written_aside

__all__ = [
    "HYPERPARAMETERS",
    "KEY",
    "load_student",
    "own_hyperparameters",
    "plain_hyperparameters",
    "save_student",
    "student_only",
]

KEY = checkpoint.DISTILLATION
"""The checkpoint's key for everything that a distillation module keeps besides weights."""

HYPERPARAMETERS = ("hyper_parameters", "hparams_name", "hparams_type")
"""Keys under which Lightning writes a module's arguments."""

_PREFIX = "student."
_OF_THE_RUN = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "current_model_state",
    "averaging_state",
    *HYPERPARAMETERS,
    KEY,
)
_PLAIN = (int, float, str, bool, bytes, complex, type(None), Tensor)


def student_only(checkpoint_or_module: Any, path: str | Path) -> Path:
    """Write the student of a distillation as a checkpoint of its own.

    It loads into the bare student: ``StudentClass.load_from_checkpoint(path)``, or, if the student was compressed,
    ``lightning_optim.load_from_checkpoint(StudentClass, path)``. A plain module as student loads
    ``torch.load(path)["state_dict"]``, after ``conform(student, torch.load(path)["lightning_optim"])`` if it was
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

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_optim import DistillationModule
        >>> from lightning_optim.demo import DigitsNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = student_only(DistillationModule(DigitsNet(8), DigitsNet(16)), Path(folder, "student.ckpt"))
        ...     student = DigitsNet.load_from_checkpoint(path)
        >>> student.hparams["width"]
        8
    """
    if isinstance(checkpoint_or_module, nn.Module):
        file = _of_module(checkpoint_or_module)
    else:
        file = _of_file(checkpoint_or_module)
    with written_aside(path) as temporary:  # `path` may be the file that is read
        torch.save(file, temporary)
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
    hyperparameters = save_student(student, saved)
    saved[KEY] = {"student": plain_hyperparameters(hyperparameters)}
    file = _alone(saved)
    file[checkpoint.KEY] = checkpoint.plan_below(checkpoint.plain_plan(module), "student")
    return file


def _of_file(path: str | Path) -> dict[str, Any]:
    saved = checkpoint.read_checkpoint(path)
    if not any(name.startswith(_PREFIX) for name in saved["state_dict"]):
        raise ValueError(f"{str(path)!r} holds no student: it is not a checkpoint of a DistillationModule.")
    return _alone(saved)


def _alone(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as the bare student would have written it outside a run."""
    file = {key: value for key, value in saved.items() if key not in (*_OF_THE_RUN, checkpoint.KEY, "state_dict")}
    file["state_dict"] = OrderedDict(
        (name.removeprefix(_PREFIX), value) for name, value in saved["state_dict"].items() if name.startswith(_PREFIX)
    )
    file[checkpoint.KEY] = checkpoint.plan_below(saved.get(checkpoint.KEY, checkpoint.EMPTY), "student")
    known = saved.get(KEY, {}).get("student", {})
    if known.get("left_out"):
        rank_zero_info(
            f"The student's hyperparameters {', '.join(known['left_out'])} are not plain values and not in the file: "
            "pass them when it is loaded."
        )
    return {**file, **known.get("keys", {})}


def save_student(student: Any, file: dict[str, Any]) -> dict[str, Any]:
    """Call the student's ``on_save_checkpoint`` on its view of a checkpoint, and return its hyperparameters."""
    hyperparameters = own_hyperparameters(student)
    if is_lightning(student):
        with _student_view(file, hyperparameters) as view:
            call_student(student, "on_save_checkpoint", view)
            hyperparameters = {key: view[key] for key in hyperparameters if key in view}
    return hyperparameters


def load_student(student: Any, file: dict[str, Any], hyperparameters: Mapping[str, Any]) -> None:
    """Call the student's ``on_load_checkpoint`` on its view of a checkpoint."""
    if is_lightning(student):
        with _student_view(file, hyperparameters) as view:
            call_student(student, "on_load_checkpoint", view)


@contextmanager
def _student_view(file: dict[str, Any], hyperparameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Show a checkpoint as the student's own: its hooks find their names in ``state_dict``, and may change them.

    Args:
        file: The checkpoint of the module around.
        hyperparameters: The student's, under the keys of a checkpoint; changes to them stay in the view.
    """
    weights: Mapping[str, Any] = file.get("state_dict", {})
    names = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    kept = {checkpoint.KEY, KEY, *HYPERPARAMETERS}
    view = {key: value for key, value in file.items() if key not in kept}
    view["state_dict"] = names
    shown = set(view)
    view.update(hyperparameters)
    yield view
    others = {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}
    changed = {f"{_PREFIX}{name}": value for name, value in view["state_dict"].items()}
    for key in shown - view.keys():
        file.pop(key, None)
    file.update({key: value for key, value in view.items() if key not in ("state_dict", *kept)})
    if "state_dict" in file:
        file["state_dict"] = {**changed, **others}


def own_hyperparameters(student: Any) -> dict[str, Any]:
    """Return what Lightning writes into a LightningModule's checkpoint about its hyperparameters."""
    if not is_lightning(student) or not student.hparams:
        return {}
    name = {student.CHECKPOINT_HYPER_PARAMS_NAME: student._hparams_name} if hasattr(student, "_hparams_name") else {}
    return {student.CHECKPOINT_HYPER_PARAMS_KEY: dict(student.hparams), **name}


def plain_hyperparameters(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values among a checkpoint's hyperparameters, and the names of the others."""
    name = pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    values = keys.get(name, {})
    plain = {key: value for key, value in values.items() if _is_plain(value)}
    shown = {**keys, name: plain} if name in keys else {**keys}
    return {"keys": shown, "left_out": [key for key in values if key not in plain]}


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple, set):
        return all(_is_plain(item) for item in value)
    return type(value) in _PLAIN
