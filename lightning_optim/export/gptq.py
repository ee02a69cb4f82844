"""Quantized layers of a model in the GPTQ layout: which have a place in it, their tensors, and its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_optim._version import __version__
from lightning_optim.export.integer import rounds
from lightning_optim.functional.fake_quantize import grouped, parse_weight_granularity, weight_scale
from lightning_optim.functional.gptq import BITS, gptq_misfit, pack_gptq, unpack_gptq
from lightning_optim.quantization.layers import QuantizedLinear
from lightning_optim.tables import by_reason

__all__ = ["GPTQ", "gptq_config", "head_of", "packed_layers", "unpacked_state"]


@dataclass(frozen=True)
class GPTQ:
    """One packed layer.

    Attributes:
        tensors: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
        group_size: Inputs that share a scale.
    """

    tensors: dict[str, Tensor]
    group_size: int


def packed_layers(model: nn.Module) -> dict[str, GPTQ]:
    """Pack the Linear layers of all blocks, and give them the values that a reader computes.

    Readers of the layout take every Linear layer of the blocks for packed, all with one group size. Of the layers
    outside of blocks only the head has a place in it, and it is packed if it is quantized in the same form. A head that
    shares its weight with the table gets a weight of its own: readers have no packed table.

    Args:
        model: A copy; the weights of its packed layers become those that a reader computes, whose scales are float16.

    Returns:
        Layers by name.

    Raises:
        ValueError: If a layer has no place in the layout, or none is quantized; the message names the layers.
    """
    refused: dict[str, str] = {}
    packed: dict[str, GPTQ] = {}
    sizes: dict[int, str] = {}
    for name, layer in model.named_modules():
        if not any(part.isdecimal() for part in name.split(".")) or not _is_matrix(layer):
            continue
        reason, size = _misfit(layer)
        if reason is None and sizes.setdefault(size, name) != next(iter(sizes.values())):
            reason = f"its groups have {size} inputs, those of {next(iter(sizes.values()))} {next(iter(sizes))}"
        if reason is not None:
            refused[name] = reason
            continue
        packed[name] = GPTQ(_tensors(cast("QuantizedLinear", layer)), size)
    if refused or not packed:
        rows = "; ".join(f"{names}: {reason}" for names, reason in by_reason(refused)) or "no block has a Linear layer"
        raise ValueError(
            f"the GPTQ layout holds every Linear layer of the blocks in {BITS} bits with one group size, and layers "
            f"have no place in it. {rows}. Quantize all of them with weight_bits={BITS} and "
            "weight_granularity='per_group:32' (64, 128), or export with quantization=None."
        )
    head = head_of(model)
    if head is not None and _misfit(model.get_submodule(head)) == (None, next(iter(sizes))):
        packed[head] = GPTQ(_tensors(cast("QuantizedLinear", model.get_submodule(head))), next(iter(sizes)))
    for name, held in packed.items():
        layer = cast("QuantizedLinear", model.get_submodule(name))
        layer.quantization_phase = "off"
        weight = unpack_gptq(held.tensors).to(layer._parameters["weight"].dtype)  # type: ignore[union-attr]
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return packed


def head_of(model: nn.Module) -> str | None:
    """Return the name of the layer that gives a language model's logits, None where the model names none.

    Only where ``tie_word_embeddings`` of the model's own configuration says whether it shares the table's weight.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None or not hasattr(getattr(model, "config", None), "tie_word_embeddings"):
        return None
    return next((name for name, layer in model.named_modules() if layer is head), None)


def _is_matrix(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.ndim > 1 and not isinstance(layer, nn.Embedding)


def _misfit(layer: nn.Module) -> tuple[str | None, int]:
    """Return why a layer has no place in the layout, and its group size."""
    if not rounds(layer):
        return f"{type(layer).__name__} is not quantized", 0
    if not isinstance(layer, QuantizedLinear):
        return f"{type(layer).__name__} is no Linear layer", 0
    if layer.weight_bits is None or layer.weight_bits > BITS:
        return f"its weights have {layer.weight_bits} bits", 0
    kind, size = parse_weight_granularity(layer.weight_granularity)
    if kind != "per_group":
        return f"its scales are {kind}", 0
    return gptq_misfit(layer._parameters["weight"].shape, size), size  # type: ignore[union-attr]


def _tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Return the integers that the layer computes with, packed, with their scales."""
    weight: Any = layer._parameters["weight"]
    scales = weight_scale(weight, layer.weight_bits or BITS, layer.weight_granularity)
    rounded = grouped(layer.quantized_weight().detach().float(), layer.weight_granularity)
    integers = torch.div(rounded, scales).round().flatten(1)
    return pack_gptq(integers[:, : weight.shape[1]], scales.flatten(1))


def gptq_config(packed: Mapping[str, GPTQ], *, head: bool) -> dict[str, Any]:
    """Return the ``quantization_config`` of packed layers, as ``config.json`` holds it.

    Args:
        packed: The layers.
        head: Whether the layer that gives the logits is among them.
    """
    return {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": next(iter(packed.values())).group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": head,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"lightning_optim:{__version__}"]},
    }


def unpacked_state(folder: Path) -> dict[str, Tensor]:
    """Read a folder's weights, packed ones as the float matrices that a reader computes."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    dtype = next(
        (value.dtype for key, value in state.items() if value.is_floating_point() and "scales" not in key), None
    )
    for name in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        tensors = {key: state.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
        state[f"{name}.weight"] = unpack_gptq(tensors).to(dtype)
    return state
