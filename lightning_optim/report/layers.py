"""What of each layer is left: its width, its zeros, the bits of its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.sharding import full, own_class
from lightning_optim.tables import by_stack
from lightning_optim.target import named_layers

__all__ = ["against_reference", "layer_facts", "layer_rows"]

WIDTHS = ("out_features", "out_channels", "embedding_dim", "hidden_size", "embed_dim", "nf")
"""Where layers say how many channels they give, in the order in which they are asked."""


def layer_facts(module: nn.Module) -> list[dict[str, Any]]:
    """Return one dict per layer that holds matrices or kernels; norms and biases are left out.

    Of a model that is divided among processes, every process must ask. A tensor that several layers share counts once,
    under its first name; a layer that holds no other has no dict.

    Args:
        module: Any module.

    Returns:
        ``layer`` (its dotted name), ``type``, ``parameters``, ``sparsity`` (fraction of them that is zero), ``bits``
        (mean over them, as they are deployed), ``width`` (output channels, None where the layer does not say).

    Examples:
        >>> layer_facts(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))[0]["width"]
        2
    """
    facts = []
    counted: set[nn.Parameter] = set()
    for name, layer in named_layers(module):
        held = {leaf: weight for leaf, weight in layer.named_parameters(recurse=False) if weight.ndim > 1}
        weights = {leaf: weight for leaf, weight in held.items() if weight not in counted}
        counted.update(held.values())
        if weights:
            facts.append({"layer": name, "type": _type(layer), **_of_weights(layer, weights), "width": _width(layer)})
    return facts


def _of_weights(layer: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, Any]:
    count = sum(weight.numel() for weight in weights.values())
    nonzero = sum(int(torch.count_nonzero(full(weight.detach()))) for weight in weights.values())
    bits = sum(weight.numel() * _bits(layer, leaf, weight) for leaf, weight in weights.items())
    return {"parameters": count, "sparsity": 1 - nonzero / max(count, 1), "bits": bits / max(count, 1)}


def _bits(layer: nn.Module, leaf: str, weight: Tensor) -> float:
    told = getattr(layer, "parameter_bits", lambda name: None)(leaf)
    return float(weight.element_size() * 8 if told is None else told)


def _type(layer: nn.Module) -> str:
    own = own_class(layer)
    return str(getattr(own, "float_class", own).__name__).removeprefix("Quantized")


def _width(layer: nn.Module) -> int | None:
    return next((int(getattr(layer, name)) for name in WIDTHS if isinstance(getattr(layer, name, None), int)), None)


def against_reference(layers: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``kept`` to each layer: its width as a fraction of the reference's layer of that name, None without one."""
    widths = {facts["layer"]: facts["width"] for facts in reference}
    return [{**facts, "kept": _kept(facts["width"], widths.get(facts["layer"]))} for facts in layers]


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table of layers: equal ones of a stack are one row, with the facts of each of them."""
    rounded = [{key: round(x, 4) if isinstance(x, float) else x for key, x in facts.items()} for facts in layers]
    if not rounded:
        return []
    keys = ["layer", *(key for key in rounded[0] if key != "layer")]
    return [dict(zip(keys, row, strict=True)) for row in by_stack([facts[key] for key in keys] for facts in rounded)]


def _kept(width: int | None, before: int | None) -> float | None:
    return None if width is None or not before else width / before
