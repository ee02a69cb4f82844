"""The structure of single layers, as plain types: reads it, compares it, and gives it to another layer.

:class:`lightning_optim.plan.Plan` puts the layers of a module together.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_optim.sharding import own_class, set_class

__all__ = [
    "LINK",
    "PLACE",
    "Replaced",
    "Structure",
    "change_configs",
    "children_of",
    "emptied",
    "filled",
    "inherit",
    "is_config",
    "is_layer_class",
    "layer_class",
    "made",
    "read_attribute",
    "restructure",
]

PLACE = "_lightning_optim_place"
"""Attribute of a watched module's child: its name in the user's class. It survives copying and pickling."""

LINK = "_lightning_optim_link"
"""Attribute of a layer that refers to other modules, which its ``connect`` finds after a plan is applied."""

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_LAYER_CLASSES: dict[str, type[nn.Module]] = {}

T = TypeVar("T", bound=type[nn.Module])


def layer_class(cls: T) -> T:
    """Class decorator: registers a layer class that techniques set as ``__class__``, so that plans can name it.

    Only registered classes are set when a file is loaded; a plan never imports anything.
    """
    _LAYER_CLASSES[_path_of(cls)] = cls
    return cls


def is_layer_class(cls: type) -> bool:
    """Whether a technique sets the class."""
    registered = _LAYER_CLASSES.get(_path_of(cls))
    return registered is not None and issubclass(cls, registered)


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _Absent:
    """Marks an attribute that the user's class does not have; a class is copied and pickled as itself."""


@dataclass
class Structure:
    """One layer's own structure.

    Attributes:
        layer_class: Its class, without the one that ``fully_shard`` puts before it.
        attributes: The attributes that techniques named.
        parameters: Shapes by name, in registration order.
        buffers: Shapes and dtypes by name.
        children: Name -> the child's name in the user's class, in registration order; None for a child that a
            technique added.
        emptied: The container's children as the user's class builds them, without memory for their weights: removed
            children are rebuilt from these.
    """

    layer_class: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, tuple[int, ...] | None]
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype] | None]
    children: dict[str, str | None]
    emptied: dict[str, nn.Module] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, layer: nn.Module, attributes: Iterable[str]) -> "Structure":
        """Read the structure of a watched layer, with some of its attributes."""
        return cls(
            own_class(layer),
            {name: read_attribute(layer, name) for name in attributes},
            {name: None if p is None else tuple(p.shape) for name, p in layer._parameters.items()},
            {name: None if b is None else (tuple(b.shape), b.dtype) for name, b in layer._buffers.items()},
            {name: vars(child).get(PLACE) for name, child in children_of(layer).items()},
        )

    @classmethod
    def of_added(cls, layer: nn.Module, name: str) -> "Structure":
        """Read the structure of a layer that the user's class does not have, with all of its attributes.

        Raises:
            ValueError: If an attribute is not of a plain type, so no file can describe the layer.
        """
        structure = cls.of(layer, [key for key in vars(layer) if key not in (*_OF_EVERY_MODULE, PLACE, LINK)])
        odd = [key for key, value in structure.attributes.items() if not _is_plain(value)]
        if odd:
            raise ValueError(
                f"the added layer {name!r} cannot be written into a checkpoint: {', '.join(odd)} of "
                f"{type(layer).__name__} must be numbers, strings, or tuples of them."
            )
        structure.children = dict.fromkeys(structure.children)
        return structure

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], layer: nn.Module, base: "Structure | None") -> "Structure | None":
        """Read a plan's description of a layer.

        Args:
            plain: The description.
            layer: The layer that will get this structure.
            base: Its structure in the user's class, if it differs from the present one.

        Returns:
            The structure, with the attributes and children of ``base`` where the plan has none; None if it does not
            fit: the class is unknown, or parameters are added or removed without a technique's layer class.
        """
        if base is None:
            base = cls.of(layer, ())
            base.children = {name: name for name in children_of(layer)}
        known = {_path_of(parent): parent for parent in type(layer).__mro__} | _LAYER_CLASSES
        found = known.get(plain["class"])
        over = getattr(found, "over", None)
        found = found if over is None else over(layer)  # it computes by the forward of the user's class
        same_parameters = plain["parameters"].keys() == base.parameters.keys()
        if found is None or not (same_parameters or is_layer_class(found)):
            return None
        return cls(
            found,
            {**base.attributes, **plain["attributes"]},
            dict(plain["parameters"]),
            dict(plain["buffers"]),
            dict(plain["children"]) if "children" in plain else base.children,
            base.emptied,
        )

    def differs(self, base: "Structure") -> bool:
        """Whether the structure differs from the user's class, also in order, which optimizers rely on."""
        return self != base or any(
            list(own) != list(others)
            for own, others in ((self.parameters, base.parameters), (self.children, base.children))
        )

    def as_plain(self, base: "Structure | None") -> dict[str, Any]:
        """Return it as plain types, with the children if they differ from those of ``base``."""
        plain = {
            "class": _path_of(self.layer_class),
            "attributes": {name: value for name, value in self.attributes.items() if value is not _Absent},
            "parameters": dict(self.parameters),
            "buffers": dict(self.buffers),
        }
        if base is None or list(self.children.items()) != list(base.children.items()):
            plain["children"] = dict(self.children)
        return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return type(value) in (bool, int, float, str, type(None), torch.dtype)


def read_attribute(layer: nn.Module, name: str) -> Any:
    """Return an attribute of a layer, or with a dotted name (``config.num_layers``) one of an object that it holds."""
    holder, _, leaf = name.rpartition(".")
    return getattr(getattr(layer, holder, None) if holder else layer, leaf, _Absent)


def change_configs(root: nn.Module, wanted: Mapping[nn.Module, Mapping[str, Any]]) -> None:
    """Set attributes of the configurations that layers hold, on copies that take their place everywhere in a module.

    A configuration is any object whose class name ends in "Config"; all layers of a model often hold the same one.
    Another model may hold it too (a teacher of the same class), and so do hyperparameters from which the class is
    built again: the object itself stays as it is.

    Args:
        root: The module in which copies take the place of the configurations, also inside other configurations.
        wanted: Layer -> dotted names (``config.num_layers``) and their values.
    """
    changes: dict[int, dict[str, Any]] = {}
    for layer, attributes in wanted.items():
        for name, value in attributes.items():
            holder, _, leaf = name.rpartition(".")
            held = getattr(layer, holder, None)
            if held is not None and not _same(read_attribute(layer, name), value):
                changes.setdefault(id(held), {})[leaf] = value
    if not changes:
        return
    current: dict[int, tuple[Any, Any]] = {}

    def renewed(config: Any) -> Any:
        if id(config) not in current:
            current[id(config)] = (config, config)  # one that leads back to itself ends here
            inside = {key: renewed(value) for key, value in vars(config).items() if is_config(value)}
            inside = {key: value for key, value in inside.items() if value is not vars(config)[key]}
            own = changes.get(id(config), {})
            new = copy.copy(config) if own or inside else config
            for key, value in (*inside.items(), *own.items()):
                if value is _Absent:
                    vars(new).pop(key, None)
                else:
                    setattr(new, key, value)
            current[id(config)] = (config, new)
        return current[id(config)][1]

    for layer in root.modules():
        for key, value in list(vars(layer).items()):
            if is_config(value):
                vars(layer)[key] = renewed(value)


def is_config(value: Any) -> bool:
    """Whether a value is a configuration, as transformers keeps one: an object of a class "...Config"."""
    return type(value).__name__.endswith("Config") and hasattr(value, "__dict__") and not isinstance(value, type)


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def children_of(layer: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children under all of their names; ``named_children`` gives each child only once."""
    return {name: child for name, child in layer._modules.items() if child is not None}


def emptied(layer: nn.Module) -> dict[str, nn.Module]:
    """Return copies of a container's children without memory for their weights; for other modules none.

    Non-persistent buffers keep their values.
    """
    if not isinstance(layer, _CONTAINERS):
        return {}
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return {name: copy.deepcopy(child, memo) for name, child in children_of(layer).items()}


def filled(child: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of an emptied child with weights and buffers of zeros, to be loaded."""
    duplicate = copy.deepcopy(child)
    made: dict[int, nn.Parameter] = {}
    for module in duplicate.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros_like(parameter, device=device)
                new = made.setdefault(id(parameter), nn.Parameter(zeros, parameter.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
        children = children_of(module)
        if not any(PLACE in vars(child) for child in children.values()):
            for name, child in reversed(children.items()):  # the plan may watch them from the time they were there
                vars(child)[PLACE] = name
    return duplicate


def made(plain: Mapping[str, Any], like: torch.Tensor | None) -> nn.Module | None:
    """Build a layer that a technique added, without calling its class; its children are not built.

    Args:
        plain: Its description in a plan.
        like: A tensor with the device and dtype for the parameters.

    Returns:
        The layer, or None if its class is neither in torch.nn nor registered by a technique.
    """
    of_torch = getattr(nn, plain["class"].rpartition(".")[2], None)
    cls = _LAYER_CLASSES.get(plain["class"], of_torch)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module) or _path_of(cls) != plain["class"]:
        return None
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(plain["attributes"])
    for name, shape in plain["parameters"].items():
        layer._parameters[name] = None if shape is None else _new_parameter(tuple(shape), like)
    return layer


Replaced = dict[int, tuple[nn.Parameter, nn.Parameter]]
"""Old and new parameter by the old one's id; the old one is kept so that its id is not reused."""


def restructure(
    layer: nn.Module,
    wanted: Structure,
    children: Mapping[str, nn.Module],
    replaced: Replaced,
    like: torch.Tensor | None,
) -> None:
    """Give a layer a structure.

    Args:
        layer: The layer; changed in place.
        wanted: Its new structure.
        children: Its children, by name and in order.
        replaced: Collects the parameters that are replaced by others of another shape.
        like: A tensor with the device and dtype of the module's parameters, for a layer without any.
    """
    technique = is_layer_class(own_class(layer)) or is_layer_class(wanted.layer_class)
    if own_class(layer) is not wanted.layer_class:
        set_class(layer, wanted.layer_class)
    for name, value in wanted.attributes.items():
        if "." in name:
            continue  # of a configuration, which is changed once for all layers
        if value is _Absent:
            vars(layer).pop(name, None)
        else:
            setattr(layer, name, value)
    own = (p for p in layer._parameters.values() if p is not None and p.is_floating_point())
    like = next((p for p in own), like)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, shape in wanted.parameters.items():
        old = layer._parameters.get(name)
        if name not in layer._parameters or (technique and (old is None or shape is None)):
            parameters[name] = None if shape is None else _new_parameter(tuple(shape), like)
        else:
            parameters[name] = _resized(old, shape, replaced)
    _refill(layer._parameters, parameters)
    for name in [name for name in layer._buffers if name not in wanted.buffers]:
        del layer._buffers[name]
    for name, spec in wanted.buffers.items():
        buffer = layer._buffers.get(name)
        if spec is None:
            layer.register_buffer(name, None)
            continue
        shape, dtype = tuple(spec[0]), _precision(buffer, spec[1])
        if buffer is None or (tuple(buffer.shape), buffer.dtype) != (shape, dtype):
            device = torch.device("cpu") if like is None else like.device
            layer.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
    for name, child in children.items():
        vars(child).pop(PLACE, None)
        if wanted.children[name] is not None:
            vars(child)[PLACE] = wanted.children[name]
    absent = {name: None for name, child in layer._modules.items() if child is None}
    _refill(layer._modules, {**absent, **children})


def _precision(buffer: torch.Tensor | None, written: torch.dtype) -> torch.dtype:
    """Return a buffer's dtype: the module's precision, as for parameters, not the file's."""
    both_float = buffer is not None and buffer.is_floating_point() and written.is_floating_point
    return buffer.dtype if buffer is not None and both_float else written


def _refill(held: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Replace the contents of a module's dictionary in place, in the order of ``wanted``."""
    if list(held) != list(wanted) or any(held[name] is not wanted[name] for name in wanted):
        held.clear()
        held.update(wanted)


def _resized(old: nn.Parameter | None, shape: tuple[int, ...] | None, replaced: Replaced) -> nn.Parameter | None:
    """Return the parameter itself if it has the shape, else the one that replaces it wherever it is used."""
    if old is None or shape is None or tuple(old.shape) == tuple(shape):
        return old
    new = inherit(nn.Parameter(_zeros_like(old, tuple(shape)), old.requires_grad), old)
    return replaced.setdefault(id(old), (old, new))[1]


def _new_parameter(shape: tuple[int, ...], like: torch.Tensor | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape) if like is None else like.detach().new_zeros(shape))


def _zeros_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    """Return zeros of another shape in the memory format of a parameter."""
    zeros = parameter.detach().new_zeros(shape)
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
    if wanted is None or parameter.is_contiguous() or not parameter.is_contiguous(memory_format=wanted):
        return zeros
    return zeros.contiguous(memory_format=wanted)


def inherit(new: nn.Parameter, old: nn.Parameter) -> nn.Parameter:
    """Give a parameter the Python attributes and hooks of the one it replaces."""
    new.__dict__.update(old.__dict__)
    new._backward_hooks = old._backward_hooks
    hooks = getattr(old, "_post_accumulate_grad_hooks", None)
    if hooks is not None:
        new._post_accumulate_grad_hooks = hooks
    return new
