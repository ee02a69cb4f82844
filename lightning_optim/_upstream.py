"""The private names of torch, Lightning and torch-pruning that the package relies on, each with its reason.

No other file imports such a name. Each is looked up when it is used: importing the package needs none of them, and a
missing one raises an error that says what does not work without it, and what to do.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

__all__ = [
    "ATTRIBUTES",
    "NAMES",
    "OVERRIDES",
    "Attribute",
    "BatchNorm",
    "NormBase",
    "OpOverload",
    "Override",
    "Private",
    "SubprocessScriptLauncher",
    "UpstreamChangedError",
    "check",
    "compress_hook",
    "destroy_dist_connection",
    "dispatch_mode",
    "is_interactive",
    "materialize_distributed_module",
    "optimizers_to_device",
    "require",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]


class UpstreamChangedError(RuntimeError):
    """A private name that the package relies on is missing upstream, or takes other arguments."""


@dataclass(frozen=True)
class Private:
    """A private name that the package imports.

    Attributes:
        module: The module that defines it.
        name: The name.
        why: What the package uses it for.
        seen: The version it was last seen in.
        without: What a user can do if it is missing.
    """

    module: str
    name: str
    why: str
    seen: str
    without: str


@dataclass(frozen=True)
class Override:
    """A private method that a class of the package overrides: under another name it would never be called.

    Attributes:
        owner: Name of the upstream class.
        name: Name of the method.
        parameters: Names of its parameters, without ``self``.
        why: What the override does.
        seen: The version it was last seen in.
        without: What a user can do if it is missing.
    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    why: str
    seen: str
    without: str


@dataclass(frozen=True)
class Attribute:
    """A private attribute of an upstream object that the package reads or sets.

    Attributes:
        owner: Name of the upstream class.
        name: Name of the attribute.
        why: What the package uses it for.
        seen: The version it was last seen in.
        without: What a user can do if it is missing.
    """

    owner: str
    name: str
    why: str
    seen: str
    without: str


LIGHTNING, TORCH, TORCH_PRUNING = "lightning 2.6.6", "torch 2.13.0", "torch-pruning 1.6.1"
_OLDER = "Install the version it was seen in."
_DDP_INSTEAD = f"Take Trainer(strategy='optim_ddp'), or: {_OLDER[0].lower()}{_OLDER[1:]}"
_PYTREE = "walks nested inputs and outputs of models"

NAMES: Mapping[str, Private] = {
    "destroy_dist_connection": Private(
        "lightning.fabric.utilities.distributed",
        "_destroy_dist_connection",
        "ends the process group before the interpreter does",
        LIGHTNING,
        _OLDER,
    ),
    "SubprocessScriptLauncher": Private(
        "lightning.pytorch.strategies.launchers.subprocess_script",
        "_SubprocessScriptLauncher",
        "finds the processes that rank 0 started, to end them when rank 0 fails",
        LIGHTNING,
        f"Launch with torchrun. Or: {_OLDER}",
    ),
    "is_interactive": Private(
        "lightning.fabric.utilities.imports",
        "_IS_INTERACTIVE",
        "OptimFSDP2 rejects a notebook, which cannot start processes that keep their shards",
        LIGHTNING,
        _DDP_INSTEAD,
    ),
    "materialize_distributed_module": Private(
        "lightning.fabric.utilities.init",
        "_materialize_distributed_module",
        "OptimFSDP2 allocates layers that `configure_model` created on the meta device",
        LIGHTNING,
        _DDP_INSTEAD,
    ),
    "optimizers_to_device": Private(
        "lightning.fabric.utilities.optimizer",
        "_optimizers_to_device",
        "OptimFSDP2 moves restored optimizer states to the device",
        LIGHTNING,
        _DDP_INSTEAD,
    ),
    "compress_hook": Private(
        "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
        "_compress_hook",
        "OptimDDP(compress=...) sends gradients in half precision, with gloo as well",
        TORCH,
        f"Take Trainer(strategy='optim_ddp'). Or: {_OLDER}",
    ),
    "BatchNorm": Private("torch.nn.modules.batchnorm", "_BatchNorm", "recognizes any BatchNorm", TORCH, _OLDER),
    "NormBase": Private(
        "torch.nn.modules.batchnorm",
        "_NormBase",
        "recognizes any BatchNorm and InstanceNorm",
        TORCH,
        _OLDER,
    ),
    "OpOverload": Private("torch._ops", "OpOverload", "reads the operators of an exported graph", TORCH, _OLDER),
    "dispatch_mode": Private(
        "torch.utils._python_dispatch",
        "TorchDispatchMode",
        "the check of channel pruning computes in float64 and over the kept channels",
        TORCH,
        _OLDER,
    ),
    "tree_leaves": Private("torch.utils._pytree", "tree_leaves", _PYTREE, TORCH, _OLDER),
    "tree_flatten": Private("torch.utils._pytree", "tree_flatten", _PYTREE, TORCH, _OLDER),
    "tree_flatten_with_path": Private("torch.utils._pytree", "tree_flatten_with_path", _PYTREE, TORCH, _OLDER),
    "tree_map_only": Private("torch.utils._pytree", "tree_map_only", _PYTREE, TORCH, _OLDER),
    "tree_unflatten": Private("torch.utils._pytree", "tree_unflatten", _PYTREE, TORCH, _OLDER),
}
"""Name in this module -> the private name it stands for."""

OVERRIDES: tuple[Override, ...] = (
    Override(
        "ModelCheckpoint",
        "_save_topk_checkpoint",
        ("trainer", "monitor_candidates"),
        "CompressedCheckpoint saves no model before it is compressed",
        LIGHTNING,
        f"Monitor 'P' with ModelCheckpoint and PerformanceScore, or: {_OLDER[0].lower()}{_OLDER[1:]}",
    ),
    Override("DDPStrategy", "_register_ddp_hooks", (), "OptimDDP compresses gradients", LIGHTNING, _OLDER),
    Override(
        "ModelParallelStrategy", "_configure_launcher", (), "OptimFSDP2 checks its sizes first", LIGHTNING, _DDP_INSTEAD
    ),
    Override(
        "LightningCLI",
        "_parse_ckpt_path",
        (),
        "a checkpoint's arguments do not override those of the configuration",
        LIGHTNING,
        _OLDER,
    ),
    Override(
        "DependencyGraph",
        "_trace_computational_graph",
        ("module2node", "output", "gradfn2module", "reused", "visited"),
        "channel pruning follows the parts of a split",
        TORCH_PRUNING,
        _OLDER,
    ),
)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("ModelCheckpoint", "_last_global_step_saved", "writes last.ckpt without a top-k file", LIGHTNING, _OLDER),
    Attribute("ModelParallelStrategy", "_layer_sync", "rejects or applies SyncBatchNorm", LIGHTNING, _OLDER),
    Attribute("ModelParallelStrategy", "_data_parallel_size", "sets the sizes of the mesh", LIGHTNING, _DDP_INSTEAD),
    Attribute("ModelParallelStrategy", "_tensor_parallel_size", "sets the sizes of the mesh", LIGHTNING, _DDP_INSTEAD),
    Attribute(
        "ModelParallelStrategy", "_save_distributed_checkpoint", "writes a file or a folder", LIGHTNING, _DDP_INSTEAD
    ),
    Attribute("DDPStrategy", "_layer_sync", "rejects SyncBatchNorm on a CPU", LIGHTNING, _OLDER),
    Attribute("SingleDeviceStrategy", "_root_device", "sets the device that the Trainer chose", LIGHTNING, _OLDER),
    Attribute(
        "LightningModule", "_trainer", "finds the Trainer, if any; `trainer` raises without one", LIGHTNING, _OLDER
    ),
    Attribute("LightningModule", "_compiler_ctx", "tells that torch.compile compiled it", LIGHTNING, _OLDER),
    Attribute("WeightAveraging", "_average_model", "prunes and quantizes the averaged copy too", LIGHTNING, _OLDER),
    Attribute(
        "StochasticWeightAveraging", "_average_model", "prunes and quantizes the averaged copy too", LIGHTNING, _OLDER
    ),
    Attribute("StochasticWeightAveraging", "_max_epochs", "plans windows without the epoch it adds", LIGHTNING, _OLDER),
    Attribute("OptimizedModule", "_orig_mod", "looks through torch.compile's wrapper", TORCH, _OLDER),
    Attribute("Module", "_compiled_call_impl", "looks through Module.compile()", TORCH, _OLDER),
)
"""Of objects that are not classes of the package, the names are held by the tests alone."""


@cache
def _resolved(key: str) -> Any:
    private = NAMES[key]
    try:
        return getattr(import_module(private.module), private.name)
    except (ImportError, AttributeError) as error:
        raise UpstreamChangedError(
            f"lightning_optim needs {private.module}.{private.name} ({private.why}), seen in {private.seen}; the "
            f"installed {_installed(private.seen)} has none. {private.without}"
        ) from error


def _installed(seen: str) -> str:
    package = seen.partition(" ")[0]
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def check(instance: object) -> None:
    """Raise if a private method that the package overrides, or an attribute that it uses, is missing upstream.

    Args:
        instance: An instance of one of the package's classes. For a class, only methods are checked.

    Raises:
        UpstreamChangedError: Names the method or attribute, and what it is for.
    """
    cls = instance if isinstance(instance, type) else type(instance)
    theirs = {
        base.__name__: base for base in reversed(cls.__mro__) if not base.__module__.startswith("lightning_optim")
    }
    for override in OVERRIDES:
        owner = theirs.get(override.owner)
        if owner is not None:
            _check_method(cls, owner, override)
    for attribute in ATTRIBUTES:
        if attribute.owner in theirs and instance is not cls and not hasattr(instance, attribute.name):
            raise UpstreamChangedError(
                f"{cls.__name__} uses {attribute.owner}.{attribute.name} ({attribute.why}), seen in {attribute.seen}; "
                f"the installed {_installed(attribute.seen)} has none. {attribute.without}"
            )


def _check_method(cls: type, owner: type, override: Override) -> None:
    method = getattr(owner, override.name, None)
    found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
    if found == override.parameters:
        return
    said = "has none" if found is None else f"has it with the arguments ({', '.join(found)})"
    arguments = ", ".join(override.parameters)
    raise UpstreamChangedError(
        f"{cls.__name__} overrides {override.owner}.{override.name}({arguments}) ({override.why}), seen in "
        f"{override.seen}; the installed {_installed(override.seen)} {said}, so the override would not be called. "
        f"{override.without}"
    )


def require(*keys: str) -> None:
    """Look names up now that are used later, while another failure is being handled.

    Args:
        keys: Keys of :data:`NAMES`.

    Raises:
        UpstreamChangedError: For the first missing one.
    """
    for key in keys:
        _resolved(key)


def destroy_dist_connection() -> None:
    """End the process group."""
    _resolved("destroy_dist_connection")()


def is_interactive() -> bool:
    """Whether Python runs in a notebook or a console."""
    return bool(_resolved("is_interactive"))


def materialize_distributed_module(module: Any, device: Any) -> None:
    """Allocate and initialize the layers of a module that are on the meta device."""
    _resolved("materialize_distributed_module")(module, device)


def optimizers_to_device(optimizers: Any, device: Any) -> None:
    """Move the states of optimizers to a device."""
    _resolved("optimizers_to_device")(optimizers, device)


def compress_hook(dtype: Any, group: Any, bucket: Any) -> Any:
    """Average a bucket of gradients in another dtype; returns a future."""
    return _resolved("compress_hook")(dtype, group, bucket)


def dispatch_mode(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """Return a context in which ``handle(operator, args, kwargs)`` is called instead of every operator of torch."""

    class Mode(_resolved("dispatch_mode")):  # type: ignore[misc]
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(operator, args, kwargs or {})

    mode: AbstractContextManager[Any] = Mode()
    return mode


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """Return the leaves of nested containers."""
    leaves: list[Any] = _resolved("tree_leaves")(tree, is_leaf)
    return leaves


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Return the leaves of nested containers, and their structure."""
    leaves, spec = _resolved("tree_flatten")(tree, is_leaf)
    return leaves, spec


def tree_flatten_with_path(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """Return the leaves of nested containers with their paths, and their structure."""
    leaves, spec = _resolved("tree_flatten_with_path")(tree, is_leaf)
    return leaves, spec


def tree_map_only(kind: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return nested containers with a function applied to the leaves of one type."""
    return _resolved("tree_map_only")(kind, function, tree)


def tree_unflatten(leaves: Any, treespec: Any) -> Any:
    """Return leaves in a structure."""
    return _resolved("tree_unflatten")(leaves, treespec)


if TYPE_CHECKING:
    from lightning.pytorch.strategies.launchers.subprocess_script import (
        _SubprocessScriptLauncher as SubprocessScriptLauncher,
    )
    from torch._ops import OpOverload
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
else:

    class _Lazy(type):
        """Metaclass of a class that stands in for a private upstream class in ``isinstance``."""

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, _resolved(cls.__name__))

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, _resolved(cls.__name__))

    class _Standing(metaclass=_Lazy):
        def __init_subclass__(cls, standing: bool = False) -> None:
            if not standing:
                raise TypeError(f"{cls.__name__} cannot be subclassed: its base is for `isinstance` only.")

    class BatchNorm(_Standing, standing=True):
        """BatchNorm of any dimension."""

    class NormBase(_Standing, standing=True):
        """BatchNorm and InstanceNorm of any dimension."""

    class OpOverload(_Standing, standing=True):
        """An operator of torch, as a graph calls it."""

    class SubprocessScriptLauncher(_Standing, standing=True):
        """The launcher that runs the script once more for each further process."""
