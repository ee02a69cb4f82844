"""The table of what is quantized and how, and what stays float and why."""

from collections.abc import Mapping

from lightning_optim.quantization.functions import QuantizedFunctions
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.learned import learns
from lightning_optim.sharding import own_class
from lightning_optim.tables import by_reason, by_stack, render

__all__ = ["coverage_table", "words_of"]


def coverage_table(title: str, layers: Mapping[str, QuantizedLayer], left_out: Mapping[str, str]) -> str:
    """Return the table: a row per quantized layer or run of equal blocks, and the other layers by reason.

    Args:
        title: Title of the table.
        layers: Quantized layers by name.
        left_out: Layers that stay float -> why.
    """
    rows = by_stack((name or "the whole", _class_of(layer), *words_of(layer)) for name, layer in layers.items())
    rows += [(names, "", "float", reason) for names, reason in by_reason(left_out)]
    return render(title, ("layer", "class", "weight", "input and output, or why not"), rows)


def words_of(layer: QuantizedLayer) -> tuple[str, str]:
    """Describe how a layer's weight, and its input and output, are quantized."""
    weight = "-" if layer.weight_bits is None else f"int{layer.weight_bits}, {layer.weight_granularity}"
    weight += ", learned step" if learns(layer, "weight") else ""
    learned = {which: ", learned step" if learns(layer, which) else "" for which in layer.watched}
    parts = [f"{layer.integer_type} {which}{learned[which]}" for which in layer.watched]
    if layer.activation_bits is not None and layer.activation_ranges == "dynamic":
        parts.append(f"{layer.integer_type} input, range of each call")
    if isinstance(layer, QuantizedFunctions):
        parts = [f"{layer.integer_type} operands of {', '.join(layer.functions)}"] if layer.functions else []
    return weight, ", ".join(parts) or "float"


def _class_of(layer: QuantizedLayer) -> str:
    own = own_class(layer)
    return str(getattr(own, "float_class", own).__name__).removeprefix("Quantized")
