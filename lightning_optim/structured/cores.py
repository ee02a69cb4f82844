"""Attention in a trace: which projections an attention reads, and which layer takes what comes out of it.

torch-pruning follows channels through an attention step by step, and gets lost where heads are repeated, rotated or
flattened. Here everything between the projections and the output layer is one step of the graph that no channel passes;
:mod:`lightning_optim.structured.attention` says what leaves with what.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.structured.groups import is_linear, is_root

__all__ = ["Core", "CoreFinder", "CoreNode", "Step"]

_REARRANGED = re.compile(r"view|reshape|transpose|permute|clone|copy|squeeze|alias|^t?backward")
_MOST_NODES = 3000
"""Of autograd's graph inside one attention; T5's take 40, DeBERTa's about 300."""


@dataclass(frozen=True)
class Core:
    """One attention.

    Attributes:
        writer: Name of the layer that takes what comes out.
        sources: Names of the layers that it reads, in the order of their calls: Linear layers, and tables of biases.
        parameters: Names of parameters that are read directly, such as a table of biases.
    """

    writer: str
    sources: tuple[str, ...]
    parameters: tuple[str, ...] = ()


class CoreNode(nn.Module):
    """An attention as a node of torch-pruning's graph."""


class Step(torch.autograd.Function):
    """One step of autograd's graph, from whatever it should lead to, with given values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *sources: Tensor) -> Tensor:
        """Return the values."""
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        """Fail: a trace computes no gradients."""
        raise NotImplementedError


class CoreFinder:
    """Finds attention while a model runs, and cuts it out of autograd's graph.

    Args:
        module: The model; its layers are watched inside :meth:`following`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cores: dict[str, Core] = {}
        self.nodes: dict[Any, nn.Module] = {}
        self._names = {layer: name for name, layer in module.named_modules()}
        self._parameters = {parameter: name for name, parameter in module.named_parameters()}
        self._outputs: dict[Any, tuple[str, Tensor]] = {}
        self._order: dict[str, int] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Watch the calls of all layers that may belong to an attention."""
        handles = []
        for layer, name in self._names.items():
            if is_root(layer):
                handles.append(layer.register_forward_hook(lambda _, __, output, name=name: self._note(name, output)))
            if is_linear(layer):
                handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self._cut(name, args)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def _note(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            self._outputs[output.grad_fn] = name, output
            self._order.setdefault(name, len(self._order))

    def _cut(self, writer: str, args: tuple[Any, ...]) -> Any:
        """Give a layer that takes what comes out of an attention an input that leads to the projections at once."""
        if not args or not isinstance(args[0], Tensor) or args[0].grad_fn is None:
            return None
        product = _product(args[0].grad_fn)
        found = None if product is None else self._behind(product)
        if found is None:
            return None
        outputs, parameters = found
        sources = sorted({name for name, _ in outputs}, key=self._order.__getitem__)
        core = Core(writer, tuple(sources), tuple(sorted(self._parameters[p] for p in parameters)))
        if not self._counts_heads(core):
            return None
        self.cores.setdefault(writer, core)
        step: Tensor = Step.apply(args[0].detach(), *(output for _, output in outputs))  # type: ignore[no-untyped-call]
        self.nodes[step.grad_fn] = CoreNode()
        return (step, *args[1:])

    def _behind(self, product: Any) -> tuple[list[tuple[str, Tensor]], set[nn.Parameter]] | None:
        """Return the layers' outputs and the parameters that an attention reads; None if it is none."""
        outputs: list[tuple[str, Tensor]] = []
        parameters: set[nn.Parameter] = set()
        waiting, seen, softmax = [product], set(), False
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if len(seen) > _MOST_NODES:
                return None
            if node in self._outputs:
                outputs.append(self._outputs[node])
                continue
            name = node.name().lower()
            softmax = softmax or "softmax" in name or "scaleddotproduct" in name.replace("_", "")
            if hasattr(node, "variable") and node.variable in self._parameters:
                parameters.add(node.variable)
            waiting += [before for before, _ in node.next_functions]
        linear = any(is_linear(self.module.get_submodule(name)) for name, _ in outputs)
        return (outputs, parameters) if softmax and linear else None

    def _counts_heads(self, core: Core) -> bool:
        from lightning_optim.structured.attention import counts_heads

        return counts_heads(self.module, core)


def _product(node: Any) -> Any:
    """Return the product of weights and values whose rearranged result a layer takes, None if it takes another."""
    while node is not None:
        name = node.name().lower().replace("_", "")
        if name.startswith(("bmm", "scaleddotproduct")):
            return node
        if _REARRANGED.search(name) is None:
            return None
        node = next((before for before, _ in node.next_functions), None)
    return None
