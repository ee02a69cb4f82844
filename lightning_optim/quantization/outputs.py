"""Ranges beside those of inputs: outputs of convolutions, and operands of additions, products and activations."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_optim.modules import CONVOLVING
from lightning_optim.quantization.classes import QUANTIZED
from lightning_optim.quantization.graph import GraphFacts, read_graph
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.sharding import own_class
from lightning_optim.target import ForwardInputs

__all__ = ["find_ranges", "has_convolutions"]


def has_convolutions(layers: Mapping[str, QuantizedLayer]) -> bool:
    """Whether outputs can matter: engines run an integer convolution only if its output is quantized."""
    return any(isinstance(layer, CONVOLVING) and layer.activation_bits is not None for layer in layers.values())


def find_ranges(
    called: nn.Module, inputs: ForwardInputs, layers: Mapping[str, QuantizedLayer], called_name: str = ""
) -> GraphFacts:
    """Return the outputs and functions that need ranges, read from the exported graph, by names in the whole model.

    Args:
        called: The module whose forward takes ``inputs``.
        inputs: Arguments of its forward.
        layers: The quantized layers, by their names in the whole model.
        called_name: Dotted name of ``called`` in the whole model.

    Raises:
        ValueError: If the graph cannot be read, or a BatchNorm between is of a class that cannot hold a range.
    """
    if not has_convolutions(layers):
        return GraphFacts()
    dot = f"{called_name}." if called_name else ""
    inside = {name.removeprefix(dot): layer for name, layer in layers.items() if name.startswith(dot)}
    readers = {name for name, layer in inside.items() if layer.rounds_operands}
    products = {name for name in readers if isinstance(inside[name], (*CONVOLVING, nn.Linear))}
    facts = read_graph(called, inputs, products, readers)
    for name in facts.outputs:
        layer = called.get_submodule(name)
        if not isinstance(layer, QuantizedLayer) and own_class(layer) not in QUANTIZED:
            raise ValueError(
                f"the output of {dot}{name} needs a range, and a {type(layer).__name__} cannot hold one (with "
                "sync_batchnorm=True, for example). Exclude the convolution before it, or use another norm."
            )
    return replace(
        facts,
        batch_norms={dot + name: dot + norm for name, norm in facts.batch_norms.items()},
        outputs={dot + name: relu for name, relu in facts.outputs.items()},
        functions={f"{dot}{name}".rstrip("."): functions for name, functions in facts.functions.items()},
        function_calls={f"{dot}{name}".rstrip("."): calls for name, calls in facts.function_calls.items()},
        returned=frozenset(dot + name for name in facts.returned),
    )
