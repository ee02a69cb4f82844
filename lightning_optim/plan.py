"""The plan: how a module's structure differs from its class, as plain types, and how a fresh module is conformed to it.

A technique calls :meth:`Plan.track` before it changes a layer, and then changes it; that is all. Every difference from
the user's class at the time of saving is in the plan: the layer's class, attributes that the technique named,
parameters and buffers that changed shape, were added or removed, and children that were added or removed.

Names in a plan are those of the changed module. If blocks of a stack are removed, the others move up, as if the stack
had been built with fewer blocks; the plan records the original place of each child.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lightning_optim._version import __version__
from lightning_optim.sharding import own_class
from lightning_optim.structure import (
    PLACE,
    Replaced,
    Structure,
    change_configs,
    children_of,
    emptied,
    filled,
    is_layer_class,
    made,
    restructure,
)

__all__ = ["EMPTY", "KEY", "VERSION", "Contributor", "Plan", "check_version"]

KEY = "lightning_optim"
"""The checkpoint's top-level key."""

VERSION = 2
"""Version of the plan's layout; newer ones are rejected. Version 1 had no added or removed parameters and children."""

EMPTY: Mapping[str, Any] = {"version": VERSION, "modules": {}, "entries": {}}


class Contributor(Protocol):
    """The interface of a technique's callback to the plan."""

    @property
    def state_key(self) -> str:
        """The key of its entry."""

    def plan_entry(self) -> dict[str, Any]:
        """Return its entry: plain types only."""


def _nobody(trainer: Any) -> Sequence[Contributor]:
    return ()


@dataclass(frozen=True)
class _Step:
    """The change of one layer."""

    layer: nn.Module
    own: str | None
    wanted: Structure
    children: Mapping[str, nn.Module]
    described: bool


@dataclass
class Plan:
    """The changes of techniques in one module, kept on that module by its save hook.

    Attributes:
        module: The module that the plan's names refer to.
        entries: Further entry of each technique, by ``state_key``: plain types only.
        provenance: Provenance of the module's weights; a file that is loaded and saved again keeps it.
        contributors: Function of a Trainer that returns the contributors among its callbacks; set by the code that
            attaches the plan. Defined at module level, since the plan is copied and pickled with its module.
    """

    module: nn.Module
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    contributors: Callable[[Any], Sequence[Contributor]] = _nobody
    _base: dict[str, Structure] = field(default_factory=dict)
    """Structure of each watched layer in the user's class, by the layer's name there."""

    def track(self, name: str, *attributes: str) -> None:
        """Watch one layer: call it before the layer is changed for the first time.

        Args:
            name: The layer's dotted name below :attr:`module`, as it is now.
            attributes: Attributes that the technique changes or adds (``in_features``, ``groups``), also those of a
                configuration that the layer holds (``config.num_layers``), which are changed by
                :func:`~lightning_optim.structure.change_configs`; class, parameters, buffers and children are always
                watched.
        """
        layer, own = self.module, ""
        for part in name.split(".") if name else ():
            parent, layer = own, layer.get_submodule(part)
            place = self._place(parent, part, layer)
            if place is None:
                return  # below a layer that a technique added, which is described in full
            own = _join(parent, place)
        self._remember(own, layer, attributes)

    def _place(self, parent: str, name: str, child: nn.Module) -> str | None:
        """Return a child's name in the user's class, below ``parent``; None if a technique added it."""
        return vars(child).get(PLACE) if parent in self._base else name

    def _remember(self, own: str, layer: nn.Module, attributes: Iterable[str]) -> None:
        """Record a layer's structure in the user's class."""
        if own not in self._base:
            for name, child in reversed(children_of(layer).items()):  # one that has several names keeps the first
                vars(child)[PLACE] = name
            self._base[own] = Structure.of(layer, ())
            self._base[own].emptied = emptied(layer)
        base = self._base[own]
        now = Structure.of(layer, attributes)
        base.attributes = {**now.attributes, **base.attributes}

    def _differing(self) -> Iterator[tuple[str, Structure, Structure | None]]:
        """Yield name, present and original structure of layers that differ; added layers have no original."""

        def visit(layer: nn.Module, name: str, own: str) -> Iterator[tuple[str, Structure, Structure | None]]:
            base = self._base.get(own)
            now = None if base is None else Structure.of(layer, base.attributes)
            if now is not None and base is not None and now.differs(base):
                yield name, now, base
            for key, child in children_of(layer).items():
                place = self._place(own, key, child)
                if place is None:
                    for below, added in child.named_modules(prefix=_join(name, key)):
                        yield below, Structure.of_added(added, below), None
                else:
                    yield from visit(child, _join(name, key), _join(own, place))

        return visit(self.module, "", "") if self._base else iter(())

    def changed(self) -> dict[str, Structure]:
        """Return the structure of every watched layer that differs from the user's class, by its present name."""
        return {name: now for name, now, _ in self._differing()}

    def as_plain(self) -> dict[str, Any]:
        """Return the plan as plain types, for a checkpoint."""
        return {
            "version": VERSION,
            "package": __version__,
            "modules": {name: now.as_plain(base) for name, now, base in self._differing()},
            "entries": {key: dict(entry) for key, entry in self.entries.items()},
            "provenance": dict(self.provenance),
        }

    def conform(self, plain: Mapping[str, Any]) -> None:
        """Give :attr:`module` the structure of a plan; layers the plan does not name return to the user's class.

        Parameters whose shape changes are new (zeros, to be loaded); shared ones stay shared. Nothing is changed
        unless the whole plan fits.

        Args:
            plain: ``checkpoint["lightning_optim"]``, of this version or an earlier one.

        Raises:
            ValueError: If the plan is of a newer version, or does not fit the module.
        """
        check_version(plain)
        described = plain["modules"]
        like = next((parameter for parameter in self.module.parameters() if parameter.is_floating_point()), None)
        steps = list(self._steps(described, like))  # all of them before the first change
        missing = described.keys() - {name for name, _ in steps}
        if missing:
            raise ValueError(_no_module(min(missing), self.module))
        replaced: Replaced = {}
        for _, step in steps:
            if step.own is not None:
                self._remember(step.own, step.layer, step.wanted.attributes)
            restructure(step.layer, step.wanted, step.children, replaced, like)
        for layer in self.module.modules():
            for name, parameter in layer._parameters.items():
                if id(parameter) in replaced:
                    layer._parameters[name] = replaced[id(parameter)][1]
        dotted = {
            step.layer: {name: value for name, value in step.wanted.attributes.items() if "." in name}
            for _, step in steps
        }
        change_configs(self.module, dotted)
        for name, layer in self.module.named_modules():
            if is_layer_class(own_class(layer)) and hasattr(layer, "connect"):
                layer.connect(self.module, name)
        self.provenance = dict(plain.get("provenance", {}))

    def _steps(
        self, described: Mapping[str, Mapping[str, Any]], like: torch.Tensor | None
    ) -> Iterator[tuple[str, _Step]]:
        """Yield the change of each layer by name, outer layers first; nothing is changed here."""

        def visit(layer: nn.Module, name: str, own: str | None) -> Iterator[tuple[str, _Step]]:
            base = None if own is None else self._base.get(own)
            wanted = base if name not in described else self._wanted(name, layer, base, described[name])
            places: dict[str, str | None] = (
                {key: key for key in children_of(layer)} if wanted is None else wanted.children
            )
            children = {
                key: self._child(layer, own, _join(name, key), place, described, like) for key, place in places.items()
            }
            if wanted is not None:
                yield name, _Step(layer, own, wanted, children, name in described)
            for key, child in children.items():
                place = places[key]
                yield from visit(child, _join(name, key), None if own is None or place is None else _join(own, place))

        return visit(self.module, "", "")

    def _wanted(self, name: str, layer: nn.Module, base: Structure | None, plain: Mapping[str, Any]) -> Structure:
        wanted = Structure.from_plain(plain, layer, base)
        if wanted is None:
            raise ValueError(
                f"the checkpoint's plan makes {name!r} a {plain['class']} with parameters "
                f"{', '.join(plain['parameters'])}; {type(self.module).__name__} has a {type(layer).__name__} with "
                f"{', '.join(layer._parameters) or 'none'} there. Load it into the class that wrote it; if the layer "
                "class is your own, import it first."
            )
        return wanted

    def _child(
        self,
        layer: nn.Module,
        own: str | None,
        name: str,
        place: str | None,
        described: Mapping[str, Mapping[str, Any]],
        like: torch.Tensor | None,
    ) -> nn.Module:
        """Return a layer's child by its place in the user's class, rebuilt if it was removed, or an added child."""
        key = name.rpartition(".")[2]
        if place is None:
            present = layer._modules.get(key)
            if present is not None and (own is None or self._place(own, key, present) is None):
                return present
            new = made(described[name], like) if name in described else None
            if new is None:
                raise ValueError(
                    f"the checkpoint's plan adds the layer {name!r} of class "
                    f"{described.get(name, {}).get('class', 'unknown')}, which is not known here. Import the technique "
                    "that wrote the file first."
                )
            return new
        for other, child in children_of(layer).items():
            if (other if own is None else self._place(own, other, child)) == place:
                return child
        base = None if own is None else self._base.get(own)
        if base is None or place not in base.emptied:
            raise ValueError(_no_module(name, self.module))
        return filled(base.emptied[place], torch.device("cpu") if like is None else like.device)


def _no_module(name: str, module: nn.Module) -> str:
    return (
        f"the checkpoint's plan changes {name!r}, and {type(module).__name__} has no such module: the file was "
        "made by another architecture. Load it into the class (and the arguments) that wrote it."
    )


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def check_version(plain: Mapping[str, Any]) -> None:
    """Reject a plan of a newer layout, naming the version that wrote it."""
    version = plain.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"the checkpoint's plan has version {version!r} (written by lightning_optim {plain.get('package', '?')}), "
            f"this lightning_optim {__version__} reads versions up to {VERSION}. Install a newer lightning_optim."
        )
