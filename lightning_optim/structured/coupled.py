"""The coupled weights of channels that leave together: their norms, and how they shrink."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.change import Changed
from lightning_optim.functional.regularization import entries_of_units, scale_units, unit_norms
from lightning_optim.modules import CONVOLUTIONS, RECURRENT, TRANSPOSED
from lightning_optim.structured.groups import ChannelGroup, Member, dimension_of, outputs_of

__all__ = ["CoupledUnits"]


@dataclass(frozen=True)
class CoupledUnits:
    """What leaves together in one group of channels: units, each a channel, a head, or a channel of every block.

    Attributes:
        number: How many there are.
        unit: Consecutive channels in a unit.
        blocks: Blocks of channels from which a unit takes the same ones.
        parts: For each parameter that loses entries its name, its dimension, and the units of each index, ``[width,
            n]``, int64 (``number`` where an index has fewer than n). A parameter that loses entries in two dimensions
            has two.
    """

    number: int
    unit: int
    blocks: int
    parts: tuple[tuple[str, int, Tensor], ...]

    @classmethod
    def of(cls, module: nn.Module, group: ChannelGroup) -> "CoupledUnits":
        """Read the units of a group of a module.

        All parameters that lose entries are in them: weights, biases, and scales and shifts of norms. Left out are the
        slopes of activations, and the inputs of grouped convolutions, which no single dimension counts.
        """
        per_block = group.channels // group.blocks
        number = per_block // group.unit
        pairs: dict[tuple[nn.Parameter, int], set[tuple[int, int]]] = {}
        names: dict[tuple[nn.Parameter, int], str] = {}
        for member in group.members:
            layer = module.get_submodule(member.layer)
            for leaf, parameter, dim in _losing(layer, member):
                name = f"{member.layer}.{leaf}" if member.layer else leaf
                names.setdefault((parameter, dim), name)  # a tied one counts once
                entries = zip(member.index, member.root, strict=True)
                units = ((index, root % per_block // group.unit) for index, root in entries)
                pairs.setdefault((parameter, dim), set()).update(units)
        parts = (
            (names[parameter, dim], dim, _table(found, parameter.shape[dim], number).to(parameter.device))
            for (parameter, dim), found in pairs.items()
        )
        return cls(number, group.unit, group.blocks, tuple(parts))

    def units_of(self, channels: Iterable[int]) -> list[int]:
        """Return the units to which some of the group's channels belong."""
        per_block = self.number * self.unit
        return sorted({channel % per_block // self.unit for channel in channels})

    def channels_of(self, units: Iterable[int]) -> list[int]:
        """Return all channels of some units."""
        within = [unit * self.unit + offset for unit in units for offset in range(self.unit)]
        per_block = self.number * self.unit
        return sorted(block * per_block + channel for block in range(self.blocks) for channel in within)

    def norms(self, module: nn.Module) -> Tensor:
        """Return the L2 norm of each unit over all of its parameters, ``[units]``."""
        parameters = [module.get_parameter(name).detach() for name, _, _ in self.parts]
        return unit_norms(parameters, [dim for _, dim, _ in self.parts], self._entries)

    def scale(self, module: nn.Module, factors: Tensor, held: Container[int]) -> None:
        """Multiply the units by their factors, in the parameters whose ids are held and that train."""
        for name, dim, units in self.parts:
            parameter = module.get_parameter(name)
            if parameter.requires_grad and id(parameter) in held:
                scale_units(parameter.detach(), dim, units, factors)

    @cached_property
    def _entries(self) -> list[Tensor]:
        return [entries_of_units(units, self.number) for _, _, units in self.parts]

    def follow(self, changed: Changed, prefix: str = "") -> tuple["CoupledUnits", list[int]]:
        """Return the units after a change of the model, and the number that each had before.

        Args:
            changed: What became of the model's parameters.
            prefix: What precedes the names in the whole model.
        """
        parts, present = [], set[int]()
        for name, dim, units in self.parts:
            successor, kept = changed.successor(prefix + name), changed.surviving(prefix + name)
            if successor is None:
                continue
            left = units
            if kept is not None:
                before = changed.shape_before(prefix + name)
                left = units[_surviving(kept, before, successor[1].shape, dim).to(units.device)]
            parts.append((successor[0].removeprefix(prefix), dim, left))
            present.update(left.flatten().tolist())
        remaining = sorted(present - {self.number})
        renumbered = torch.full((self.number + 1,), len(remaining))
        renumbered[remaining] = torch.arange(len(remaining))
        now = tuple((name, dim, renumbered.to(units.device)[units]) for name, dim, units in parts)
        return CoupledUnits(len(remaining), self.unit, self.blocks, now), remaining

    def to(self, module: nn.Module) -> "CoupledUnits":
        """Return the same with its tables on the device of the parameters."""
        parts = ((name, dim, units.to(module.get_parameter(name).device)) for name, dim, units in self.parts)
        return CoupledUnits(self.number, self.unit, self.blocks, tuple(parts))

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        parts = [[name, dim, units.to("cpu", torch.int32)] for name, dim, units in self.parts]
        return {"number": self.number, "unit": self.unit, "blocks": self.blocks, "parts": parts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "CoupledUnits":
        """Return what :meth:`state_dict` described."""
        parts = tuple((name, dim, units.long()) for name, dim, units in state["parts"])
        return cls(state["number"], state["unit"], state["blocks"], parts)


def _surviving(kept: Tensor, before: torch.Size, now: torch.Size, dim: int) -> Tensor:
    """Return which indices of a dimension survive, from the flat indices of the surviving entries."""
    first = kept.view(now).movedim(dim, 0).flatten(1)[:, 0] if len(now) > 1 else kept
    return first // before[dim + 1 :].numel() % before[dim]


def _losing(layer: nn.Module, member: Member) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield the parameters of a layer that lose entries with a member's channels, and the dimension of each."""
    own = {leaf: p for leaf, p in layer._parameters.items() if p is not None and p.is_floating_point()}
    if not member.index or isinstance(layer, nn.PReLU):
        return
    if member.parameter is not None:
        leaf, dim = member.parameter
        yield leaf, layer.get_parameter(leaf), dim
        return
    if isinstance(layer, RECURRENT):
        yield from (
            (leaf, own[leaf], 1) for leaf in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse") if leaf in own
        )
        return
    last, matrix = max(member.index), any(p.ndim > 1 and p.numel() > max(p.shape) for p in own.values())
    if not matrix:  # a norm, or another layer with one number a channel, whatever its shape
        width = max((p.numel() for p in own.values()), default=0)
        for leaf, parameter in own.items():
            if last < width == parameter.numel():
                yield leaf, parameter, list(parameter.shape).index(width)
        return
    weight = own.get("weight")
    if weight is None:
        return
    dim = dimension_of(layer, weight, member)
    grouped = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and layer.groups > 1
    if last < weight.shape[dim] and not (grouped and dim == 1):
        yield "weight", weight, dim
    bias = own.get("bias")
    if member.side == "out" and bias is not None and bias.shape == (outputs_of(layer),):
        yield "bias", bias, 0


def _table(pairs: set[tuple[int, int]], width: int, number: int) -> Tensor:
    """Return the units of each index, ``[width, n]``; ``number`` where an index has fewer than n."""
    units: list[list[int]] = [[] for _ in range(width)]
    for index, unit in sorted(pairs):
        units[index].append(unit)
    most = max(map(len, units), default=0)
    return torch.tensor([each + [number] * (most - len(each)) for each in units], dtype=torch.long)
