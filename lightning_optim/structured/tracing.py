"""One traced forward pass: torch-pruning's graph of a model, its attention, and where its parameters are used."""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim._upstream import tree_flatten, tree_unflatten
from lightning_optim.modules import RECURRENT, without_fast_path
from lightning_optim.structured.cores import Core, CoreFinder, CoreNode
from lightning_optim.structured.experts import cut_experts
from lightning_optim.structured.reach import called_layers, differentiable
from lightning_optim.structured.splits import SplitTracer, map_parts
from lightning_optim.target import ForwardInputs, named_layers

__all__ = ["Trace", "Untraceable", "trace", "without_cache"]


class Untraceable(ValueError):
    """No output leads to a layer."""


@dataclass
class Trace:
    """What one forward pass tells.

    Attributes:
        graph: torch-pruning's.
        outputs: The outputs that it starts from.
        called: Names of the layers that were called.
        cores: Attention by the name of its output layer.
        inside: The modules that ran whenever a layer was called, or a parameter was used, outermost first; by name.
    """

    graph: Any
    outputs: list[Tensor] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    cores: dict[str, Core] = field(default_factory=dict)
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def around(self, used: Iterable[str]) -> list[str]:
        """Return the modules that run whenever one of some layers or parameters is used, outermost first."""
        common: list[str] | None = None
        for name in used:
            if name in self.inside:
                common = [running for running in self.inside[name] if common is None or running in common]
        return common or [""]


def trace(module: nn.Module, inputs: ForwardInputs, *, cores: bool = True) -> Trace:
    """Run a copy of a model and trace it.

    Args:
        module: A copy of the model, with parameters that require gradients.
        inputs: What its forward receives.
        cores: Whether attention is cut out of the graph.

    Raises:
        Untraceable: If no output leads to a layer.
    """
    from lightning_optim.structured.pruners import own_pruners  # imports torch-pruning

    tracer = SplitTracer()
    finder = CoreFinder(module if cores else nn.Identity())
    graph = tracer.graph(finder.nodes)
    found = Trace(graph)

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        with (
            called_layers(model) as names,
            tracer.following(model),
            finder.following(),
            cut_experts(model, finder.nodes),
            without_cache(model),
            tracer,
        ):
            returned = inputs.call_each(model)
        found.called.update(names)
        try:
            found.outputs = differentiable(model, returned)
        except ValueError as error:
            raise Untraceable(str(error)) from None
        # torch-pruning takes dimension 1 as the channels
        return [leaf if leaf.ndim > 1 else leaf.reshape(-1, 1) for leaf in found.outputs]

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
    _cut_cores(graph)
    found.cores, found.inside = finder.cores, tracer.inside
    return found


def _cut_cores(graph: Any) -> None:
    """Let no channel pass through an attention."""
    for node in graph.module2node.values():
        if isinstance(node.module, CoreNode):
            node.dependencies = []
        else:
            node.dependencies = [d for d in node.dependencies if not isinstance(d.target.module, CoreNode)]


def _treats_channels_alike(layer: nn.Module) -> bool:
    """Tell whether a layer with parameters does the same to every channel, so that it loses none."""
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


@contextmanager
def without_cache(module: nn.Module):  # type: ignore[no-untyped-def]
    """Let a Hugging Face model return no keys and values: they are no outputs whose shape must stay."""
    held = [vars(layer).get("config") for layer in module.modules()]
    caching: list[Any] = list({id(each): each for each in held if getattr(each, "use_cache", None) is True}.values())
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


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
