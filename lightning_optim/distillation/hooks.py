"""The student's own hooks, run by the Trainer of the module around it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim import checkpoint
from lightning_optim.distillation.cache import Indexed
from lightning_optim.target import lightning_class

__all__ = [
    "FORWARDED",
    "HYPERPARAMETERS",
    "OWN",
    "StudentHook",
    "as_student",
    "install_hooks",
    "install_plain_steps",
    "is_lightning",
    "student_view",
]

OWN = frozenset(
    {
        "forward",
        "training_step",
        "configure_optimizers",
        "setup",
        "teardown",
        "on_fit_start",
        "on_save_checkpoint",
        "on_load_checkpoint",
    }
)
"""Hooks the distillation module has itself, and calls the student's from."""

_OF_THE_MODULE = (
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_gradient_clipping",
    "backward",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
)


def _forwarded() -> tuple[str, ...]:
    hooks = [
        name
        for cls in (ModelHooks, DataHooks, CheckpointHooks)
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ]
    return tuple(name for name in (*hooks, *_OF_THE_MODULE) if name not in OWN)


FORWARDED = _forwarded()
"""Every hook that Lightning calls and the student may override."""

_GIVE_A_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class StudentHook:
    """Stands in for one hook on the instance of a distillation module; copies and pickles with it.

    Lightning asks whether a hook is overridden by its code object and how it is called by its signature, so it has
    both. A hook named ``on_...`` that a subclass of the distillation module overrides too runs after the student's.
    """

    def __init__(self, module: pl.LightningModule, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        method = getattr(self.module.student, self.name)
        return inspect.signature(getattr(method, "__func__", method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student's hook, and the subclass's own."""
        result = call_student(self.module.student, self.name, *args, **kwargs)  # type: ignore[arg-type]
        if is_chained(self.name) and _overridden(type(self.module), self.name):
            own = getattr(type(self.module), self.name)(self.module, *args, **kwargs)
            return own if result is None else result
        return result


def is_chained(name: str) -> bool:
    """Whether student and subclass both run: in hooks that only look on."""
    return name.startswith("on_") and name not in _GIVE_A_BATCH


def _overridden(cls: type, name: str) -> bool:
    base = next(each for each in cls.__mro__ if each.__name__ == "LightningModule")
    return getattr(cls, name) is not getattr(base, name)


def install_hooks(module: pl.LightningModule, student: pl.LightningModule) -> None:
    """Let a module answer with the student's hooks, where the student has its own."""
    for name in FORWARDED:
        own = _overridden(type(module), name) and not is_chained(name)
        if is_overridden(name, student, lightning_class(student)) and not own:
            module.__dict__[name] = StudentHook(module, name)


class PlainStep:
    """A step that a distillation module has only for a plain student."""

    def __init__(self, module: Any, stage: str) -> None:
        self.module = module
        self.stage = stage

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    def __call__(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """Run the step."""
        return self.module.plain_step(self.stage, batch)


def install_plain_steps(module: pl.LightningModule) -> None:
    """Let a module validate, test and predict with a plain student, where a subclass does not say how."""
    for name, stage in (("validation_step", "val"), ("test_step", "test"), ("predict_step", "predict")):
        if not _overridden(type(module), name):
            module.__dict__[name] = PlainStep(module, stage)


def is_lightning(module: object) -> TypeGuard[pl.LightningModule]:
    """Whether a module is a LightningModule, of ``lightning`` or of ``pytorch_lightning``."""
    return lightning_class(module) is not None


def call_student(student: pl.LightningModule, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook of the student as the Trainer would; an indexed batch comes and goes without its index."""
    bare = [arg.item if isinstance(arg, Indexed) else arg for arg in args]
    named = {key: arg.item if isinstance(arg, Indexed) else arg for key, arg in kwargs.items()}
    with as_student(student, name):
        result = getattr(student, name)(*bare, **named)
    given = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Indexed)), None)
    return Indexed(result, given.index) if given is not None and name in _GIVE_A_BATCH else result


@contextmanager
def as_student(student: pl.LightningModule, hook: str) -> Iterator[None]:
    """Let ``self.log`` of the student work: Lightning refuses it outside a hook."""
    before = student._current_fx_name
    student._current_fx_name = hook
    try:
        yield
    finally:
        student._current_fx_name = before


HYPERPARAMETERS = ("hyper_parameters", "hparams_name", "hparams_type")
"""Keys under which Lightning writes what a module was made from."""


@contextmanager
def student_view(
    file: dict[str, Any], hyperparameters: Mapping[str, Any], prefix: str = "student."
) -> Iterator[dict[str, Any]]:
    """Show a checkpoint as the student's own: its hooks find their names in ``state_dict``, and may change them.

    Args:
        file: The checkpoint of the module around.
        hyperparameters: The student's, under the keys of a checkpoint; what a hook makes of them stays in the view.
        prefix: Of the student's names in ``state_dict``.
    """
    weights: Mapping[str, Any] = file.get("state_dict", {})
    names = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    kept = {checkpoint.KEY, checkpoint.DISTILLATION, *HYPERPARAMETERS}
    view = {key: value for key, value in file.items() if key not in kept}
    view["state_dict"] = names
    shown = set(view)
    view.update(hyperparameters)
    yield view
    others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    changed = {f"{prefix}{name}": value for name, value in view["state_dict"].items()}
    for key in shown - view.keys():
        file.pop(key, None)
    file.update({key: value for key, value in view.items() if key not in ("state_dict", *kept)})
    if "state_dict" in file:
        file["state_dict"] = {**changed, **others}
