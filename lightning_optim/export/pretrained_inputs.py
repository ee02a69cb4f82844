"""Random inputs for a Hugging Face model, of the sizes that its configuration and its tables have."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.configs import config_failures
from lightning_optim.target import ForwardInputs

__all__ = ["synthetic_inputs"]

ROWS, LENGTH, SAMPLES = 2, 24, 4000


def synthetic_inputs(model: nn.Module) -> ForwardInputs:
    """Return random inputs that a model's forward takes, seeded.

    Args:
        model: A model with a configuration of its own, in eval mode on the CPU.

    Raises:
        ValueError: If it takes none of those that are tried.
    """
    torch.manual_seed(0)
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = _tokens(model, config)
    if "pixel_values" in takes:
        inputs["pixel_values"] = _pixels(model, config)
    if "input_features" in takes:
        length = 2 * int(_first(config, "max_source_positions") or 500)
        bins = int(_first(config, "num_mel_bins", "feature_size") or 80)
        inputs["input_features"] = torch.randn(ROWS, bins, length)
    if "input_values" in takes and not inputs:
        inputs["input_values"] = torch.randn(ROWS, SAMPLES)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(model, config)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    reason = "it takes neither input_ids nor pixel_values, input_features or input_values"
    for tried in (inputs, {name: value[:1] for name, value in inputs.items()}, _main_only(model, inputs)):
        call = ForwardInputs((), dict(tried))
        try:
            if tried:
                call.call(model)
                return call
        except config_failures() as error:
            reason = str(error)
    raise ValueError(
        f"no inputs are known with which {type(model).__name__} can be called ({reason}). Pass `example_inputs`: what "
        "its forward receives, as a dict of keyword arguments."
    )


def _main_only(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    main = getattr(model, "main_input_name", "input_ids")
    return {name: value for name, value in inputs.items() if name in (main, "decoder_input_ids")}


def _first(config: Any, *names: str) -> Any:
    """Return the first of some numbers that a configuration or one inside it has."""
    holders = [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
    found = (getattr(holder, name, None) for name in names for holder in holders)
    return next((value for value in found if value is not None), None)


def _tokens(model: nn.Module, config: Any) -> Tensor:
    """Return random tokens; the last of each row is the one that ends a text, which some classifiers look for."""
    rows = int(_first(config, "vocab_size") or 2)
    positions = _first(config, "max_position_embeddings", "max_target_positions", "n_positions")
    length = min(LENGTH, int(positions or LENGTH) // 2 or 1)
    ids = torch.randint(0, rows, (ROWS, length))
    special = [value for key, value in vars(config).items() if key.endswith("_token_id") and type(value) is int]
    ordinary = [token for token in range(min(rows, 64 + len(special))) if token not in special]
    for token in special:
        ids = torch.where(ids == token, ordinary[0] if ordinary else token, ids)
    end = _first(config, "eos_token_id")
    if type(end) is int and end < rows:
        ids[:, -1] = end
    return ids


def _pixels(model: nn.Module, config: Any) -> Tensor:
    size = _first(config, "image_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(ROWS, int(_first(config, "num_channels", "in_channels") or 3), height, width)
