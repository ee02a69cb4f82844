"""Outputs that need a range of their own: those of convolutions read by anything but a quantized layer."""

from collections.abc import Mapping

from torch import nn

from lightning_optim.modules import CONVOLUTIONS
from lightning_optim.quantization.graph import read_graph
from lightning_optim.quantization.layers import QUANTIZED, QuantizedLayer
from lightning_optim.sharding import own_class
from lightning_optim.target import ForwardInputs

__all__ = ["find_outputs", "has_convolutions"]


def has_convolutions(layers: Mapping[str, QuantizedLayer]) -> bool:
    """Whether outputs can matter: engines run an integer convolution only if its output is quantized."""
    return any(isinstance(layer, CONVOLUTIONS) and layer.activation_bits is not None for layer in layers.values())


def find_outputs(
    called: nn.Module, inputs: ForwardInputs, layers: Mapping[str, QuantizedLayer], called_name: str = ""
) -> dict[str, bool]:
    """Return the layers whose output needs a range -> whether a ReLU follows, read from the exported graph.

    Args:
        called: The module whose forward takes ``inputs``.
        inputs: Arguments of its forward.
        layers: The quantized layers, by their names in the whole model.
        called_name: Dotted name of ``called`` in the whole model.

    Raises:
        ValueError: If the graph cannot be read, or a BatchNorm between is of a class that cannot hold a range.
    """
    if not has_convolutions(layers):
        return {}
    dot = f"{called_name}." if called_name else ""
    inside = {name.removeprefix(dot): layer for name, layer in layers.items() if name.startswith(dot)}
    readers = {name for name, layer in inside.items() if "input" in layer.watched}
    convolutions = {name for name in readers if isinstance(inside[name], CONVOLUTIONS)}
    outputs = read_graph(called, inputs, convolutions, readers).outputs
    for name in outputs:
        layer = called.get_submodule(name)
        if not isinstance(layer, QuantizedLayer) and own_class(layer) not in QUANTIZED:
            raise ValueError(
                f"the output of {dot}{name} needs a range, and a {type(layer).__name__} cannot hold one (with "
                "sync_batchnorm=True, for example). Exclude the convolution before it, or use another norm."
            )
    return {dot + name: relu for name, relu in outputs.items()}
