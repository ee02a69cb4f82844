"""Layers that no example input reaches, and the channels that they may read."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_optim.structured.groups import ChannelGroup
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import ForwardInputs, named_layers

__all__ = ["OpenEnds", "open_ends", "possible_readers", "unreached_layers"]

_READS = ("in_features", "in_channels", "input_size", "in1_features", "in2_features", "embed_dim", "kdim", "vdim")
_WRITES = ("out_features", "out_channels", "hidden_size", "embedding_dim", "embed_dim")


@dataclass(frozen=True)
class OpenEnds:
    """Where a part of the model that is never reached may hang on the rest.

    Attributes:
        name: The part.
        reads: Widths of what its layers read from outside.
        writes: Widths of what they write, which may be added to a tensor of the rest.
    """

    name: str
    reads: frozenset[int]
    writes: frozenset[int]


def unreached_layers(module: nn.Module, inputs: ForwardInputs, traced: TracedModel) -> list[str]:
    """Return the layers with parameters that no forward pass reaches, in evaluation or in training.

    Layers of metrics are not among them.

    Args:
        module: The model.
        inputs: What its forward receives.
        traced: Its trace with these inputs; its copy is called.
    """
    named = {name: layer for name, layer in named_layers(module) if any(True for _ in layer.parameters(recurse=False))}
    left = named.keys() - traced.reached() if named else set()
    return sorted(left - traced.called_in_training(inputs), key=list(named).index) if left else []


def open_ends(module: nn.Module, unreached: Collection[str]) -> list[OpenEnds]:
    """Return the open ends of every part of which nothing is reached.

    Inside a part a layer reads what an earlier one writes, where the widths fit: a whole network beside the model (a
    teacher, a discriminator) hangs on nothing. The entries of a list are parts of their own.
    """
    return [_ends(name, part) for name, part in _parts("", module, set(unreached))]


def _parts(name: str, module: nn.Module, unreached: set[str]) -> Iterator[tuple[str, list[nn.Module]]]:
    prefix = f"{name}." if name else ""
    holders = {
        f"{prefix}{below}" if below else name: layer
        for below, layer in module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    }
    if holders and holders.keys() <= unreached and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield name, list(holders.values())
        return
    if name in unreached:
        yield name, [module]
    for child_name, child in module.named_children():
        yield from _parts(prefix + child_name, child, unreached)


def _ends(name: str, layers: list[nn.Module]) -> OpenEnds:
    reads: set[int] = set()
    written: set[int] = set()
    waiting: set[int] = set()
    for layer in layers:
        wanted, given = _widths(layer)
        outside = {width for width in wanted if not any(width % before == 0 for before in written)}
        reads |= outside
        waiting = {width for width in waiting if not any(each % width == 0 for each in wanted)}
        waiting |= given
        written |= given
    return OpenEnds(name, frozenset(reads), frozenset(waiting))


def _widths(layer: nn.Module) -> tuple[set[int], set[int]]:
    """Return the widths that a layer reads and writes; of one that does not say, the sizes of its parameters."""
    reads, writes = (
        {int(value) for name in names if type(value := getattr(layer, name, None)) is int and value > 0}
        for names in (_READS, _WRITES)
    )
    if not reads and not writes:
        reads = {size for parameter in layer.parameters(recurse=False) for size in parameter.shape if size > 1}
        writes = set(reads)
    return reads, writes


def possible_readers(
    module: nn.Module, groups: Mapping[str, ChannelGroup], unreached: Collection[str]
) -> dict[str, str]:
    """Return the groups whose channels an unreached part may read or be added to, each with one such part.

    A part may read a group when it reads as many entries as the group has channels, or a multiple (flattened images);
    when it reads more, and nothing in the model is as wide, it may read a concatenation with any narrower group.

    Args:
        module: The model.
        groups: The groups by name.
        unreached: Names of the layers that no example reaches.
    """
    readers: dict[str, str] = {}
    channels = {name: group.channels for name, group in groups.items()}
    inputs = _widths_of_inputs(module, groups, unreached)
    for part in open_ends(module, unreached):
        for name, count in channels.items():
            if count in part.reads | part.writes:
                readers.setdefault(name, part.name)
        for width in part.reads - inputs - set(channels.values()):
            multiples = [name for name, count in channels.items() if width % count == 0]
            for name in multiples or [name for name, count in channels.items() if count < width]:
                readers.setdefault(name, part.name)
    return readers


def _widths_of_inputs(module: nn.Module, groups: Mapping[str, ChannelGroup], unreached: Collection[str]) -> set[int]:
    """Return the widths of what reached layers read and no group has: the model's inputs."""
    followed = {member.layer for group in groups.values() for member in group.members if member.side == "in"}
    layers = {name: layer for name, layer in module.named_modules() if name not in followed and name not in unreached}
    return {width for layer in layers.values() for name in _READS if type(width := getattr(layer, name, None)) is int}
