"""Writes a module's plan into checkpoints, and reads it from them.

The plan (:mod:`lightning_optim.plan`) is stored under the checkpoint key ``"lightning_optim"``. Before weights are
loaded, a module of the user's class gets the structure that the plan describes. It works in three places:

* ``on_save_checkpoint`` is wrapped on the instance, since Lightning calls no callback when it saves with
  ``save_weights_only=True``. The wrapper stays on the module while the module differs from its class.
* ``on_load_checkpoint`` is wrapped from ``Callback.setup`` to ``teardown``, so that a Trainer conforms the module
  before ``load_state_dict`` (https://github.com/Lightning-AI/pytorch-lightning/issues/14447 asks for such a hook).
* :func:`load_from_checkpoint` does the same without a Trainer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any, TypeVar
from zipfile import is_zipfile

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_optim.files import is_sharded_folder
from lightning_optim.optimizers import following
from lightning_optim.plan import EMPTY, KEY, VERSION, Contributor, Plan, check_version
from lightning_optim.provenance import provenance
from lightning_optim.structure import inherit, is_layer_class, layer_class
from lightning_optim.target import averaged_copies, lightning_class

__all__ = [
    "EMPTY",
    "KEY",
    "VERSION",
    "Plan",
    "check_version",
    "conform",
    "inherit",
    "is_layer_class",
    "layer_class",
    "load_from_checkpoint",
    "plan_of",
    "read_checkpoint",
]

M = TypeVar("M", bound=pl.LightningModule)


class _Hook:
    """Replaces one LightningModule hook on the instance; copied and pickled with its module."""

    name: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced: Callable[..., Any] | None = module.__dict__.get(self.name)
        module.__dict__[self.name] = self

    def call_replaced(self, *args: Any) -> None:
        if self.replaced is not None:
            self.replaced(*args)
        else:
            getattr(type(self.module), self.name)(self.module, *args)

    def remove(self) -> None:
        """Restore the hook that was replaced."""
        if self.module.__dict__.get(self.name) is not self:
            return
        del self.module.__dict__[self.name]
        if self.replaced is not None:
            self.module.__dict__[self.name] = self.replaced


class _SaveHook(_Hook):
    """Holds the module's plan and writes it into every checkpoint."""

    name = "on_save_checkpoint"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.plan = Plan(module)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.call_replaced(checkpoint)
        write_plan(self.plan, checkpoint)


class _LoadHook(_Hook):
    """Conforms the module before Lightning loads the weights.

    It is the module's hook, not the callback's: ``_CheckpointConnector.restore_model`` (Lightning 2.6) calls the
    module's ``on_load_checkpoint`` right before ``load_state_dict``, while ``Callback.on_load_checkpoint`` and
    ``Callback.load_state_dict`` come after the weights are in, when shapes that differ have raised already
    (https://github.com/Lightning-AI/pytorch-lightning/issues/14447).
    """

    name = "on_load_checkpoint"

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        plain = checkpoint.get(KEY, EMPTY)
        check_version(plain)
        _check_class(checkpoint, type(self.module))
        trainer = getattr(self.module, "_trainer", None)
        if trainer is not None and trainer.state.fn == "fit":
            _check_claims(plain, plan_of(self.module).contributors(trainer))
        for module in (self.module, *(averaged_copies(trainer) if trainer is not None else ())):
            with following(module):
                plan_of(module).conform(plain)
        self.call_replaced(checkpoint)


DISTILLATION = "distillation"
"""The top-level key of a distillation's checkpoints."""


def _check_class(checkpoint: Mapping[str, Any], cls: type) -> None:
    """Reject a distillation's file for the student's own class: its keys begin with ``student.``."""
    if DISTILLATION in checkpoint and not hasattr(cls, "optim_target"):
        raise ValueError(
            f"the checkpoint is that of a DistillationModule, and {cls.__name__} is no such module. Write its student "
            "alone, lightning_optim.student_only(checkpoint, 'student.ckpt'), and load that."
        )


def _check_claims(plain: Mapping[str, Any], contributors: Iterable[Contributor]) -> None:
    """Reject the file of a resumed run unless every entry of its plan belongs to one of the Trainer's callbacks."""
    keys = [callback.state_key for callback in contributors]
    for entry in plain["entries"]:
        if entry not in keys:
            raise MisconfigurationException(
                f"the checkpoint holds the state of {entry}, and the Trainer's callbacks are "
                f"{', '.join(keys) or 'none of its kind'}. Resume with the same `module`, `include` and `exclude`."
            )


def write_plan(plan: Plan, file: dict[str, Any]) -> None:
    """Write a module's structure, the entry of each technique and the provenance into a checkpoint."""
    trainer = getattr(plan.module, "_trainer", None)
    contributors = () if trainer is None else plan.contributors(trainer)
    plan.entries |= {callback.state_key: callback.plan_entry() for callback in contributors}
    trains = trainer is not None and trainer.state.fn == "fit"  # validated and saved again, it is what it was
    if trains or not plan.provenance:
        plan.provenance = provenance(plan.module, trainer, contributors)
    file[KEY] = plan.as_plain()


def plan_of(module: nn.Module) -> Plan:
    """Return the module's plan, which its save hook holds; a module without one gets an empty one."""
    hook = module.__dict__.get(_SaveHook.name)
    return hook.plan if isinstance(hook, _SaveHook) else _SaveHook(module).plan


def plain_plan(module: nn.Module) -> dict[str, Any]:
    """Return the plan that would be written for a module now, without attaching anything to it."""
    hook = module.__dict__.get(_SaveHook.name)
    return hook.plan.as_plain() if isinstance(hook, _SaveHook) else dict(EMPTY)


def share_plan(module: nn.Module, name: str) -> None:
    """Share changes between the plans of a module and of a submodule, so that both write them into their checkpoints.

    Args:
        module: The outer module.
        name: Dotted name of the submodule; only changes inside it are shared.
    """
    below = module.get_submodule(name)
    outer, inner = plan_of(module), plan_of(below)
    for own, base in list(inner._base.items()):
        outer._base.setdefault(f"{name}.{own}".rstrip("."), base)
    for full, base in list(outer._base.items()):
        if full == name or full.startswith(f"{name}."):
            inner._base.setdefault(full.removeprefix(name).removeprefix("."), base)
    inner.contributors = outer.contributors
    for each in (module, below):
        detach(each)


def plan_below(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the part of a plan that describes the submodule ``name``, with names relative to it."""
    modules = {
        full.removeprefix(name).removeprefix("."): structure
        for full, structure in plain["modules"].items()
        if full == name or full.startswith(f"{name}.")
    }
    return {**plain, "modules": modules}


def attach(module: nn.Module, contributors: Callable[[Any], Sequence[Contributor]] | None = None) -> None:
    """Wrap a LightningModule's checkpoint hooks on the instance; wrapping twice is harmless.

    Args:
        module: The LightningModule.
        contributors: Function of a Trainer that returns those of its callbacks that add entries to the plan.
    """
    plan = plan_of(module)
    if contributors is not None:
        plan.contributors = contributors
    if not isinstance(module.__dict__.get(_LoadHook.name), _LoadHook):
        _LoadHook(module)


def detach(module: nn.Module) -> None:
    """Remove the hooks; the save hook stays while the module differs from its class."""
    for name in (_LoadHook.name, _SaveHook.name):
        hook = module.__dict__.get(name)
        if isinstance(hook, _LoadHook) or (isinstance(hook, _SaveHook) and not hook.plan.changed()):
            hook.remove()


def conform(module: nn.Module, plan: Mapping[str, Any]) -> None:
    """Give a module of the user's class the structure that a checkpoint's plan describes, in place.

    Afterwards ``module.load_state_dict`` takes the checkpoint's weights, and a checkpoint saved from ``module``
    carries the plan again. Conforming works both ways: an empty plan returns the module to its class's structure.

    Args:
        module: A LightningModule (or the module whose names the plan speaks).
        plan: ``checkpoint["lightning_optim"]``.

    Raises:
        ValueError: If the plan is of a newer version, or does not fit the module. The module is then unchanged.

    Examples:
        >>> checkpoint = torch.load("pruned.ckpt", weights_only=True)  # doctest: +SKIP
        >>> conform(module, checkpoint)  # now its shapes are those of the file  # doctest: +SKIP
        >>> module.load_state_dict(checkpoint["state_dict"])  # doctest: +SKIP
    """
    plan_of(module).conform(plan)
    detach(module)


def load_from_checkpoint(
    cls_or_module: type[M] | M, path: str | Path, *, weights_only: bool = True, **init_args: Any
) -> M:
    """Load a checkpoint written with lightning_optim's callbacks into the user's own class, without the run.

    Args:
        cls_or_module: The LightningModule class, or an instance of it (which is changed in place).
        path: The checkpoint file.
        weights_only: Read nothing but tensors and plain types. False runs whatever code the file names, as
            ``torch.load`` does: only for a file that you trust, such as one whose hyperparameters hold objects.
        init_args: Arguments of the class, over those that the file's hyperparameters give.

    Returns:
        The module with the checkpoint's architecture and weights, on the device the weights were saved from where
        that exists. It trains, exports and saves like any other module of its class.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``cls_or_module`` is no LightningModule, or init arguments come with an instance.
        ValueError: If the file is not a complete checkpoint, holds objects that ``weights_only=True`` does not read, is
            of a newer plan version, of a DistillationModule (see :func:`student_only`), or does not fit the class.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lightning.pytorch as pl
        >>> from lightning_optim import prune_channels
        >>> from lightning_optim.demo import DigitsNet
        >>> net = DigitsNet(8)
        >>> report = prune_channels(net, torch.zeros(1, 1, 8, 8), pruning_ratio=0.5)
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False)
        >>> trainer.strategy.connect(net)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(Path(folder, "pruned.ckpt"))
        ...     again = load_from_checkpoint(DigitsNet, Path(folder, "pruned.ckpt"))
        >>> again.net[0].out_channels == net.net[0].out_channels < 8
        True
    """
    cls = cls_or_module if isinstance(cls_or_module, type) else type(cls_or_module)
    if not any(base.__name__ == "LightningModule" for base in cls.__mro__):  # of lightning or of pytorch_lightning
        raise TypeError(f"expected a LightningModule class or instance, got {cls_or_module!r}.")
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    _check_class(checkpoint, cls)
    if isinstance(cls_or_module, type):
        arguments = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_class_path" in arguments:
            return _load_instance(_made_by_cli(cls_or_module, {**arguments, **init_args}), checkpoint)
        return _load_by_class(cls_or_module, path, weights_only, init_args)
    if init_args:
        raise TypeError(f"init arguments ({', '.join(init_args)}) go with a class; an instance was given.")
    return _load_instance(cls_or_module, checkpoint)


def _load_by_class(cls: type[M], path: str | Path, weights_only: bool, init_args: Mapping[str, Any]) -> M:
    """Let the class make itself from its file; the file was read with ``weights_only`` before."""
    loaded: M
    with _conforming(cls):
        try:
            loaded = cls.load_from_checkpoint(path, weights_only=weights_only, **init_args)
        except TypeError as error:
            if "'weights_only'" not in str(error):
                raise
            loaded = cls.load_from_checkpoint(path, **init_args)  # a loader of its own sets it itself (chemprop 2.3)
    return loaded


def _made_by_cli(cls: type[M], arguments: Mapping[str, Any]) -> M:
    """Make a module as LightningCLI did, whose checkpoints hold arguments in its own form."""
    from lightning.pytorch.cli import instantiate_module

    module: M = instantiate_module(cls, {name: value for name, value in arguments.items() if name[0] != "_"})
    if is_overridden("configure_model", module, lightning_class(module)):
        module.configure_model()
    return module


def _load_instance(module: M, checkpoint: dict[str, Any]) -> M:
    attach(module)
    try:
        module.on_load_checkpoint(checkpoint)
    finally:
        detach(module)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    return module


_CLASS_LOCK = RLock()
"""Classes are changed by one thread at a time."""


@contextmanager
def _conforming(cls: type[pl.LightningModule]) -> Iterator[None]:
    """Let Lightning's own loader conform what it makes of a class, at the one place where no weights are in it yet.

    The class itself is given the hook for that time. A subclass would be entered in the registries that many classes
    keep of their subclasses.
    """
    name = _LoadHook.name
    with _CLASS_LOCK:
        original, own = getattr(cls, name), vars(cls).get(name)

        def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
            conform(self, checkpoint.get(KEY, EMPTY))
            original(self, checkpoint)

        setattr(cls, name, on_load_checkpoint)
        try:
            yield
        finally:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


_UNSAFE = (
    "{!r} holds objects that are not read with weights_only=True ({}). If you trust the file, load it with "
    "lightning_optim.load_from_checkpoint(..., weights_only=False). To write files without them, keep "
    "hyperparameters to plain values: save_hyperparameters(ignore=[...]) leaves the others out."
)


def _reason(error: Exception) -> str:
    """Return what torch could not read, without its color codes and its advice."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()] or ["empty"]
    line = next((line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line), lines[0])
    return line.partition(". Please use")[0]


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint file on the CPU; the tensors stay on the disk until they are used.

    Args:
        path: The file.
        weights_only: Read nothing but tensors and plain types; False only for a file that is trusted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete Lightning checkpoint; the sentence says what it is instead.
    """
    if is_sharded_folder(path):
        raise ValueError(
            f"{str(path)!r} is a folder to which each process wrote its part. Make one file of it with "
            "lightning_optim.strategies.consolidate(folder, file), and load that."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=is_zipfile(path))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} holds an object whose class cannot be imported here ({error}). Import the module that "
            "defines it before loading."
        ) from error
    except (RuntimeError, EOFError, UnpicklingError, ValueError, OSError) as error:
        foreign = isinstance(error, UnpicklingError)
        if foreign and (is_zipfile(path) or "Unsupported global" in str(error)):
            raise ValueError(_UNSAFE.format(str(path), _reason(error))) from error
        detail = "torch.save did not write it" if foreign else f"{type(error).__name__}: {_reason(error)}"
        raise ValueError(
            f"{str(path)!r} is not a complete Lightning checkpoint ({detail}). Was the run killed while writing it? "
            "Take an earlier file."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint
