"""Channel groups: which channels of which layers leave together.

torch-pruning traces a copy of the model and says which layers are coupled; nothing else of it is used, and it never
touches the model itself.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.target import ForwardInputs

__all__ = ["ChannelGroup", "Member", "Removal", "TracedModel", "copy_for_tracing"]

_NORMS_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm)
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
            convolutions, GroupNorm); 1 mostly.
        exact: Whether removing equals setting to zero: not so where a norm is taken over the channels.
        members: The layers.
    """

    name: str
    channels: int
    blocks: int
    exact: bool
    members: tuple[Member, ...]

    @property
    def layers(self) -> set[str]:
        """Names of all layers that change."""
        return {member.layer for member in self.members}


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


def copy_for_tracing(module: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode that can be called and traced by itself.

    A LightningModule's patched ``forward`` and steps stay bound to the original in a copy, so they are dropped.
    """
    duplicate = copy.deepcopy(module)
    for layer in duplicate.modules():
        for patched in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            layer.__dict__.pop(patched, None)
        if "_orig_mod" in layer._modules:  # torch.compile's wrapper: its module is called as it is
            layer.__dict__["forward"] = layer._modules["_orig_mod"]
    return duplicate.eval()


class TracedModel:
    """A traced copy of a model: its groups, and what is left of it when channels leave.

    Args:
        module: The model; it is not touched.
        inputs: What its forward receives.

    Raises:
        ValueError: If the model cannot be traced.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs) -> None:
        self._copy = copy_for_tracing(module).requires_grad_(True)  # frozen layers are invisible to the tracing
        self._names = {layer: name for name, layer in self._copy.named_modules()}
        self._graph = _trace(self._copy, inputs)

    def groups(self, roots: Iterable[str] | None = None) -> list[ChannelGroup]:
        """Return the groups whose root is among the named layers (default: every layer that can be one)."""
        wanted = None if roots is None else set(roots)
        found = []
        for group in self._graph.get_all_groups(root_module_types=_ROOTS):
            if wanted is None or self._names[group[0].dep.target.module] in wanted:
                found.append(self._read(group))
        return found

    def _read(self, group: Any) -> ChannelGroup:
        members, blocks, exact = [], 1, True
        for item in group:
            layer = item.dep.target.module
            if layer not in self._names:  # an operation, or a parameter that no layer holds
                continue
            side = "out" if self._graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            members.append(Member(self._names[layer], side, tuple(item.idxs), tuple(item.root_idxs)))
            blocks = math.lcm(blocks, _blocks(layer))
            exact = exact and not isinstance(layer, _NORMS_OVER_CHANNELS)
        root = group[0].dep.target.module
        return ChannelGroup(self._names[root], len(group[0].idxs), blocks, exact, tuple(members))

    def remove(self, channels: Mapping[str, Sequence[int]]) -> Removal:
        """Return what is left when channels of some groups leave; the copy is used up by it.

        The copy's parameters and buffers are filled with their own flat indices, so whatever torch-pruning leaves
        of them says which entries survive.

        Args:
            channels: Group name -> channels of its root layer.
        """
        before = {name: _plain_attributes(layer) for layer, name in self._names.items()}
        shapes = {name: tensor.shape for name, tensor in _tensors(self._copy).items()}
        for tensor in _tensors(self._copy).values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        layers = {name: layer for layer, name in self._names.items()}
        for name, leaving in channels.items():
            handler = self._graph.get_pruner_of_module(layers[name]).prune_out_channels
            with torch.no_grad():
                self._graph.get_pruning_group(layers[name], handler, sorted(leaving)).prune()
        left = {name: tensor for name, tensor in _tensors(self._copy).items() if tensor.shape != shapes[name]}
        after = {name: _plain_attributes(layer) for layer, name in self._names.items()}
        changed = {
            name: {key: value for key, value in after[name].items() if before[name].get(key) != value} for name in after
        }
        return Removal(
            {name: tensor.detach().reshape(-1).long() for name, tensor in left.items()},
            {name: tuple(tensor.shape) for name, tensor in left.items()},
            {name: attributes for name, attributes in changed.items() if attributes},
        )


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


def _trace(module: nn.Module, inputs: ForwardInputs) -> Any:
    import torch_pruning as tp
    from torch_pruning.pruner.function import BasePruningFunc

    class BagPruner(BasePruningFunc):  # type: ignore[misc]
        """Columns of an EmbeddingBag, which torch-pruning does not know."""

        TARGET_MODULES = (nn.EmbeddingBag,)

        def prune_out_channels(self, layer: nn.EmbeddingBag, idxs: Sequence[int]) -> nn.Module:
            keep = sorted(set(range(layer.embedding_dim)) - set(idxs))
            layer.weight = nn.Parameter(layer.weight.detach()[:, keep])
            layer.embedding_dim = len(keep)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.EmbeddingBag) -> int:
            return layer.embedding_dim

        get_in_channels = get_out_channels

    graph = tp.DependencyGraph()
    with _without_flash_paths(), torch.random.fork_rng(devices=[]):
        graph.build_dependency(
            module,
            inputs.args,
            forward_fn=lambda model, _: _tensors_of(inputs.call(model)),
            customized_pruners={nn.EmbeddingBag: BagPruner()},
            verbose=False,
        )
    return graph


def _tensors_of(output: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
