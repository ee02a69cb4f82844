"""How channels leave layers that torch-pruning does not know, or treats wrongly.

Importing this imports torch-pruning, so it is imported where a model is traced, not with the package.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE, module2type
from torch_pruning.pruner.function import BasePruningFunc, ConvPruner

from lightning_optim.modules import RECURRENT, Conv1D, Experts
from lightning_optim.structured.cores import CoreNode
from lightning_optim.structured.experts import outer_dims, outer_width
from lightning_optim.structured.splits import Part

__all__ = ["own_pruners"]

_WIDTH = re.compile(r"(num_|n_|in_|out_|embed_|hidden_)?(features|channels|dims?|planes|width|size)|c")
"""Names of attributes that count the channels of a layer which treats each channel by itself."""


class _Convolutions(ConvPruner):  # type: ignore[misc]
    """torch-pruning takes a grouped transposed convolution's outputs for those of an ungrouped one."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        if not layer.transposed or layer.groups == 1:
            return super().prune_out_channels(layer, idxs)
        per_block = layer.out_channels // layer.groups
        layer.weight = nn.Parameter(_without(layer.weight, {index % per_block for index in idxs}, 1))
        if layer.bias is not None:
            layer.bias = nn.Parameter(_without(layer.bias, idxs, 0))
        layer.out_channels -= len(idxs)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        if not layer.transposed or layer.groups == 1:
            return super().prune_in_channels(layer, idxs)
        layer.weight = nn.Parameter(_without(layer.weight, idxs, 0))
        layer.in_channels -= len(idxs)
        return layer


class _Bags(BasePruningFunc):  # type: ignore[misc]
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


class _Recurrent(BasePruningFunc):  # type: ignore[misc]
    """Inputs of a recurrent layer; its outputs are states of its gates and stay."""

    TARGET_MODULES = RECURRENT

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


class _PerChannel(BasePruningFunc):  # type: ignore[misc]
    """A layer all of whose tensors hold one number a channel: a frozen BatchNorm, an RMSNorm, a norm of one's own."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        width = _channels_by_shape(layer)
        for name, tensor in _own_tensors(layer).items():
            if tensor.numel() == width:
                small = _without(tensor, idxs, list(tensor.shape).index(width))
                if name in layer._parameters:
                    layer._parameters[name] = nn.Parameter(small)
                else:
                    layer._buffers[name] = small
        if width is not None:
            _count(layer, width, width - len(idxs))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return _channels_by_shape(layer)

    get_in_channels = get_out_channels


class _Conv1D(BasePruningFunc):  # type: ignore[misc]
    """transformers' Conv1D, ``[inputs, outputs]``."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        layer.weight = nn.Parameter(_without(layer.weight, idxs, 1))
        if layer.bias is not None:
            layer.bias = nn.Parameter(_without(layer.bias, idxs, 0))
        layer.nf = layer.weight.shape[1]
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        layer.weight = nn.Parameter(_without(layer.weight, idxs, 0))
        if hasattr(layer, "nx"):
            layer.nx = layer.weight.shape[0]
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[1])

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[0])


class _Cores(BasePruningFunc):  # type: ignore[misc]
    """An attention: no channel passes through it."""

    def prune_out_channels(self, layer: CoreNode, idxs: Sequence[int]) -> CoreNode:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: CoreNode) -> None:
        return None

    get_in_channels = get_out_channels


class _Routers(BasePruningFunc):  # type: ignore[misc]
    """A router that multiplies by a weight of its own, ``[experts, inputs]``."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise ValueError(f"{type(layer).__name__} cannot lose outputs")

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        width = layer.weight.shape[1]
        layer.weight = nn.Parameter(_without(layer.weight, idxs, 1))
        _count(layer, width, width - len(idxs))
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[0])

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[1])


class _Experts(BasePruningFunc):  # type: ignore[misc]
    """The numbers of experts follow their outer channels; their parameters lose them one by one."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        width = outer_width(layer)
        if width is not None:
            _count(layer, width, width - len(idxs))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return outer_width(layer)

    get_in_channels = get_out_channels


class _Parts(BasePruningFunc):  # type: ignore[misc]
    """A part of a split: it loses nothing itself."""

    def prune_out_channels(self, layer: Part, idxs: Sequence[int]) -> Part:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Part) -> int | None:
        return None if layer.places is None else len(layer.places)

    def get_in_channels(self, layer: Part) -> int | None:
        return None if layer.places is None else layer.width


def own_pruners(graph: Any, module: nn.Module) -> dict[type[nn.Module], Any]:
    """Return torch-pruning's kind of pruner for each class of layer of a module that needs one of ours.

    Args:
        graph: torch-pruning's graph; its pruner of convolutions is replaced.
        module: What will be traced.
    """
    graph.REGISTERED_PRUNERS[OPTYPE.CONV] = _Convolutions()
    pruners: dict[type[nn.Module], Any] = {
        Part: _Parts(),
        CoreNode: _Cores(),
    }  # an entry also makes the graph look up the one above
    kinds: list[tuple[Any, Any]] = [
        ((nn.EmbeddingBag,), _Bags()),
        (RECURRENT, _Recurrent()),
    ]
    layers = list(module.modules())
    pruners |= {type(layer): _Conv1D() for layer in layers if isinstance(layer, Conv1D)}
    pruners |= {type(layer): _Experts() for layer in layers if isinstance(layer, Experts) and outer_dims(layer)}
    for layer in layers:
        pruners |= {type(layer): pruner for classes, pruner in kinds if isinstance(layer, classes)}
    plain = {type(layer) for layer in layers if module2type(layer) in (OPTYPE.ELEMENTWISE, OPTYPE.IN)} - pruners.keys()
    for cls in plain:
        if all(_channels_by_shape(layer) for layer in layers if type(layer) is cls):
            pruners[cls] = _PerChannel()
        elif all(_routes(layer, module) for layer in layers if type(layer) is cls):
            pruners[cls] = _Routers()
    return pruners


def _routes(layer: nn.Module, module: nn.Module) -> bool:
    """Tell whether a layer has a matrix with a row for each expert, perhaps a bias, and nothing else."""
    experts = {each.num_experts for each in module.modules() if isinstance(each, Experts)}
    own = {name: tuple(tensor.shape) for name, tensor in _own_tensors(layer).items()}
    weight = own.pop("weight", ())
    bias = own.pop("bias", weight[:1])
    return not layer._modules and not own and len(weight) == 2 and weight[0] in experts and bias == weight[:1]


def _count(layer: nn.Module, before: int, after: int) -> None:
    """Change the numbers of a layer that count its channels."""
    for name, value in list(vars(layer).items()):
        if type(value) is int and value == before and _WIDTH.fullmatch(name):
            setattr(layer, name, after)


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.is_floating_point()}


def _channels_by_shape(layer: nn.Module) -> int | None:
    """Return how many channels a layer has whose tensors, some of them buffers, all hold one number a channel.

    None where a tensor has two dimensions or they differ: then nothing says what a channel is.
    """
    if isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return int(layer.num_features)
    tensors = _own_tensors(layer)
    sizes = {tensor.numel() for tensor in tensors.values() if tensor.numel() > 1}
    flat = all(max(tensor.shape, default=1) == tensor.numel() for tensor in tensors.values())
    if layer._modules or not flat or len(sizes) != 1:
        return None
    return sizes.pop()


def _without(weight: Tensor, indices: Sequence[int] | set[int], dim: int) -> Tensor:
    keep = sorted(set(range(weight.shape[dim])) - set(indices))
    return weight.detach().index_select(dim, torch.tensor(keep, dtype=torch.long, device=weight.device))
