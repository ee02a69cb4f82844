"""Channel groups: which channels of which layers leave together, and what is left when they do."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_optim.modules import CONVOLUTIONS, EMBEDDINGS, INPUTS_FIRST, LINEARS, TRANSPOSED, Conv1D

__all__ = [
    "ChannelGroup",
    "Member",
    "Removal",
    "blocks_of",
    "dimension_of",
    "inputs_of",
    "is_linear",
    "is_root",
    "outputs_of",
]

_ROOTS = (*LINEARS, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS)


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        layer: The layer's dotted name below the traced module.
        side: ``"out"`` when its outputs leave, ``"in"`` when its inputs do.
        index: The layer's own channel of each entry, ``[entries]``.
        root: The group's channel that takes this entry along, ``[entries]``; several entries may belong to one.
        parameter: Instead of the layer's inputs or outputs: one of its own parameters, and its dimension.
    """

    layer: str
    side: str
    index: tuple[int, ...]
    root: tuple[int, ...]
    parameter: tuple[str, int] | None = None

    def leaving(self, channels: Sequence[int]) -> list[int]:
        """Return the layer's own channels that leave with some of the group's."""
        leaving = set(channels)
        return sorted({index for index, root in zip(self.index, self.root, strict=True) if root in leaving})


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that leave together.

    Attributes:
        name: Name of the layer whose outputs they are.
        channels: How many there are now.
        blocks: Into how many equal blocks they fall from which the same relative channels must leave (grouped
            convolutions, GroupNorm, a gate that is half of the channels); 1 mostly.
        members: The layers.
        unit: Consecutive channels that leave together, such as the width of an attention head.
        least: Fewer are not kept.
        counts: Attributes that count these channels and that torch-pruning does not know: layer, attribute (with dots
            where it belongs to an object, such as a config), and how many channels it counts as one (a number of
            heads: the width of a head); a tuple where it holds several.
        splits: Modules that split these channels, and the sizes of the parts.
        problem: Why it cannot be pruned, where that is known without trying.
        proposed: Whether the members were read from the layers' shapes, as heads are; else torch-pruning's graph says
            what leaves with what.
        multiple: A multiple of so many channels is kept.
        tie: Groups with the same one keep equally many channels: one number counts those of all.
    """

    name: str
    channels: int
    blocks: int
    members: tuple[Member, ...]
    unit: int = 1
    least: int = 1
    counts: tuple[tuple[str, str, Any], ...] = ()
    splits: tuple[tuple[str, tuple[int, ...]], ...] = ()
    problem: str = ""
    proposed: bool = False
    multiple: int = 1
    tie: str = ""

    @property
    def layers(self) -> set[str]:
        """Names of all layers that change."""
        return {member.layer for member in self.members}

    @property
    def outputs(self) -> set[str]:
        """Names of the layers that lose outputs."""
        return {member.layer for member in self.members if member.side == "out" and member.parameter is None}

    def now(self, traced: "ChannelGroup") -> "ChannelGroup":
        """Return the group as a later trace sees it, with what only the check could tell."""
        return replace(traced, unit=self.unit, least=self.least, counts=self.counts, tie=self.tie)

    def named(self, name: str) -> "ChannelGroup":
        """Return the group under another of its layers' names."""
        return replace(self, name=name)

    def counted(self, leaving: int) -> dict[str, dict[str, Any]]:
        """Return the attributes that count the channels, by layer, when some leave."""
        left, found = self.channels - leaving, dict[str, dict[str, Any]]()
        for layer, attribute, per in self.counts:
            number = tuple(int(left // each) for each in per) if isinstance(per, tuple) else int(left // per)
            found.setdefault(layer, {})[attribute] = number
        return found


@dataclass(frozen=True)
class Removal:
    """What is left when channels leave.

    Attributes:
        kept: Surviving flat indices of each parameter and buffer that changes, by name, int64.
        shapes: Its new shape.
        attributes: Attributes that change, by layer.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def below(self, name: str) -> "Removal":
        """Return what concerns one module of the model, with names as that module has them."""
        if not name:
            return self
        prefix = f"{name}."
        return Removal(
            {key.removeprefix(prefix): kept for key, kept in self.kept.items() if key.startswith(prefix)},
            {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)},
            {
                key.removeprefix(prefix) if key != name else "": values
                for key, values in self.attributes.items()
                if key == name or key.startswith(prefix)
            },
        )


def is_root(layer: nn.Module) -> bool:
    """Tell whether a layer's outputs may leave."""
    return isinstance(layer, _ROOTS)


def is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is a Linear, whichever way round its weight is stored."""
    return isinstance(layer, LINEARS)


def outputs_of(layer: Any) -> int:
    """Return the number of output channels of a layer that can lose some."""
    names = ("out_features", "out_channels", "embedding_dim", "nf")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def inputs_of(layer: Any) -> int:
    """Return the number of inputs of a Linear."""
    return int(layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])


def blocks_of(layer: nn.Module) -> int:
    """Return into how many blocks a layer divides its channels."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and not _is_depthwise(layer):
        return layer.groups
    return 1


def dimension_of(layer: nn.Module, weight: Tensor, member: Member) -> int:
    """Return which dimension of a layer's weight a member's channels are."""
    if member.parameter is not None:
        return member.parameter[1]
    return 0 if weight.ndim == 1 else {"out": 0, "in": 1}[member.side] ^ isinstance(layer, INPUTS_FIRST)


def _is_depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.out_channels == layer.in_channels)
