"""What every technique needs of a module: families of layers, a copy to call, and modes that are restored."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim._upstream import NormBase
from lightning_optim.outputs import output_tensors

__all__ = [
    "COMPILED_CHILD",
    "CONVOLUTIONS",
    "CONVOLVING",
    "EMBEDDINGS",
    "INPUTS_FIRST",
    "LINEARS",
    "NORMS",
    "RECURRENT",
    "TRANSPOSED",
    "Conv1D",
    "Experts",
    "copy_module",
    "evaluating",
    "expert_weights",
    "is_compiled",
    "is_inside_compiled",
    "matrices_of",
    "stores_inputs_first",
    "without_compiler",
    "without_fast_path",
]


class _Family(type):
    """Metaclass of a family of layers that are recognized by what they hold: ``isinstance(layer, Family)`` asks it."""

    def __instancecheck__(cls, layer: Any) -> bool:
        return isinstance(layer, nn.Module) and cls.holds(layer)

    def holds(cls, layer: nn.Module) -> bool:
        """Whether a layer belongs to the family."""
        raise NotImplementedError


class _Conv1DFamily(_Family):
    def holds(cls, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        named = any(base.__name__ in ("Conv1D", "QuantizedConv1D") for base in type(layer).__mro__)
        return named and weight is not None and weight.ndim == 2 and getattr(layer, "nf", None) == weight.shape[1]


class Conv1D(metaclass=_Conv1DFamily):
    """The Linear of GPT and GPT-2 (``transformers.pytorch_utils.Conv1D`` and copies of it), which stores ``[in, out]``.

    Recognized by its class's name and its ``nf``, so that nothing is imported.
    """


class _ExpertsFamily(_Family):
    def holds(cls, layer: nn.Module) -> bool:
        return bool(expert_weights(layer))


class Experts(metaclass=_ExpertsFamily):
    """Experts of a mixture, stored as 3-d parameters with an expert's matrix at each index of dimension 0."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLVING = (*CONVOLUTIONS, *TRANSPOSED)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, NormBase)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LINEARS = (nn.Linear, Conv1D)
INPUTS_FIRST = (*TRANSPOSED, *EMBEDDINGS, Conv1D)
"""Layers whose weight has its inputs in dimension 0 and its outputs in dimension 1."""

COMPILED_CHILD = "_orig_mod"
"""Name of the module inside torch.compile's wrapper, and so a part of every name below it."""


def expert_weights(layer: nn.Module) -> dict[str, bool]:
    """Return the expert matrices that a layer holds as 3-d parameters -> whether they are stored ``[in, out]``.

    A layer of another kind has none. Neither has one whose order is unknown: it follows from ``is_transposed``, which
    transformers sets, or from a size that is in the shape once (``input_size`` of the layer; ``hidden_size`` or
    ``hidden_dim`` of the model, the number of outputs of a parameter named ``down...`` and of inputs of others).
    """
    number = getattr(layer, "num_experts", None)
    weights = {name: p for name, p in layer._parameters.items() if p is not None and p.ndim == 3}
    if type(number) is not int or any(weight.shape[0] != number for weight in weights.values()):
        return {}
    told = getattr(layer, "is_transposed", None)
    orders = (
        {told} if isinstance(told, bool) else {_order(layer, name, p.shape) for name, p in weights.items()} - {None}
    )
    return dict.fromkeys(weights, orders == {True}) if len(orders) == 1 else {}


def _order(layer: nn.Module, name: str, shape: torch.Size) -> bool | None:
    """Return whether a shape ``[experts, ...]`` has its inputs first, None where sizes do not tell."""
    hidden = next((getattr(layer, key) for key in ("hidden_size", "hidden_dim") if hasattr(layer, key)), None)
    inputs = getattr(layer, "input_size", None)
    size = hidden if inputs is None else inputs
    if size not in shape[1:] or shape[1] == shape[2]:
        return None
    return bool((shape[1] == size) != (inputs is None and name.startswith("down")))


def stores_inputs_first(layer: nn.Module, name: str) -> bool:
    """Whether a layer stores the matrix (or matrices, of experts) of a weight as ``[in, out]``."""
    if name == "weight" and isinstance(layer, Conv1D):
        return True
    return expert_weights(layer).get(name, False)


def matrices_of(layer: nn.Module, name: str, tensor: Tensor) -> list[Tensor]:
    """Return views ``[out, in, ...]`` of a tensor that has a weight's shape: of experts one each, else one.

    Args:
        layer: The layer that holds the weight.
        name: The weight's name in the layer.
        tensor: The weight, or what belongs to it entry by entry (scores, a mask, a gradient).

    Examples:
        >>> [tuple(matrix.shape) for matrix in matrices_of(nn.Linear(2, 3), "weight", torch.zeros(3, 2))]
        [(3, 2)]
    """
    experts = expert_weights(layer)
    if name in experts:
        return [matrix.t() if experts[name] else matrix for matrix in tensor.unbind()]
    return [tensor.t() if name == "weight" and isinstance(layer, Conv1D) else tensor]


def copy_module(
    module: nn.Module, *, rounded: bool = True, compiled: bool = False, share_weights: bool = False
) -> nn.Module:
    """Return a deep copy in eval mode that can be called and traced independently of the original.

    Lightning, DDP and torch.compile replace ``forward`` and the steps on the instance by functions that stay bound to
    the original in a copy. These replacements are dropped.

    Args:
        module: The module to copy.
        rounded: Whether quantized layers round as they do in ``module``; otherwise the copy computes in float.
        compiled: Whether parts wrapped by ``torch.compile(part)`` stay compiled; otherwise they run eagerly.
        share_weights: Whether the copy's parameters are other parameters on the same memory, for a caller that does
            not change their values; buffers are copied always.
    """
    memo = _shared_values(module)
    if share_weights:
        for parameter in module.parameters():
            if type(parameter) is nn.Parameter and not is_lazy(parameter):
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    duplicate = copy.deepcopy(module, memo)
    for layer in duplicate.modules():
        original = layer._modules.get(COMPILED_CHILD)
        if original is None or not compiled:
            for patched in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
                if not isinstance(layer.__dict__.get(patched), MethodType):  # deepcopy binds a method to the copy
                    layer.__dict__.pop(patched, None)
        if original is not None and not compiled:
            layer.__dict__["forward"] = original
        # Left by `module.compile()`: nn.Module drops it when it is copied, LightningModule.__getstate__ does not.
        layer.__dict__.pop("_compiled_call_impl", None)
    for layer in duplicate.modules():
        if not rounded and hasattr(layer, "quantization_phase"):  # recognized by its mark: no import from above
            vars(layer).update(quantization_phase="off", output_phase="off")
    return duplicate.eval()


def _shared_values(module: nn.Module) -> dict[int, Any]:
    """Return a memo for deepcopy that shares what cannot be copied and detaches tensors of a graph.

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


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Run modules in eval mode and without gradients, then restore the mode of every layer.

    Layer by layer, because ``module.train()`` would also switch layers that were frozen in eval mode. ``no_grad``
    rather than ``inference_mode``: a module that caches a tensor in its forward would fail at the next training step.
    """
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Turn off PyTorch's fused inference path of attention, which bypasses the layers inside (and their hooks)."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def is_compiled(module: nn.Module, *, parts: bool = True) -> bool:
    """Whether torch.compile compiled a LightningModule, or a part of any module.

    Args:
        module: The module. Lightning unwraps a compiled LightningModule and leaves ``_compiler_ctx`` on it.
        parts: Whether compiled parts count.
    """
    inside = parts and any(is_inside_compiled(name) for name, _ in module.named_modules())
    return inside or getattr(module, "_compiler_ctx", None) is not None


def is_inside_compiled(name: str) -> bool:
    """Whether a dotted name of a layer or parameter leads through torch.compile's wrapper."""
    return COMPILED_CHILD in name.split(".")


def without_compiler(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's wrapper; any other module itself."""
    original = module._modules.get(COMPILED_CHILD)
    return module if original is None else original
