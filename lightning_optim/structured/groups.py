"""Channel groups: which channels of which layers leave together.

torch-pruning traces a copy of the model and says which layers are coupled; nothing else of it is used, and it never
touches the model itself.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.outputs import output_tensors
from lightning_optim.structured.reach import called_layers, differentiable, parameters_behind
from lightning_optim.target import ForwardInputs

__all__ = ["FAILURES", "ChannelGroup", "Member", "Removal", "TracedModel", "copy_for_tracing"]

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch-pruning, or a forward after a wrong removal, may raise."""

READS_PER_NODE = 4
"""Walks that end took 1.1 (Swin), 0.6 (BERT) and fewer; a Llama block more than 50."""

INDICES_PER_CHANNEL = 8
"""Of the widest layer; no walk that ends finds more in a step."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ROOTS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_EMBEDDINGS)


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
            many channels it counts as one (a number of heads: the width of a head).
        problem: Why it cannot be pruned, where that is known without trying.
    """

    name: str
    channels: int
    blocks: int
    members: tuple[Member, ...]
    unit: int = 1
    least: int = 1
    counts: tuple[tuple[str, str, int], ...] = ()
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


def copy_for_tracing(module: nn.Module, *, rounded: bool = True) -> nn.Module:
    """Return a deep copy in eval mode that can be called and traced by itself.

    A LightningModule's patched ``forward`` and steps stay bound to the original in a copy, so they are dropped.

    Args:
        module: What is copied.
        rounded: Whether quantized layers round as they do in ``module``; else the copy computes in float.
    """
    duplicate = copy.deepcopy(module, _shared_values(module))
    for layer in duplicate.modules():
        for patched in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            if not isinstance(layer.__dict__.get(patched), MethodType):  # a bound method follows the copy
                layer.__dict__.pop(patched, None)
        if "_orig_mod" in layer._modules:  # torch.compile's wrapper: its module is called as it is
            layer.__dict__["forward"] = layer._modules["_orig_mod"]
        layer.__dict__.pop("_compiled_call_impl", None)  # of `module.compile()`: a LightningModule's copy keeps it
    for layer in duplicate.modules():
        if not rounded and hasattr(layer, "quantization_phase"):  # told by its mark: this module does not know them
            vars(layer).update(quantization_phase="off", output_phase="off")
    return duplicate.eval()


def _shared_values(module: nn.Module) -> dict[int, Any]:
    """Return a memo for deepcopy: what hangs on the modules and cannot be copied is shared, tensors of a graph cut.

    A LightningModule may keep its steps' outputs, a lock, a client.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in vars(layer).values():
            leaves = [leaf for leaf in output_tensors(value, objects=False) if not leaf.is_leaf]
            memo.update({id(leaf): leaf.detach().clone() for leaf in leaves})
            if type(value).__module__ in ("_thread", "threading", "_io", "socket"):
                memo[id(value)] = value
    return memo


class TracedModel:
    """A traced copy of a model: its groups, and what is left of it when channels leave.

    Args:
        module: The model; it is not touched.
        inputs: What its forward receives.

    Raises:
        ValueError: If the model cannot be traced.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs) -> None:
        self._copy = copy_for_tracing(module, rounded=False).requires_grad_(
            True
        )  # frozen layers are invisible to the tracing
        self._names = {layer: name for name, layer in self._copy.named_modules()}
        try:
            self._graph, self._outputs, self._called = _trace(self._copy, inputs)
        except _Untraceable as error:
            raise ValueError(f"{error}.") from None
        except FAILURES as error:
            raise ValueError(
                f"{type(module).__name__} cannot be traced ({_first_line(error)}). Prune a part of it: "
                "`module='the part'`."
            ) from error
        self._patience = _Patience(self._graph)

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
                found.append(ChannelGroup(name, _outputs_of(layer), 1, (), problem=group))
                continue
            for item in group:
                if self._graph.is_out_channel_pruning_fn(item.dep.handler):
                    seen.add(item.dep.target.module)
            found.append(self._read(group))
        return found

    def _group(self, layer: nn.Module) -> Any:
        """Return torch-pruning's group of all outputs of a layer, or why there is none."""
        try:
            return self._walk(layer, range(_outputs_of(layer)))
        except FAILURES as error:
            return f"torch-pruning cannot follow its channels ({_first_line(error)})"

    def _walk(self, layer: nn.Module, channels: Sequence[int]) -> Any:
        """Return torch-pruning's group of some outputs of a layer."""
        self._patience.renew()
        pruner = self._graph.get_pruner_of_module(layer)
        return self._graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(channels))

    def _read(self, group: Any) -> ChannelGroup:
        root, channels = group[0].dep.target.module, len(group[0].idxs)
        members, blocks, fewest = [], self._taken_along(root), 1
        for item in group:
            layer = item.dep.target.module
            if layer not in self._names:  # an operation, or a parameter that no layer holds
                continue
            side = "out" if self._graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            members.append(Member(self._names[layer], side, tuple(item.idxs), tuple(item.root_idxs)))
            blocks = math.lcm(blocks, _blocks(layer))
            if side == "out" and isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)) and _blocks(layer) > 1:
                fewest = 2  # with one output a block it would be a depthwise convolution
        problem = self._misaligned(members, channels, blocks)
        return ChannelGroup(self._names[root], channels, blocks, tuple(members), least=fewest * blocks, problem=problem)

    def _taken_along(self, root: nn.Module) -> int:
        """Return how many outputs of a layer leave with its first: two for a gate that is half of them."""
        items = [item for item in self._walk(root, [0]) if item.dep.target.module is root]
        return len({index for item in items for index in item.idxs})

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
        for name, leaving in channels.items():
            stay = _outputs_of(layers[name]) - len(leaving)
            with torch.no_grad():
                self._walk(layers[name], leaving).prune()
            if _outputs_of(layers[name]) != stay:
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

    def _check_shared(self, shared: Iterable[list[str]], left: Mapping[str, Tensor]) -> None:
        for first, *others in shared:
            for other in others:
                both = left.get(first), left.get(other)
                same = both[0] is both[1] is None or (
                    both[0] is not None and both[1] is not None and torch.equal(both[0], both[1])
                )
                if not same:
                    raise ValueError(f"{first} and {other} are one tensor and would lose different channels")


class _Patience:
    """Ends a walk of torch-pruning 1.6.1 that goes round in circles.

    Where rotary embeddings cut halves of a head and join them the other way round, it finds new indices for the same
    layers for ever; where products of stacked vectors are flattened, more of them at every turn.
    """

    def __init__(self, graph: Any) -> None:
        self.limit = READS_PER_NODE * len(graph.module2node) + 500
        widths = (
            max(p.shape)
            for layer in graph.module2node
            if isinstance(layer, nn.Module)
            for p in layer.parameters(recurse=False)
            if p.ndim
        )
        self.most_indices = INDICES_PER_CHANNEL * max(widths, default=0) + 500
        for node in graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _Mappings(dependency.index_mapping, self)
            node.dependencies = _Counted(node.dependencies, self)
        self.renew()

    def renew(self) -> None:
        """Begin another walk."""
        self.left = self.limit

    def spend(self, indices: int = 0) -> None:
        """Count a read that found some indices.

        Raises:
            RuntimeError: If there were too many.
        """
        self.left -= 1
        if self.left < 0 or indices > self.most_indices:
            raise RuntimeError("its walk through the graph does not end")


class _Counted(list[Any]):
    """A list whose reader may lose patience."""

    def __init__(self, items: Iterable[Any], patience: _Patience) -> None:
        super().__init__(items)
        self.patience = patience

    def __iter__(self) -> Iterator[Any]:
        self.patience.spend()
        return super().__iter__()


class _Mappings(_Counted):
    """Index mappings whose results may not grow for ever."""

    def __iter__(self) -> Iterator[Any]:
        for mapping in list.__iter__(self):
            yield None if mapping is None else partial(self._mapped, mapping)

    def _mapped(self, mapping: Any, indices: Any) -> Any:
        found = mapping(indices)
        self.patience.spend(len(found))
        return found


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


def _outputs_of(layer: Any) -> int:
    names = ("out_features", "out_channels", "embedding_dim")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


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
    if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)) and not _is_depthwise(layer):
        return layer.groups
    return 1


def _is_depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.out_channels == layer.in_channels)


@contextmanager
def _without_flash_paths():  # type: ignore[no-untyped-def]
    """Trace with gradients and without the fused path of ``nn.TransformerEncoder``, which hides its layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Untraceable(ValueError):
    """No output leads to a layer."""


def _trace(module: nn.Module, inputs: ForwardInputs) -> tuple[Any, list[Tensor], set[str]]:
    """Return torch-pruning's graph, the outputs that it starts from, and the names of the layers that were called."""
    import torch_pruning as tp

    pruners = _own_pruners()
    graph = tp.DependencyGraph()
    outputs: list[Tensor] = []
    called: set[str] = set()

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        with called_layers(model) as names:
            returned = inputs.call_each(model)
        called.update(names)
        try:
            outputs[:] = differentiable(model, returned)
        except ValueError as error:
            raise _Untraceable(str(error)) from None
        return [leaf if leaf.ndim > 1 else leaf.reshape(-1, 1) for leaf in outputs]  # it takes dimension 1 as theirs

    with _without_flash_paths(), torch.random.fork_rng(devices=[]), _opaque_recurrent_layers(module):
        graph.build_dependency(
            module,
            inputs.args,
            forward_fn=forward,
            customized_pruners={
                type(layer): p for layer in module.modules() for t, p in pruners if isinstance(layer, t)
            },
            verbose=False,
        )
    return graph, outputs, called


def _own_pruners() -> list[tuple[tuple[type[nn.Module], ...], Any]]:
    """Return pruners of layers that torch-pruning does not know, or treats wrongly."""
    from torch_pruning.pruner.function import BasePruningFunc

    class BagPruner(BasePruningFunc):  # type: ignore[misc]
        """Columns of an EmbeddingBag."""

        TARGET_MODULES = (nn.EmbeddingBag,)

        def prune_out_channels(self, layer: nn.EmbeddingBag, idxs: Sequence[int]) -> nn.EmbeddingBag:
            layer.weight = nn.Parameter(_without(layer.weight, idxs, 1))
            layer.embedding_dim = layer.weight.shape[1]
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.EmbeddingBag) -> int:
            return layer.embedding_dim

        get_in_channels = get_out_channels

    class RecurrentPruner(BasePruningFunc):  # type: ignore[misc]
        """Inputs of a recurrent layer; its outputs are states of its gates and stay."""

        TARGET_MODULES = (nn.RNNBase, nn.RNNCellBase)

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise ValueError(f"{type(layer).__name__} cannot lose outputs")

        def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            for name in ("weight_ih_l0", "weight_ih_l0_reverse", "weight_ih"):
                if name in layer._parameters:
                    setattr(layer, name, nn.Parameter(_without(layer._parameters[name], idxs, 1)))
            layer.input_size -= len(idxs)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.hidden_size)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.input_size)

    return [((nn.EmbeddingBag,), BagPruner()), ((nn.RNNBase, nn.RNNCellBase), RecurrentPruner())]


def _without(weight: Tensor, indices: Sequence[int], dim: int) -> Tensor:
    keep = sorted(set(range(weight.shape[dim])) - set(indices))
    return weight.detach().index_select(dim, torch.tensor(keep, dtype=torch.long, device=weight.device))


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

    recurrent = (layer for layer in module.modules() if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)))
    handles = [layer.register_forward_hook(opaque) for layer in recurrent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
