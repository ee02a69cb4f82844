"""The student's hooks, called by the Trainer of the module around it.

What the module around lacks is the student's, attributes and hooks alike. Attributes take one method
(``wrapper.StandsForStudent.__getattr__``). It is never asked for a hook, because Lightning's base class defines every
one of them. Nor is a method enough that forwards: Lightning compares a hook's ``__code__`` with the base class's to see
whether it is overridden (``is_overridden``), before it sets up validation, clipping, loaders or sharding, and reads its
signature to decide what to pass. So a hook that the student overrides gets a stand-in on the instance that has both.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.distillation.indexed import Indexed, without_index
from lightning_optim.target import batch_inputs, lightning_class

__all__ = [
    "FORWARDED",
    "OWN",
    "StudentHook",
    "as_student",
    "builds_layers_in",
    "call_student",
    "install_hooks",
    "is_lightning",
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
"""Hooks that the distillation module defines, and from which it calls the student's."""

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
"""Hooks that LightningModule defines itself, among methods that users call (``log``, ``freeze``, ``to_onnx``).

Lightning does not mark which is which. The three classes of hooks below hold nothing else and are taken whole.
"""

FORWARDED = tuple(
    name
    for name in (
        *(
            name
            for cls in (ModelHooks, DataHooks, CheckpointHooks)
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and not name.startswith("_")
        ),
        *_OF_THE_MODULE,
    )
    if name not in OWN
)
"""Every hook that Lightning calls and the student may override."""

_RETURN_A_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class StudentHook:
    """Stands in for one hook on an instance of a distillation module; it is copied and pickled with the instance.

    It has a code object and a signature, because Lightning reads both. If a subclass of the distillation module
    overrides a hook named ``on_...`` as well, its method runs after the student's.
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
        """Call the student's hook, and then the subclass's."""
        result = call_student(self.module.student, self.name, *args, **kwargs)
        if is_chained(self.name) and _overridden(type(self.module), self.name):
            own = getattr(type(self.module), self.name)(self.module, *args, **kwargs)
            return own if result is None else result
        return result


class PlainStep:
    """A step that a distillation module has for a plain student only.

    It is on the instance, because Lightning takes any class that defines ``validation_step`` for one that validates.
    """

    def __init__(self, module: Any, stage: str) -> None:
        self.module = module
        self.stage = stage

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    def __call__(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """Validate or test the student by its task loss, or predict with it."""
        module, item = self.module, without_index(batch)
        output = batch_inputs(module.student, item).call(module.student)
        if self.stage == "predict":
            return output
        rows = module.get_logits(output).shape[0]
        module.log(f"{self.stage}_loss", module.task_loss(output, item), sync_dist=True, batch_size=rows)
        return None


def install_hooks(module: pl.LightningModule, student: Any) -> None:
    """Put the student's hooks on a module, where the module's class has no hook of its own.

    Args:
        module: The distillation module.
        student: Its student. For a plain module, the module gets steps that validate, test and predict with it.
    """
    if is_lightning(student):
        for name in FORWARDED:
            own = _overridden(type(module), name) and not is_chained(name)
            if not own and is_overridden(name, student, lightning_class(student)):
                module.__dict__[name] = StudentHook(module, name)
        return
    for name, stage in (("validation_step", "val"), ("test_step", "test"), ("predict_step", "predict")):
        if not _overridden(type(module), name):
            module.__dict__[name] = PlainStep(module, stage)


def is_chained(name: str) -> bool:
    """Whether both the student's and the subclass's hook run: those that only observe."""
    return name.startswith("on_") and name not in _RETURN_A_BATCH


def _overridden(cls: type, name: str) -> bool:
    base = next(parent for parent in cls.__mro__ if parent.__name__ == "LightningModule")
    return getattr(cls, name) is not getattr(base, name)


def is_lightning(module: object) -> TypeGuard[pl.LightningModule]:
    """Whether a module is a LightningModule, of ``lightning`` or of ``pytorch_lightning``."""
    return lightning_class(module) is not None


def builds_layers_in(student: Any, *hooks: str) -> bool:
    """Whether a student may create layers in one of these hooks."""
    return is_lightning(student) and any(is_overridden(hook, student, lightning_class(student)) for hook in hooks)


def call_student(student: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook of the student as the Trainer would, with batches that carry no index; None for a plain module."""
    if not is_lightning(student):
        return None
    bare = [without_index(arg) for arg in args]
    named = {key: without_index(arg) for key, arg in kwargs.items()}
    with as_student(student, name):
        result = getattr(student, name)(*bare, **named)
    indexed = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Indexed)), None)
    return Indexed(result, indexed.index) if indexed is not None and name in _RETURN_A_BATCH else result


@contextmanager
def as_student(student: pl.LightningModule, hook: str) -> Iterator[None]:
    """Let ``self.log`` of the student work: Lightning refuses it outside a hook."""
    before = student._current_fx_name
    student._current_fx_name = hook
    try:
        yield
    finally:
        student._current_fx_name = before
