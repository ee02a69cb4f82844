"""A traced model: its channel groups, and what is left of it when channels leave.

torch-pruning traces a copy of the model and says which layers are coupled; nothing else of it is used, and it never
touches the model itself.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.modules import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, Conv1D, copy_module
from lightning_optim.structured.cores import Core
from lightning_optim.structured.experts import ALIGNED, outer_dims
from lightning_optim.structured.groups import ChannelGroup, Member, Removal, blocks_of, is_linear, is_root, outputs_of
from lightning_optim.structured.reach import called_layers, parameters_behind
from lightning_optim.structured.splits import blocks_of_parts
from lightning_optim.structured.tracing import Untraceable, trace
from lightning_optim.structured.walk import Item, Side, Walker
from lightning_optim.target import ForwardInputs, is_computed

__all__ = ["TracedModel"]


class TracedModel:
    """A traced copy of a model: its groups, and what is left of it when channels leave.

    The copy shares the weights' memory with the model, and nothing here writes to them.

    Args:
        module: The model; it is not touched.
        inputs: What its forward receives.
        cores: Whether attention is cut out of the graph, as one step that no channel passes.

    Raises:
        ValueError: If the model cannot be traced.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs, *, cores: bool = True) -> None:
        self.copy = copy_module(module, rounded=False, share_weights=True)
        for layer in self.copy.modules():
            for parameter in layer.parameters(recurse=False):  # frozen layers are invisible to the tracing
                one_for_all = not is_root(layer) and not is_lazy(parameter) and parameter.numel() == 1
                parameter.requires_grad_(not one_for_all)
        self._names = {layer: name for name, layer in self.copy.named_modules()}
        self._parameters = {parameter: name for name, parameter in self.copy.named_parameters()}
        try:
            self._trace = trace(self.copy, inputs, cores=cores)
        except Untraceable as error:
            raise ValueError(f"{error}.") from None
        except FAILURES as error:
            raise ValueError(
                f"{type(module).__name__} cannot be traced ({first_line(error, 120)}). Prune a part of it: "
                "`module='the part'`."
            ) from error
        ties = _ties(self._names)
        called = self._trace.graph.module2node
        self._walker = Walker(
            self._trace.graph, {side: [t for t in tied if t[0] in called] for side, tied in ties.items()}
        )
        self._uncalled = {side: [t for t in tied if t[0] not in called] for side, tied in ties.items()}
        self._found: list[ChannelGroup] | None = None

    @property
    def cores(self) -> dict[str, Core]:
        """Attention by the name of its output layer."""
        return self._trace.cores

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return dict(self.copy.named_modules(remove_duplicate=False))

    def around(self, group: ChannelGroup) -> list[str]:
        """Return the modules that run whenever a layer or a parameter of a group is used, outermost first."""
        used = []
        for member in group.members:
            layer = self._layers[member.layer]
            if member.parameter is None:
                used += [member.layer, *(self._parameters[parameter] for parameter in layer.parameters(recurse=False))]
            else:
                used.append(self._parameters[layer.get_parameter(member.parameter[0])])
        return list(dict.fromkeys(self._trace.around(used)))

    def reached(self) -> set[str]:
        """Return the layers that were called, or that hold a parameter from which the outputs were computed."""
        behind = parameters_behind(self._trace.outputs)
        holders = {name for layer, name in self._names.items() if behind & set(layer.parameters(recurse=False))}
        return self._trace.called | holders

    def called_in_training(self, inputs: ForwardInputs) -> set[str]:
        """Return the layers that the forward pass of training calls; none where it fails on these inputs."""
        self.copy.train()
        try:
            with called_layers(self.copy) as called, torch.no_grad(), torch.random.fork_rng(devices=[]):
                inputs.call_each(self.copy)
        except FAILURES:  # one row and BatchNorm
            pass
        finally:
            self.copy.eval()
        return called

    def groups(self) -> list[ChannelGroup]:
        """Return the groups of every layer that can lose outputs; each layer's outputs are in one group.

        Layers that an attention reads are in none: :func:`lightning_optim.structured.attention.proposals`.
        """
        if self._found is not None:
            return self._found
        read = {name for core in self.cores.values() for name in core.sources}
        found: list[ChannelGroup] = []
        seen: set[Any] = set()
        for layer in list(self._trace.graph.module2node):
            if layer in seen or layer not in self._names or not is_root(layer) or self._names[layer] in read:
                continue
            group = self._group(layer)
            if isinstance(group, str):
                name = self._names[layer]
                found.append(ChannelGroup(name, outputs_of(layer), 1, (), problem=group))
                continue
            seen |= {item.dep.target.module for item in group if self._side(item) == "out"}
            found.append(self._read(group))
        self._found = found
        return found

    def _side(self, item: Item) -> str:
        return "out" if self._trace.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"

    def _group(self, layer: nn.Module) -> list[Item] | str:
        """Return what leaves with all outputs of a layer, or why it cannot be told."""
        try:
            return self._whole(self._walk_all(layer))
        except FAILURES as error:
            return f"torch-pruning cannot follow its channels ({first_line(error, 120)})"

    def _walk_all(self, layer: nn.Module) -> list[Item]:
        return self._walker.walk(layer, range(outputs_of(layer)))

    def _whole(self, group: list[Item]) -> list[Item]:
        """Return the group from a layer that has all of its channels: of a split tensor's layer it may hold a part."""
        tried = {group[0].dep.target.module}
        while True:
            wider = next((layer for layer in self._losing(group, whole=False) if layer not in tried), None)
            if wider is None:
                return group
            tried.add(wider)
            candidate = self._walk_all(wider)
            if set(self._losing(group, whole=True)) <= set(self._losing(candidate, whole=True)):
                group = candidate

    def _losing(self, group: Iterable[Item], *, whole: bool) -> list[nn.Module]:
        """Return the layers that lose outputs with a group: those all of whose outputs are in it, or some."""
        found: dict[nn.Module, set[int]] = {}
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, nn.Module) and is_root(layer) and self._side(item) == "out":
                found.setdefault(layer, set()).update(item.idxs)
        return [layer for layer, indices in found.items() if (len(indices) == outputs_of(layer)) is whole]

    def _read(self, group: list[Item]) -> ChannelGroup:
        root, channels = group[0].dep.target.module, len(group[0].idxs)
        members, blocks, fewest, multiple = list[Member](), self._taken_along(root), 1, 1
        of_parts, splits = blocks_of_parts(group)
        blocks = math.lcm(blocks, of_parts)
        for item in group:
            layer = item.dep.target.module
            if layer not in self._names:  # an operation, or a parameter that no layer holds
                continue
            side = self._side(item)
            own = tuple(item.idxs), tuple(item.root_idxs)
            outer = outer_dims(layer)
            if outer:
                members += [Member(self._names[layer], each.side, *own, (each.leaf, each.dim)) for each in outer]
                multiple = ALIGNED if channels % ALIGNED == 0 else 1
            else:
                members.append(Member(self._names[layer], side, *own))
            blocks = math.lcm(blocks, blocks_of(layer))
            if side == "out" and isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and blocks_of(layer) > 1:
                fewest = 2  # with one output a block it would be a depthwise convolution
        problem = self._computed(members) or self._misaligned(members, channels, blocks)
        return ChannelGroup(
            self._names[root],
            channels,
            blocks,
            tuple(members),
            least=fewest * blocks,
            splits=splits,
            problem=problem,
            multiple=multiple,
        )

    def _taken_along(self, root: nn.Module) -> int:
        """Return how many outputs of a layer leave with its first: two for a gate that is half of them."""
        items = [item for item in self._walker.walk(root, [0]) if item.dep.target.module is root]
        return len({index for item in items for index in item.idxs})

    def _computed(self, members: Iterable[Member]) -> str:
        """Say which layer's weight is computed from other parameters, which would have to lose the channels."""
        for member in members:
            if is_computed(self._layers[member.layer]):
                return f"{member.layer} is parametrized (weight_norm, spectral_norm, prune, ...)"
        return ""

    def _misaligned(self, members: Iterable[Member], channels: int, blocks: int) -> str:
        """Say which layer's blocks would not lose the same channels each when the group's blocks do."""
        if channels % blocks:
            return f"its {channels} channels do not fall into {blocks} equal blocks"
        for member in members:
            layer = self._layers[member.layer]
            own = blocks_of(layer)
            if own > 1 and not _aligned(member, _width(layer, member.side), own, channels // blocks):
                return f"the {own} blocks of {member.layer} would not lose the same channels each"
        return ""

    def remove(
        self, channels: Mapping[str, Sequence[int]], groups: Mapping[str, ChannelGroup] | None = None
    ) -> Removal:
        """Return what is left when channels of some groups leave.

        Stand-ins of the layers that lose something hold their own flat indices instead of weights, so whatever
        torch-pruning leaves of them says which entries survive.

        Args:
            channels: Group name -> channels of its root layer.
            groups: The groups by name; needed for those that were proposed and for numbers that count channels.

        Raises:
            ValueError: If layers that share a parameter would lose different channels of it, or others would leave too.
        """
        known = groups or {}
        left = _Left(self._trace.graph, self.copy)
        for name, leaving in channels.items():
            group = known.get(name)
            for target, handler, dim, indices in self._losses(name, leaving, group):
                left.lose(target, handler, dim, indices)
        left.remove()
        for name, leaving in channels.items():
            root = self._layers[name]
            proposed = name in known and known[name].proposed  # its channels need not be the layer's own
            if not proposed and outputs_of(left.of(root)) != outputs_of(root) - len(leaving):
                raise ValueError(f"channels of {name} that were to stay would leave with others")
        removal = left.removal()
        for name, leaving in channels.items():
            for layer, values in known[name].counted(len(leaving)).items() if name in known else ():
                removal.attributes.setdefault(layer, {}).update(values)
        return removal

    def _losses(
        self, name: str, leaving: Sequence[int], group: ChannelGroup | None
    ) -> Iterable[tuple[Any, Any, int | None, Sequence[int]]]:
        """Yield what loses which of its channels: layer or parameter, torch-pruning's function, dimension, indices."""
        if group is None or not group.proposed:
            for item in self._walker.walk(self._layers[name], leaving):
                target = item.dep.target
                if target.module in self._names or isinstance(target.module, nn.Parameter):
                    yield target.module, item.dep.handler, target.pruning_dim, item.idxs
                for layer, outputs in self._uncalled.get((target.module, self._side(item) == "out"), ()):
                    yield layer, self._handler(layer, outputs), None, item.idxs
                for each in outer_dims(target.module) if target.module in self._names else ():
                    parameter = target.module.get_parameter(each.leaf)
                    yield parameter, self._handler(parameter, outputs=True), each.dim, item.idxs
            return
        for member in group.members:
            layer = self._layers[member.layer]
            if member.parameter is not None:
                leaf, dim = member.parameter
                parameter = layer.get_parameter(leaf)
                yield parameter, self._handler(parameter, outputs=True), dim, member.leaving(leaving)
                continue
            yield layer, self._handler(layer, member.side == "out"), None, member.leaving(leaving)

    def _handler(self, target: nn.Module | nn.Parameter, outputs: bool) -> Any:
        """Return torch-pruning's function that removes channels of a layer or a parameter."""
        pruner = self._trace.graph.get_pruner_of_module(target)
        return pruner.prune_out_channels if outputs else pruner.prune_in_channels


class _Left:
    """What torch-pruning leaves of the layers of a model: computed on stand-ins that hold flat indices."""

    def __init__(self, graph: Any, module: nn.Module) -> None:
        self._module = module
        self._losses: dict[tuple[Any, Any, int | None], set[int]] = {}
        self._stand_ins: dict[nn.Module, Any] = {}
        self._parameters: dict[nn.Parameter, nn.Parameter] = {}

    def lose(self, target: Any, handler: Any, dim: int | None, indices: Iterable[int]) -> None:
        """Note that a layer or a parameter loses some channels; all of one kind leave it at once.

        Indices are those of the whole model.
        """
        self._losses.setdefault((target, handler, dim), set()).update(indices)

    def of(self, layer: nn.Module) -> Any:
        """Return a layer's stand-in, the layer itself where it loses nothing."""
        return self._stand_ins.get(layer, layer)

    def remove(self) -> None:
        """Let every stand-in lose what was noted."""
        with torch.no_grad():
            for (target, handler, dim), indices in self._losses.items():
                if not indices:
                    continue
                handler.__self__.pruning_dim = dim
                if isinstance(target, nn.Parameter):
                    present = self._parameters.get(target)
                    self._parameters[target] = handler(
                        _numbered(target) if present is None else present, sorted(indices)
                    )
                    continue
                if target not in self._stand_ins:
                    self._stand_ins[target] = _stand_in(target)
                handler(self._stand_ins[target], sorted(indices))

    def removal(self) -> Removal:
        """Return what is left, under every name that a tensor has.

        Raises:
            ValueError: If a tensor with several names would lose different channels under them.
        """
        found, shared = Removal(), dict[nn.Parameter, list[str]]()
        for name, layer in self._module.named_modules(remove_duplicate=False):
            stand_in = self._stand_ins.get(layer)
            for leaf, tensor in _tensors(layer).items():
                full = f"{name}.{leaf}" if name else leaf
                if isinstance(tensor, nn.Parameter):
                    shared.setdefault(tensor, []).append(full)
                now: Tensor | None = self._parameters.get(tensor) if isinstance(tensor, nn.Parameter) else None
                if now is None and stand_in is not None:
                    now = _tensors(stand_in)[leaf]
                if now is not None and now.shape != tensor.shape:
                    found.kept[full] = now.detach().reshape(-1).long()
                    found.shapes[full] = tuple(now.shape)
            if stand_in is not None:
                before, after = _plain_attributes(layer), _plain_attributes(stand_in)
                changed = {key: value for key, value in after.items() if before.get(key) != value}
                if changed:
                    found.attributes[name] = changed
        for first, *others in shared.values():
            for other in others:
                if not _same(found.kept.get(first), found.kept.get(other)):
                    raise ValueError(f"{first} and {other} are one tensor and would lose different channels")
        return found


def _ties(layers: Iterable[nn.Module]) -> dict[Side, list[Side]]:
    """Return the layers whose outputs, or inputs, are entries of one tensor."""
    holders: dict[tuple[nn.Parameter, int], list[Side]] = {}
    for layer in layers:
        weight = layer._parameters.get("weight")  # a parametrized layer has none
        if weight is None or not (is_linear(layer) or isinstance(layer, EMBEDDINGS)):
            continue
        for outputs in (True,) if isinstance(layer, EMBEDDINGS) else (True, False):
            dim = 1 if isinstance(layer, (Conv1D, *EMBEDDINGS)) is outputs else 0
            holders.setdefault((weight, dim), []).append((layer, outputs))
    return {side: [other for other in sides if other != side] for sides in holders.values() for side in sides}


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _stand_in(layer: nn.Module) -> nn.Module:
    """Return an object like a layer, with flat indices instead of weights."""
    copied = object.__new__(type(layer))
    # Recurrent layers write a parameter that is set into a list too.
    own = {name: copy.copy(value) if type(value) in (list, dict) else value for name, value in vars(layer).items()}
    vars(copied).update(own)
    vars(copied)["_parameters"] = {
        leaf: None if p is None else nn.Parameter(_numbered(p)) if p.is_floating_point() else p
        for leaf, p in layer._parameters.items()
    }
    vars(copied)["_buffers"] = {
        leaf: _numbered(b).data if b is not None and b.is_floating_point() else copy.copy(b)
        for leaf, b in layer._buffers.items()
    }
    return copied


def _numbered(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape))


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's own floating-point parameters and buffers."""
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.is_floating_point()}


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if type(value) in (int, tuple, torch.Size) and not name.startswith("_")
    }


def _aligned(member: Member, width: int, blocks: int, per_block: int) -> bool:
    """Tell whether each relative channel of the group's blocks is the same place(s) in every block of a layer."""
    size = width // blocks
    places: dict[int, set[int]] = {}
    for index, root in zip(member.index, member.root, strict=True):
        places.setdefault(root % per_block, set()).add(index)
    return all(
        indices == {block * size + index % size for index in indices for block in range(blocks)}
        for indices in places.values()
    )


def _width(layer: Any, side: str) -> int:
    if isinstance(layer, nn.GroupNorm):
        return int(layer.num_channels)
    return int(layer.out_channels if side == "out" else layer.in_channels)
