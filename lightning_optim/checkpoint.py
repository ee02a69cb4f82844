"""The plan: what of a module's architecture changed, as plain types, and how a fresh module is conformed to it.

A technique that changes a layer calls :meth:`Plan.track` before the change, and that is all it does: whatever
differs from the user's class by then is written under the checkpoint key ``"lightning_optim"``, and a module of the
user's class is made the same shape before its weights are loaded. Three hooks do it, all on the instance:

* ``on_save_checkpoint`` is wrapped, since ``save_weights_only=True`` calls no callback. The wrapper stays on the
  module while it differs from its class.
* ``on_load_checkpoint`` is wrapped from ``Callback.setup`` to ``teardown``, so that a Trainer conforms the module
  before ``load_state_dict`` (https://github.com/Lightning-AI/pytorch-lightning/issues/14447 asks for such a hook).
* :func:`load_from_checkpoint` does the same without a Trainer.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import is_zipfile

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_optim._version import __version__
from lightning_optim.provenance import provenance
from lightning_optim.sharding import own_class, set_class
from lightning_optim.target import averaged_copies

__all__ = [
    "KEY",
    "VERSION",
    "Plan",
    "check_version",
    "conform",
    "is_layer_class",
    "layer_class",
    "load_from_checkpoint",
    "plan_of",
    "read_checkpoint",
]

KEY = "lightning_optim"
"""The checkpoint's top-level key."""

VERSION = 1
"""Version of the plan's layout; a newer one is refused."""

EMPTY: Mapping[str, Any] = {"version": VERSION, "modules": {}, "entries": {}}

_LAYER_CLASSES: dict[str, type[nn.Module]] = {}

T = TypeVar("T", bound=type[nn.Module])
M = TypeVar("M", bound=pl.LightningModule)


def layer_class(cls: T) -> T:
    """Class decorator: a layer class that techniques swap in by ``__class__`` and that plans may therefore name.

    Only such classes are swapped in when a file is loaded; a plan never imports anything.
    """
    _LAYER_CLASSES[_path_of(cls)] = cls
    return cls


def is_layer_class(cls: type) -> bool:
    """Whether a technique swaps the class in."""
    return _LAYER_CLASSES.get(_path_of(cls)) is cls


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _Absent:
    """Stands for an attribute that the user's class does not have; a class is copied and pickled as itself."""


@dataclass
class _Structure:
    """One layer's own structure: class, tracked attributes, and its parameters' and buffers' shapes."""

    layer_class: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, tuple[int, ...] | None]
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype] | None]

    @classmethod
    def of(cls, layer: nn.Module, attributes: Iterable[str]) -> "_Structure":
        return cls(
            own_class(layer),
            {name: getattr(layer, name, _Absent) for name in attributes},
            {name: None if p is None else tuple(p.shape) for name, p in layer._parameters.items()},
            {name: None if b is None else (tuple(b.shape), b.dtype) for name, b in layer._buffers.items()},
        )

    def as_plain(self) -> dict[str, Any]:
        return {
            "class": _path_of(self.layer_class),
            "attributes": {name: value for name, value in self.attributes.items() if value is not _Absent},
            "parameters": dict(self.parameters),
            "buffers": dict(self.buffers),
        }


@dataclass
class Plan:
    """What techniques changed in one module, kept on that module by its save hook.

    Attributes:
        module: The module whose names the plan speaks.
        entries: What each technique contributes besides, by ``state_key``: plain types only.
        provenance: Where the module's weights come from; a file that is loaded and saved again keeps it.
    """

    module: nn.Module
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    _base: dict[str, _Structure] = field(default_factory=dict)

    def track(self, name: str, *attributes: str) -> None:
        """Watch one layer: call it before the layer is changed for the first time.

        Args:
            name: The layer's dotted name below :attr:`module`.
            attributes: Attributes that the technique changes or adds (``in_features``, ``groups``); class, parameters
                and buffers are watched always.
        """
        layer = self.module.get_submodule(name)
        if name not in self._base:
            self._base[name] = _Structure.of(layer, attributes)
        for attribute in attributes:
            self._base[name].attributes.setdefault(attribute, getattr(layer, attribute, _Absent))

    def _now(self, name: str) -> _Structure:
        return _Structure.of(self.module.get_submodule(name), self._base[name].attributes)

    def changed(self) -> dict[str, _Structure]:
        """Return the structure of every tracked layer that differs from the user's class."""
        now = {name: self._now(name) for name in self._base}
        return {name: structure for name, structure in now.items() if structure != self._base[name]}

    def as_plain(self) -> dict[str, Any]:
        """Return the plan as plain types, for a checkpoint."""
        return {
            "version": VERSION,
            "package": __version__,
            "modules": {name: structure.as_plain() for name, structure in self.changed().items()},
            "entries": {key: dict(entry) for key, entry in self.entries.items()},
            "provenance": dict(self.provenance),
        }

    def conform(self, plain: Mapping[str, Any]) -> None:
        """Give :attr:`module` the structure of a plan; layers the plan does not name return to the user's class.

        Parameters whose shape changes are new (zeros, to be loaded); shared ones stay shared. Nothing is changed
        unless the whole plan fits.
        """
        check_version(plain)
        wanted = {name: _from_plain(name, layer, self.module) for name, layer in plain["modules"].items()}
        for name, structure in wanted.items():
            self.track(name, *structure.attributes)
        for name, base in self._base.items():
            structure = wanted.setdefault(name, base)
            structure.attributes = {
                **base.attributes,
                **structure.attributes,
            }  # what the plan does not name is as it was
        replaced: _Replaced = {}
        for name, structure in wanted.items():
            _restructure(self.module.get_submodule(name), structure, replaced)
        _retie(self.module, replaced)
        self.provenance = dict(plain.get("provenance", {}))


_Replaced = dict[int, tuple[nn.Parameter, nn.Parameter]]
"""Old and new parameter by the old one's id; the old one is kept so that its id is not given to another."""


def check_version(plain: Mapping[str, Any]) -> None:
    """Refuse a plan of a newer layout, naming the version that wrote it."""
    version = plain.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"the checkpoint's plan has version {version!r} (written by lightning_optim {plain.get('package', '?')}), "
            f"this lightning_optim {__version__} reads versions up to {VERSION}. Install a newer lightning_optim."
        )


def _from_plain(name: str, plain: Mapping[str, Any], module: nn.Module) -> _Structure:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the checkpoint's plan changes {name!r}, and {type(module).__name__} has no such module: the file was "
            "made by another architecture. Load it into the class (and the arguments) that wrote it."
        ) from None
    missing = [leaf for leaf in plain["parameters"] if leaf not in layer._parameters]
    known = _LAYER_CLASSES | {_path_of(cls): cls for cls in type(layer).__mro__}
    if missing or plain["class"] not in known:
        raise ValueError(
            f"the checkpoint's plan makes {name!r} a {plain['class']} with parameters "
            f"{', '.join(plain['parameters'])}; {type(module).__name__} has a {type(layer).__name__} with "
            f"{', '.join(layer._parameters) or 'none'} there. Load it into the class that wrote it; if the layer class "
            "is your own, import it first."
        )
    return _Structure(known[plain["class"]], plain["attributes"], plain["parameters"], plain["buffers"])


def _restructure(layer: nn.Module, wanted: _Structure, replaced: _Replaced) -> None:
    if own_class(layer) is not wanted.layer_class:
        set_class(layer, wanted.layer_class)
    for name, value in wanted.attributes.items():
        if value is _Absent:
            layer.__dict__.pop(name, None)
        else:
            setattr(layer, name, value)
    for name, shape in wanted.parameters.items():
        parameter = layer._parameters[name]
        if parameter is not None and shape is not None and tuple(parameter.shape) != tuple(shape):
            new = inherit(nn.Parameter(_zeros_like(parameter, tuple(shape)), parameter.requires_grad), parameter)
            layer._parameters[name] = replaced.setdefault(id(parameter), (parameter, new))[1]
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    for name in [name for name in layer._buffers if name not in wanted.buffers]:
        del layer._buffers[name]
    for name, spec in wanted.buffers.items():
        old = layer._buffers.get(name)
        if spec is None:
            layer.register_buffer(name, None)
        elif old is None or (tuple(old.shape), old.dtype) != (tuple(spec[0]), spec[1]):
            layer.register_buffer(name, torch.zeros(spec[0], dtype=spec[1], device=device))


def _zeros_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    """Return zeros of another shape in the memory format of a parameter."""
    zeros = parameter.detach().new_zeros(shape)
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
    if wanted is None or parameter.is_contiguous() or not parameter.is_contiguous(memory_format=wanted):
        return zeros
    return zeros.contiguous(memory_format=wanted)


def inherit(new: nn.Parameter, old: nn.Parameter) -> nn.Parameter:
    """Hand a parameter the Python attributes and hooks of the one it takes the place of."""
    new.__dict__.update(old.__dict__)
    new._backward_hooks = old._backward_hooks
    hooks = getattr(old, "_post_accumulate_grad_hooks", None)
    if hooks is not None:
        new._post_accumulate_grad_hooks = hooks
    return new


def _retie(module: nn.Module, replaced: _Replaced) -> None:
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if id(parameter) in replaced:
                layer._parameters[name] = replaced[id(parameter)][1]


class _Hook:
    """Stands in for one LightningModule hook on the instance; copies and pickles with its module."""

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
        """Put back what the hook stood in for."""
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
    """Conforms the module before Lightning loads the weights."""

    name = "on_load_checkpoint"

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        plain = checkpoint.get(KEY, EMPTY)
        check_version(plain)
        trainer = getattr(self.module, "_trainer", None)
        _check_claims(plain, trainer)
        for module in (self.module, *(averaged_copies(trainer) if trainer is not None else ())):
            plan_of(module).conform(plain)
        self.call_replaced(checkpoint)


def _check_claims(plain: Mapping[str, Any], trainer: Any) -> None:
    """When a run is resumed, every entry of the file's plan must belong to one of the Trainer's callbacks."""
    if trainer is None or trainer.state.fn != "fit":
        return
    keys = [callback.state_key for callback in _contributors(trainer)]
    for entry in plain["entries"]:
        if entry not in keys:
            raise MisconfigurationException(
                f"the checkpoint holds the state of {entry}, and the Trainer's callbacks are "
                f"{', '.join(keys) or 'none of its kind'}. Resume with the same `module`, `include` and `exclude`."
            )


def write_plan(plan: Plan, file: dict[str, Any]) -> None:
    """Write into a checkpoint a module's structure, what each technique contributes, and where the file comes from."""
    trainer = getattr(plan.module, "_trainer", None)
    contributors = _contributors(trainer)
    plan.entries |= {callback.state_key: callback.plan_entry() for callback in contributors}
    trains = trainer is not None and trainer.state.fn == "fit"  # validated and saved again, it is what it was
    if trains or not plan.provenance:
        plan.provenance = provenance(plan.module, trainer, contributors)
    file[KEY] = plan.as_plain()


def _contributors(trainer: Any) -> list[Any]:
    """Return the Trainer's compression callbacks, by the mark they carry: this module does not know them."""
    callbacks = [] if trainer is None else trainer.callbacks
    return [callback for callback in callbacks if getattr(callback, "contributes_to_plan", False)]


def plan_of(module: nn.Module) -> Plan:
    """Return the module's plan, which its save hook holds; a module without one gets an empty one."""
    hook = module.__dict__.get(_SaveHook.name)
    return hook.plan if isinstance(hook, _SaveHook) else _SaveHook(module).plan


def plain_plan(module: nn.Module) -> dict[str, Any]:
    """Return what would be written for a module now, without attaching anything to it."""
    hook = module.__dict__.get(_SaveHook.name)
    return hook.plan.as_plain() if isinstance(hook, _SaveHook) else dict(EMPTY)


def share_plan(module: nn.Module, name: str) -> None:
    """Let a module and one below it know of each other's changes, so that both write them into their checkpoints.

    Args:
        module: The module around.
        name: Dotted name of the one below; only what lies in it is shared.
    """
    below = module.get_submodule(name)
    outer, inner = plan_of(module), plan_of(below)
    for own, base in list(inner._base.items()):
        outer._base.setdefault(f"{name}.{own}".rstrip("."), base)
    for full, base in list(outer._base.items()):
        if full == name or full.startswith(f"{name}."):
            inner._base.setdefault(full.removeprefix(name).removeprefix("."), base)
    for each in (module, below):
        detach(each)


def plan_below(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a plan as it is for the module ``name`` alone: its names lose the prefix, other modules are dropped."""
    modules = {
        full.removeprefix(name).removeprefix("."): structure
        for full, structure in plain["modules"].items()
        if full == name or full.startswith(f"{name}.")
    }
    return {**plain, "modules": modules}


def attach(module: nn.Module) -> None:
    """Wrap a LightningModule's checkpoint hooks on the instance; wrapping twice is harmless."""
    plan_of(module)
    if not isinstance(module.__dict__.get(_LoadHook.name), _LoadHook):
        _LoadHook(module)


def detach(module: nn.Module) -> None:
    """Unwrap the hooks; the save hook stays while the module differs from its class."""
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
    """
    plan_of(module).conform(plan)
    detach(module)


def load_from_checkpoint(cls_or_module: type[M] | M, path: str | Path, **init_args: Any) -> M:
    """Load a checkpoint written with lightning_optim's callbacks into the user's own class, without the run.

    Args:
        cls_or_module: The LightningModule class, or an instance of it (which is changed in place).
        path: The checkpoint file. It is read with ``weights_only=True``.
        init_args: Arguments of the class, over those that the file's hyperparameters give.

    Returns:
        The module with the checkpoint's architecture and weights, on the device the weights were saved from where
        that exists. It trains, exports and saves like any other module of its class.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete checkpoint, is of a newer plan version, or does not fit the class.
    """
    cls = cls_or_module if isinstance(cls_or_module, type) else type(cls_or_module)
    if not any(base.__name__ == "LightningModule" for base in cls.__mro__):  # of lightning or of pytorch_lightning
        raise TypeError(f"expected a LightningModule class or instance, got {cls_or_module!r}.")
    checkpoint = read_checkpoint(path)
    if isinstance(cls_or_module, type):
        arguments = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_class_path" in arguments:
            return _load_instance(_made_by_cli(cls_or_module, {**arguments, **init_args}), checkpoint)
        return _load_class(cls_or_module, path, init_args)
    if init_args:
        raise TypeError(f"init arguments ({', '.join(init_args)}) go with a class; an instance was given.")
    return _load_instance(cls_or_module, checkpoint)


def _made_by_cli(cls: type[M], arguments: Mapping[str, Any]) -> M:
    """Make a module as LightningCLI did, whose checkpoints hold arguments in its own form.

    Lightning's loader would look for the class among the subclasses of the one that conforms, and not find it.
    """
    from lightning.pytorch.cli import instantiate_module

    module: M = instantiate_module(cls, {name: value for name, value in arguments.items() if name[0] != "_"})
    if is_overridden("configure_model", module):
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


def _load_class(cls: type[M], path: str | Path, init_args: dict[str, Any]) -> M:
    """Let Lightning's own loader do it, conforming the module at the one place where its weights are not in yet."""

    def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.__class__ = cls
        conform(self, checkpoint.get(KEY, EMPTY))
        self.on_load_checkpoint(checkpoint)

    namespace = {
        "on_load_checkpoint": on_load_checkpoint,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    conforming: Any = type(cls.__name__, (cls,), namespace)
    loaded: M = conforming.load_from_checkpoint(path, weights_only=True, **init_args)
    return loaded


_UNSAFE = (
    "{!r} holds objects that are not read with weights_only=True ({}). Keep hyperparameters to plain values "
    "(save_hyperparameters(ignore=[...]) leaves the others out). A file that you trust is loaded by "
    "torch.load(path, weights_only=False), and saved again without them."
)


def _reason(error: Exception) -> str:
    """Return the line of torch's text that names what is not read, without its colours."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line), lines[0])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file on the CPU, with ``weights_only=True``; the tensors stay on the disk until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete Lightning checkpoint; the sentence says what it is instead.
    """
    if (Path(path) / "meta.pt").is_file():  # as lightning_optim.strategies.sharded_files.is_sharded_folder
        raise ValueError(
            f"{str(path)!r} is a folder to which each process wrote its part. Make one file of it with "
            "lightning_optim.strategies.consolidate(folder, file), and load that."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, OSError) as error:
        if isinstance(error, UnpicklingError) and is_zipfile(path):
            raise ValueError(_UNSAFE.format(str(path), _reason(error))) from error
        raise ValueError(
            f"{str(path)!r} is not a complete Lightning checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'empty'}). Was the run killed while writing it? Take an "
            "earlier file."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint
