"""Post-training quantization: ranges from a few batches, no training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import nn

from lightning_optim.calls import batch_calls, batch_count, try_batch
from lightning_optim.checkpoint import conform, plain_plan
from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.quantization.coverage import coverage_table
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.outputs import find_ranges
from lightning_optim.quantization.prepare import (
    QuantizationScheme,
    drop_outputs,
    prepare,
    quantized_layers,
    select_layers,
    set_phase,
)
from lightning_optim.quantization.ranges import fold_ranges, observing, settle_ranges
from lightning_optim.target import ForwardInputs, Pattern, find_target

__all__ = ["quantize_post_training"]

M = TypeVar("M", bound=nn.Module)


def quantize_post_training(
    model: M,
    dataloader: Iterable[Any] | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    weight_granularity: str = "per_channel",
    observer: str = "moving_average",
    bits: Mapping[Pattern, int] | None = None,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
    progress_bar: bool = True,
) -> M:
    """Quantize a trained model: its ranges come from a few batches, nothing is trained.

    Weights alone (``activation_bits=None``) need no data: the tables of a recommender in one line,
    ``quantize_post_training(model, activation_bits=None, include=[nn.EmbeddingBag])``.

    Args:
        model: A LightningModule or any module. It is changed in place: the classes of its layers are replaced, and it
            computes with rounded numbers from then on; its mode is kept.
        dataloader: Batches for its forward: a tensor, a dict of keyword arguments, or a tuple, of which forward gets as
            many leading items as it requires.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, or None: inputs stay float.
        weight_granularity: What shares a scale: "per_channel", "per_tensor", "per_group:32".
        observer: "moving_average", "min_max" or "histogram"; with few batches the first is the mean of their extremes.
        bits: Weight bits by pattern; the first match counts.
        module: Dotted name of the part to quantize; default the whole model.
        include: Exactly the layers to quantize: names, glob patterns, layer classes.
        exclude: Layers that stay float.
        inputs: Returns the arguments of forward for a batch, if the rule above does not fit.
        batches: Number of batches to use; default all.
        progress_bar: Whether calibration shows a progress bar.

    Returns:
        The same module, for :func:`lightning_optim.export_onnx`. A checkpoint of a LightningModule written from now on
        loads with :func:`lightning_optim.load_from_checkpoint`.

    Raises:
        ValueError: If nothing is selected, activations are quantized without data, or forward fails with the arguments
            taken from a batch.
        RuntimeError: If a selected layer is never called, or activations are not finite. The model is then unchanged.
    """
    scheme = QuantizationScheme(weight_bits, activation_bits, weight_granularity, observer, dict(bits or {}))
    prefix, target = find_target(model, module)
    selection = select_layers(target, prefix, include=include, exclude=exclude, root=model)
    scheme.check_patterns(selection.chosen, prefix)
    before = plain_plan(model)
    ranges = {name: buffer.clone() for name, buffer in _range_buffers(model).items()}
    try:
        if activation_bits is None:
            drop_outputs(model, selection.chosen)
        prepare(model, selection.chosen, scheme, prefix)
        layers = {name: layer for name, layer in quantized_layers(target, prefix).items() if name in selection.chosen}
        if any(layer.watched for layer in layers.values()):
            calls = _calls(model, dataloader, inputs, batches)
            first = next(calls, None)
            if first is None:
                raise ValueError("the dataloader has no batch to take ranges from.")
            with evaluating(model), without_fast_path():
                try_batch(model, first, inputs)
            facts = _graph_facts(model, first, layers)
            prepare(model, (), scheme, prefix, facts)
            ours = {*layers, *facts.outputs, *facts.functions}
            layers = {name: layer for name, layer in quantized_layers(model).items() if name in ours}
            _calibrate(model, chain([first], calls), layers, total=batch_count(dataloader, batches), shown=progress_bar)
        set_phase(model, layers, "frozen")
    except BaseException:
        conform(model, before)
        for name, buffer in _range_buffers(model).items():
            buffer.copy_(ranges[name])
        raise
    rank_zero_info(coverage_table("post-training quantization", layers, selection.left_out))
    return model


def _range_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the ranges of all quantized layers."""
    return {
        f"{name}.{which}_{part}": buffer
        for name, layer in quantized_layers(model).items()
        for which in layer.watched
        for part, buffer in layer.state_of(which).items()
    }


def _graph_facts(model: nn.Module, inputs: ForwardInputs, layers: Mapping[str, QuantizedLayer]) -> GraphFacts:
    try:
        return find_ranges(model, inputs, layers)
    except ValueError as error:
        rank_zero_warn(
            "no output of a convolution gets a range, so those before an addition stay float in the exported file: "
            f"{error}"
        )
        return GraphFacts()


def _calls(
    model: nn.Module, dataloader: Iterable[Any] | None, inputs: Callable[[Any], Any] | None, batches: int | None
) -> Iterator[ForwardInputs]:
    if dataloader is None:
        raise ValueError(
            "ranges of activations need data: pass a dataloader, or activation_bits=None to quantize weights only."
        )
    return batch_calls(model, dataloader, inputs, batches)


def _calibrate(
    model: nn.Module,
    calls: Iterable[ForwardInputs],
    layers: Mapping[str, QuantizedLayer],
    *,
    total: int | None,
    shown: bool,
) -> None:
    """Run the batches through the model in eval mode and settle the ranges."""
    set_phase(model, layers, "observe")
    for layer in layers.values():  # only these batches count
        for which in layer.watched:
            layer.state_of(which)["statistic"].zero_()
            layer.state_of(which)["batches"].zero_()
    with evaluating(model), without_fast_path(), observing(layers):
        for received in track(calls, "calibrating", total, disable=not shown):
            received.call(model)
            fold_ranges(layers)
    settle_ranges(layers)
