"""A change of a model's structure, and what became of its parameters and layers.

A technique tracks a layer in the plan and changes it. :func:`apply_change` compares the model before and after, so that
optimizers, averaged copies and other techniques can follow without knowing the technique.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_optim.modules import COMPILED_CHILD

__all__ = ["Change", "Changed", "Kept", "apply_change", "keep_channels"]

Kept = Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]]
"""Parameter that lost entries -> (the one that replaces it, flat indices of the surviving entries)."""

Change = Callable[[nn.Module], Kept | None]
"""``change(root)`` changes the model, or an averaged copy of it, in place.

It calls ``plan_of(root).track(name)`` first and returns the parameters that lost entries, None if there are none.
Parameters and layers that it adds, removes or moves need not be reported.
"""


@dataclass(frozen=True)
class Changed:
    """What became of a model's parameters and layers. Names are without the ``_orig_mod`` of torch.compile.

    Attributes:
        kept: Parameters that lost entries.
        before: Parameters by name before the change; a shared one under each of its names.
        after: The same after the change.
        layers: Name of each layer before -> its name after, None if it was removed.
    """

    kept: Kept
    before: Mapping[str, nn.Parameter] = field(default_factory=dict)
    after: Mapping[str, nn.Parameter] = field(default_factory=dict)
    layers: Mapping[str, str | None] = field(default_factory=dict)

    def layer(self, name: str) -> str | None:
        """Return the present name of a layer, None if it was removed."""
        now = self.layers[_plain(name)]
        return name if now == _plain(name) else now

    def successor(self, name: str) -> tuple[str, nn.Parameter] | None:
        """Return the present name of a parameter and the parameter itself, None if it was removed."""
        old = self.before[_plain(name)]
        new = self.kept[old][0] if old in self.kept else old
        if self.after.get(_plain(name)) is new:
            return name, new
        return next(((other, parameter) for other, parameter in self.after.items() if parameter is new), None)

    def surviving(self, name: str) -> Tensor | None:
        """Return the flat indices of a parameter's surviving entries, None if all of them survive."""
        old = self.before[_plain(name)]
        return self.kept[old][1] if old in self.kept else None

    def shape_before(self, name: str) -> torch.Size:
        """Return the shape that a parameter had before the change."""
        return self.before[_plain(name)].shape

    @cached_property
    def removed(self) -> list[nn.Parameter]:
        """Parameters that the model no longer holds, without those that lost entries."""
        present = set(self.after.values())
        return [old for old in dict.fromkeys(self.before.values()) if old not in present and old not in self.kept]

    @cached_property
    def added(self) -> dict[nn.Parameter, nn.Parameter]:
        """Each new parameter with the one whose optimizer and parameter group it joins.

        That is the parameter with the same last name, else the first, of the layer that holds the new one, or of the
        nearest layer around it.
        """
        known = {*self.before.values(), *(new for new, _ in self.kept.values())}
        names: dict[nn.Parameter, str] = {}
        for name, parameter in self.after.items():
            if parameter not in known:
                names.setdefault(parameter, name)
        return {parameter: self._neighbor(name) for parameter, name in names.items()} if self.before else {}

    def _neighbor(self, name: str) -> nn.Parameter:
        layer, _, leaf = name.rpartition(".")
        while True:
            near = [other for other in self.before if not layer or other.startswith(f"{layer}.")]
            if near:
                return self.before[next((other for other in near if other.rpartition(".")[2] == leaf), near[0])]
            layer = layer.rpartition(".")[0]


def apply_change(root: nn.Module, change: Change) -> Changed:
    """Change a model in place, and return what became of its parameters and layers.

    Args:
        root: The model, or an averaged copy of it.
        change: The change.
    """
    before, layers = _parameters(root), list(root.named_modules())
    kept = change(root) or {}
    present = {layer: _plain(name) for name, layer in root.named_modules()}
    return Changed(kept, before, _parameters(root), {_plain(name): present.get(layer) for name, layer in layers})


def _parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in root.named_parameters(remove_duplicate=False)}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != COMPILED_CHILD)


def keep_channels(tensor: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the surviving entries of a tensor.

    Args:
        tensor: Any shape.
        kept: Flat indices that survive, ``[n]``.
        shape: What they are viewed as; ``n`` entries.

    Returns:
        A new tensor of ``shape``, in channels_last where ``tensor`` was; sparse where it was (a table's gradient, which
        loses columns).
    """
    if tensor.is_sparse:
        return _keep_columns(tensor.detach(), kept, shape)
    small = tensor.detach().reshape(-1)[kept.to(tensor.device)].view(shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    if wanted is not None and tensor.is_contiguous(memory_format=wanted) and not tensor.is_contiguous():
        return small.contiguous(memory_format=wanted)
    return small


def _keep_columns(gradient: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the surviving columns of a table's sparse gradient, ``[rows, columns]``."""
    columns = kept[: shape[1]] % gradient.shape[1]
    return gradient.index_select(1, columns.to(gradient.device))
