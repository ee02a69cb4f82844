"""Channel groups: which channels of which layers leave together.

torch-pruning traces a copy of the model and says which layers are coupled; nothing else of it is used, and it never
touches the model itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.modules import CONVOLUTIONS, EMBEDDINGS, RECURRENT, TRANSPOSED, copy_module, without_fast_path
from lightning_optim.structured.patience import Patience
from lightning_optim.structured.reach import called_layers, differentiable, parameters_behind
from lightning_optim.structured.splits import SplitTracer, blocks_of_parts, map_parts
from lightning_optim.target import ForwardInputs, is_computed, named_layers

__all__ = ["ChannelGroup", "Member", "Removal", "TracedModel", "outputs_of"]

_ROOTS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS)


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        layer: The layer's dotted name below the traced module.
        side: ``"out"`` when its outputs leave, ``"in"`` when its inputs do.
        index: The layer's own channel of each entry, ``[entries]``.
        root: The group's channel that takes this entry along, ``[entries]``; several entries may belong to one.
    """

    layer: str
    side: str
    index: tuple[int, ...]
    root: tuple[int, ...]


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
        counts: Attributes that count these channels and that torch-pruning does not know: layer, attribute, and how
            many channels it counts as one (a number of heads: the width of a head); a tuple where it holds several.
        splits: Modules that split these channels, and the sizes of the parts.
        problem: Why it cannot be pruned, where that is known without trying.
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

    @property
    def layers(self) -> set[str]:
        """Names of all layers that change."""
        return {member.layer for member in self.members}

    def now(self, traced: "ChannelGroup") -> "ChannelGroup":
        """Return the group as a later trace sees it, with what only the check could tell."""
        return replace(traced, unit=self.unit, least=self.least, counts=self.counts)


@dataclass(frozen=True)
class Removal:
    """What is left when channels leave.

    Attributes:
        kept: Surviving flat indices of each parameter and buffer that changes, by name, int64.
        shapes: Its new shape.
        attributes: Attributes that change, by layer.
    """

    kept: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[str, dict[str, Any]]


class TracedModel:
    """A traced copy of a model: its groups, and what is left of it when channels leave.

    Args:
        module: The model; it is not touched.
        inputs: What its forward receives.

    Raises:
        ValueError: If the model cannot be traced.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs) -> None:
        self._copy = copy_module(module, rounded=False)
        for layer in self._copy.modules():
            for parameter in layer.parameters(recurse=False):  # frozen layers are invisible to the tracing
                one_for_all = not isinstance(layer, _ROOTS) and not is_lazy(parameter) and parameter.numel() == 1
                parameter.requires_grad_(not one_for_all)
        self._names = {layer: name for name, layer in self._copy.named_modules()}
        try:
            self._graph, self._outputs, self._called = _trace(self._copy, inputs)
        except _Untraceable as error:
            raise ValueError(f"{error}.") from None
        except FAILURES as error:
            raise ValueError(
                f"{type(module).__name__} cannot be traced ({first_line(error, 120)}). Prune a part of it: "
                "`module='the part'`."
            ) from error
        self._patience = Patience(self._graph)

    def reached(self) -> set[str]:
        """Return the layers that were called, or that hold a parameter from which the outputs were computed."""
        behind = parameters_behind(self._outputs)
        holders = {name for layer, name in self._names.items() if behind & set(layer.parameters(recurse=False))}
        return self._called | holders

    def called_in_training(self, inputs: ForwardInputs) -> set[str]:
        """Return the layers that the forward pass of training calls; none where it fails on these inputs."""
        self._copy.train()
        try:
            with called_layers(self._copy) as called, torch.no_grad(), torch.random.fork_rng(devices=[]):
                inputs.call_each(self._copy)
        except FAILURES:  # one row and BatchNorm
            pass
        finally:
            self._copy.eval()
        return called

    def groups(self) -> list[ChannelGroup]:
        """Return the groups of every layer that can lose outputs; each layer's outputs are in one group."""
        found, seen = [], set()
        for layer in list(self._graph.module2node):
            if not isinstance(layer, _ROOTS) or layer in seen or layer not in self._names:
                continue
            group = self._group(layer)
            if isinstance(group, str):
                name = self._names[layer]
                found.append(ChannelGroup(name, outputs_of(layer), 1, (), problem=group))
                continue
            for item in group:
                if self._graph.is_out_channel_pruning_fn(item.dep.handler):
                    seen.add(item.dep.target.module)
            found.append(self._read(group))
        return found

    def _group(self, layer: nn.Module) -> Any:
        """Return torch-pruning's group of all outputs of a layer, or why there is none."""
        try:
            return self._whole(self._walk(layer, range(outputs_of(layer))))
        except FAILURES as error:
            return f"torch-pruning cannot follow its channels ({first_line(error, 120)})"

    def _whole(self, group: Any) -> Any:
        """Return the group from a layer that has all of its channels: of a split tensor's layer it may hold a part."""
        tried = {group[0].dep.target.module}
        while True:
            wider = next((layer for layer in self._losing(group, whole=False) if layer not in tried), None)
            if wider is None:
                return group
            tried.add(wider)
            candidate = self._walk(wider, range(outputs_of(wider)))
            if set(self._losing(group, whole=True)) <= set(self._losing(candidate, whole=True)):
                group = candidate

    def _losing(self, group: Any, *, whole: bool) -> list[nn.Module]:
        """Return the layers that lose outputs with a group: those all of whose outputs are in it, or some."""
        found: dict[nn.Module, set[int]] = {}
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, _ROOTS) and self._graph.is_out_channel_pruning_fn(item.dep.handler):
                found.setdefault(layer, set()).update(item.idxs)
        return [layer for layer, indices in found.items() if (len(indices) == outputs_of(layer)) is whole]

    def _walk(self, layer: nn.Module, channels: Sequence[int]) -> Any:
        """Return torch-pruning's group of some outputs of a layer."""
        self._patience.renew()
        pruner = self._graph.get_pruner_of_module(layer)
        return self._graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(channels))

    def _read(self, group: Any) -> ChannelGroup:
        root, channels = group[0].dep.target.module, len(group[0].idxs)
        members, blocks, fewest = [], self._taken_along(root), 1
        of_parts, splits = blocks_of_parts(group)
        blocks = math.lcm(blocks, of_parts)
        for item in group:
            layer = item.dep.target.module
            if layer not in self._names:  # an operation, or a parameter that no layer holds
                continue
            side = "out" if self._graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            members.append(Member(self._names[layer], side, tuple(item.idxs), tuple(item.root_idxs)))
            blocks = math.lcm(blocks, _blocks(layer))
            if side == "out" and isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and _blocks(layer) > 1:
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
        )

    def _taken_along(self, root: nn.Module) -> int:
        """Return how many outputs of a layer leave with its first: two for a gate that is half of them."""
        items = [item for item in self._walk(root, [0]) if item.dep.target.module is root]
        return len({index for item in items for index in item.idxs})

    def _computed(self, members: Iterable[Member]) -> str:
        """Say which layer's weight is computed from other parameters, which would have to lose the channels."""
        layers = {name: layer for layer, name in self._names.items()}
        for member in members:
            if is_computed(layers[member.layer]):
                return f"{member.layer} is parametrized (weight_norm, spectral_norm, prune, ...)"
        return ""

    def _misaligned(self, members: Iterable[Member], channels: int, blocks: int) -> str:
        """Say which layer's blocks would not lose the same channels each when the group's blocks do."""
        if channels % blocks:
            return f"its {channels} channels do not fall into {blocks} equal blocks"
        layers = {name: layer for layer, name in self._names.items()}
        for member in members:
            own = _blocks(layers[member.layer])
            if own > 1 and not _aligned(member, _width(layers[member.layer], member.side), own, channels // blocks):
                return f"the {own} blocks of {member.layer} would not lose the same channels each"
        return ""

    def remove(self, channels: Mapping[str, Sequence[int]]) -> Removal:
        """Return what is left when channels of some groups leave; the copy is used up by it.

        The copy's parameters and buffers are filled with their own flat indices, so whatever torch-pruning leaves
        of them says which entries survive.

        Args:
            channels: Group name -> channels of its root layer.

        Raises:
            ValueError: If layers that share a parameter would lose different channels of it, or others would leave too.
        """
        before = {name: _plain_attributes(layer) for layer, name in self._names.items()}
        shapes = {name: tensor.shape for name, tensor in _tensors(self._copy).items()}
        shared = _shared(self._copy)
        for tensor in _tensors(self._copy).values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        layers = {name: layer for layer, name in self._names.items()}
        stay = {name: outputs_of(layers[name]) - len(leaving) for name, leaving in channels.items()}
        self._prune([self._walk(layers[name], leaving) for name, leaving in channels.items()])
        for name, number in stay.items():
            if outputs_of(layers[name]) != number:
                raise ValueError(f"channels of {name} that were to stay would leave with others")
        left = {name: tensor for name, tensor in _tensors(self._copy).items() if tensor.shape != shapes[name]}
        self._check_shared(shared, left)
        after = {name: _plain_attributes(layer) for layer, name in self._names.items()}
        changed = {
            name: {key: value for key, value in after[name].items() if before[name].get(key) != value} for name in after
        }
        return Removal(
            {name: tensor.detach().reshape(-1).long() for name, tensor in left.items()},
            {name: tuple(tensor.shape) for name, tensor in left.items()},
            {name: attributes for name, attributes in changed.items() if attributes},
        )

    def _prune(self, groups: Iterable[Any]) -> None:
        """Let each layer lose at once what it loses with several groups: their indices are those of the whole model."""
        leaving: dict[tuple[Any, Any], tuple[Any, set[int]]] = {}
        for item in (item for group in groups for item in group):
            layer = item.dep.target.module
            if layer in self._names or isinstance(layer, nn.Parameter):
                leaving.setdefault((layer, item.dep.handler), (item.dep, set()))[1].update(item.idxs)
        with torch.no_grad():
            for (layer, _), (dependency, indices) in leaving.items():
                smaller = dependency(sorted(indices))
                if isinstance(layer, nn.Parameter):
                    owner, _, leaf = self._graph._param_to_name[layer].rpartition(".")
                    setattr(self._copy.get_submodule(owner), leaf, smaller)

    def _check_shared(self, shared: Iterable[list[str]], left: Mapping[str, Tensor]) -> None:
        for first, *others in shared:
            for other in others:
                both = left.get(first), left.get(other)
                same = both[0] is both[1] is None or (
                    both[0] is not None and both[1] is not None and torch.equal(both[0], both[1])
                )
                if not same:
                    raise ValueError(f"{first} and {other} are one tensor and would lose different channels")


def _shared(module: nn.Module) -> list[list[str]]:
    """Return the names of every parameter that has more than one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [each for each in names.values() if len(each) > 1]


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


def outputs_of(layer: Any) -> int:
    """Return the number of output channels of a layer that can lose some."""
    names = ("out_features", "out_channels", "embedding_dim")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return floating-point parameters and buffers, all names of a shared one too."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in {**parameters, **buffers}.items() if tensor.is_floating_point()}


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if type(value) in (int, tuple, torch.Size) and not name.startswith("_")
    }


def _blocks(layer: nn.Module) -> int:
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and not _is_depthwise(layer):
        return layer.groups
    return 1


def _is_depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.out_channels == layer.in_channels)


class _Untraceable(ValueError):
    """No output leads to a layer."""


def _trace(module: nn.Module, inputs: ForwardInputs) -> tuple[Any, list[Tensor], set[str]]:
    """Return torch-pruning's graph, the outputs that it starts from, and the names of the layers that were called."""
    from lightning_optim.structured.pruners import own_pruners  # imports torch-pruning

    tracer = SplitTracer()
    graph = tracer.graph()
    outputs: list[Tensor] = []
    called: set[str] = set()

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        with called_layers(model) as names, tracer.following(model), tracer:
            returned = inputs.call_each(model)
        called.update(names)
        try:
            outputs[:] = differentiable(model, returned)
        except ValueError as error:
            raise _Untraceable(str(error)) from None
        return [leaf if leaf.ndim > 1 else leaf.reshape(-1, 1) for leaf in outputs]  # it takes dimension 1 as theirs

    with (
        without_fast_path(),
        torch.enable_grad(),
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
        _opaque_recurrent_layers(module),
        _without_metrics(module),
    ):
        graph.build_dependency(
            module,
            inputs.args,
            forward_fn=forward,
            customized_pruners=own_pruners(graph, module),
            ignored_layers=[layer for layer in module.modules() if _treats_channels_alike(layer)],
            verbose=False,
        )
    map_parts(graph)
    return graph, outputs, called


def _treats_channels_alike(layer: nn.Module) -> bool:
    """Tell whether a layer with parameters does the same to every channel, so that it loses none."""
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


@contextmanager
def _without_metrics(module: nn.Module):  # type: ignore[no-untyped-def]
    """Hide metrics from torch-pruning: it looks layers up in lists, and a torchmetrics metric equals everything."""
    module.__dict__["modules"] = lambda: (layer for _, layer in named_layers(module))
    try:
        yield
    finally:
        del module.__dict__["modules"]


class _Opaque(torch.autograd.Function):
    """One step of the graph from a layer's input to its outputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise NotImplementedError


@contextmanager
def _opaque_recurrent_layers(module: nn.Module):  # type: ignore[no-untyped-def]
    """Trace recurrent layers as one step: their gates are chunks that torch-pruning indexes wrongly."""
    from lightning_optim._upstream import tree_flatten, tree_unflatten

    def opaque(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        if not inputs or not isinstance(inputs[0], Tensor):  # a packed sequence
            return outputs
        leaves, structure = tree_flatten(outputs)
        source = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        traced = _Opaque.apply(source, *(leaf.detach() for leaf in leaves))  # type: ignore[no-untyped-call]
        return tree_unflatten(list(traced), structure)

    recurrent = (layer for layer in module.modules() if isinstance(layer, RECURRENT))
    handles = [layer.register_forward_hook(opaque) for layer in recurrent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
