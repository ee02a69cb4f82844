"""What every technique needs of a module: families of layers, a copy to call, and modes that are restored."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from lightning_optim._upstream import NormBase
from lightning_optim.outputs import output_tensors

__all__ = [
    "COMPILED_CHILD",
    "CONVOLUTIONS",
    "EMBEDDINGS",
    "INPUTS_FIRST",
    "NORMS",
    "RECURRENT",
    "TRANSPOSED",
    "copy_module",
    "evaluating",
    "is_compiled",
    "is_inside_compiled",
    "without_compiler",
    "without_fast_path",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, NormBase)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
INPUTS_FIRST = (*TRANSPOSED, *EMBEDDINGS)
"""Layers whose weight has its inputs in dimension 0 and its outputs in dimension 1."""

COMPILED_CHILD = "_orig_mod"
"""Name of the module inside torch.compile's wrapper, and so a part of every name below it."""


def copy_module(module: nn.Module, *, rounded: bool = True, compiled: bool = False) -> nn.Module:
    """Return a deep copy in eval mode that can be called and traced independently of the original.

    Lightning, DDP and torch.compile replace ``forward`` and the steps on the instance by functions that stay bound to
    the original in a copy. These replacements are dropped.

    Args:
        module: The module to copy.
        rounded: Whether quantized layers round as they do in ``module``; otherwise the copy computes in float.
        compiled: Whether parts wrapped by ``torch.compile(part)`` stay compiled; otherwise they run eagerly.
    """
    duplicate = copy.deepcopy(module, _shared_values(module))
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
