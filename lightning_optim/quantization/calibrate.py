"""Post-training quantization: ranges from a few batches, no training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import nn

from lightning_optim.calls import batch_calls, batch_count, try_batch
from lightning_optim.checkpoint import conform, plain_plan
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.functional.rounding import Rounding
from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.quantization.auto_bits import check_effective_bits, choose_bits, note_bits
from lightning_optim.quantization.coverage import coverage_table
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.learned import FIRST, steps_of
from lightning_optim.quantization.outputs import find_ranges
from lightning_optim.quantization.prepare import (
    drop_outputs,
    prepare,
    quantized_layers,
    select_layers,
    set_phase,
)
from lightning_optim.quantization.ranges import fold_ranges, observing, settle_ranges
from lightning_optim.quantization.rounding import Settled, check_method, needs_inputs, settle_weights
from lightning_optim.quantization.scheme import QuantizationScheme
from lightning_optim.quantization.smoothing import Smoothed, smooth_inputs, undo_smoothing
from lightning_optim.tables import by_reason
from lightning_optim.target import ForwardInputs, Pattern, find_target

__all__ = ["quantize_post_training"]

M = TypeVar("M", bound=nn.Module)


def quantize_post_training(
    model: M,
    dataloader: Iterable[Any] | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    activation_ranges: str = "static",
    weight_granularity: str = "per_channel",
    observer: str = "moving_average",
    method: str | Mapping[str, Any] | Rounding = "round",
    smooth: bool | float = False,
    bits: Mapping[Pattern, int] | Literal["auto"] | None = None,
    effective_bits: float | None = None,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
    progress_bar: bool = True,
) -> M:
    """Quantize a trained model: its ranges come from a few batches, nothing is trained.

    Weights alone (``activation_bits=None``) need no data: the tables of a recommender in one line,
    ``quantize_post_training(model, activation_bits=None, include=[nn.EmbeddingBag])``. Neither does
    ``activation_ranges="dynamic"``.

    Args:
        model: A LightningModule or any module. It is changed in place: the classes of its layers are replaced, and it
            computes with rounded numbers from then on; its mode is kept.
        dataloader: Batches for its forward: a tensor, a dict of keyword arguments, or a tuple, of which forward gets as
            many leading items as it requires.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, or None: inputs stay float.
        activation_ranges: "static": one range per tensor, from the batches; "symmetric": the same with zero in the
            middle, so that there is no zero point (int8), as TensorRT needs it (``export_onnx(target="tensorrt")``);
            what is never negative has half as many steps then; "dynamic": each call's own range, for the
            inputs of Linear layers (those of convolutions stay float). For a language model add ``smooth``, or
            leave activations float.
        weight_granularity: What shares a scale: "per_channel", "per_tensor", "per_group:32".
        observer: "moving_average", "min_max", "percentile" or "histogram"; with few batches the first is the mean of
            their extremes.
        method: How weights become integers: a name in ``functional.rounding.ROUNDINGS``, ``{name: arguments}``, or a
            callable ``(weight, stats, bits, granularity) -> weight``. "round": each to the nearest. "gptq": one input
            after the other, and the weights that are not rounded yet make up for the error so far; layer by layer, each
            by what it receives from those before it, rounded. It needs data also for weights alone, goes through the
            batches several times (they are held in memory), and pays below 8 bits. Tables, experts, weights that
            several layers share and convolutions with groups are rounded to the nearest, as the log says.
        smooth: Whether scale is moved from the inputs of Linear layers into their weights first, channel by channel, so
            that a few large channels do not take the range of all (SmoothQuant, Xiao et al. 2022): by the norm or
            Linear that makes the inputs, where the model's float answers stay the same bit for bit. True is 0.5; a
            number in (0, 1) is the part that moves. The weights of the model change, its float answers do not.
        bits: Weight bits by pattern; the first match counts. "auto": each layer gets 2 to ``weight_bits`` bits so that
            the expected error of the model's outputs is least and a weight has at most ``effective_bits`` on average.
            It reads gradients of the outputs over the batches (memory: three times the weights), and needs scipy.
        effective_bits: Mean bits of a weight with ``bits="auto"``, without scales; a shared weight counts once.
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
        ValueError: If nothing is selected, data is missing (for activations, or for a ``method`` that reads inputs), or
            forward fails with the arguments taken from a batch.
        RuntimeError: If a selected layer is never called, or activations are not finite. The model is then unchanged.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = torch.randn(64, 8).split(16)
        >>> net = quantize_post_training(net, batches, progress_bar=False)  # 8 bits, weights and activations
        >>> type(net[0]).__name__
        'QuantizedLinear'
    """
    alpha = _check_smooth(smooth, activation_bits)
    _check_no_training(observer)
    by_pattern = {} if bits is None or isinstance(bits, str) else dict(bits)
    scheme = QuantizationScheme(
        weight_bits, activation_bits, weight_granularity, observer, by_pattern, activation_ranges
    )
    check_effective_bits(bits, effective_bits, weight_bits)
    rounding = check_method(method)
    prefix, target = find_target(model, module)
    selection = select_layers(target, prefix, include=include, exclude=exclude, root=model)
    scheme.check_patterns(selection.chosen, prefix)
    before = plain_plan(model)
    ranges = {name: buffer.clone() for name, buffer in _range_buffers(model).items()}
    settled, moved, chosen = Settled(), list[Smoothed](), None
    data = _Batches(model, dataloader, inputs, batches)
    try:
        if alpha is not None:
            readers = {name: model.get_submodule(name) for name in selection.chosen}
            moved += smooth_inputs(model, data.held("`smooth` reads"), readers, alpha)
        if effective_bits is not None:
            calls = data.held("bits='auto' reads")
            chosen = choose_bits(
                model, selection.chosen, calls, weight_granularity, effective_bits, weight_bits, shown=progress_bar
            )
            by_name: dict[Pattern, int] = {str(name): number for name, number in chosen.bits.items()}
            scheme = replace(scheme, bits=by_name)
        if not scheme.observes:
            drop_outputs(model, selection.chosen)
        prepare(model, selection.chosen, scheme, prefix)
        layers = {name: layer for name, layer in quantized_layers(target, prefix).items() if name in selection.chosen}
        watched = any(layer.watched for layer in layers.values())
        read = data.held("" if watched else "this `method` reads") if needs_inputs(rounding) else ()
        settle_weights(model, layers, rounding, read, settled, shown=progress_bar)
        if watched:
            first, stream = data.once()
            facts = _graph_facts(model, first, layers)
            prepare(model, (), scheme, prefix, facts)
            ours = {*layers, *facts.outputs, *facts.functions}
            layers = {name: layer for name, layer in quantized_layers(model).items() if name in ours}
            _calibrate(model, stream, layers, total=batch_count(dataloader, batches), shown=progress_bar)
        set_phase(model, layers, "frozen")
    except BaseException:
        conform(model, before)
        settled.undo(model)
        undo_smoothing(model, moved)
        for name, buffer in _range_buffers(model).items():
            buffer.copy_(ranges[name])
        raise
    if chosen is not None:
        note_bits(model, chosen)
    rank_zero_info(coverage_table("post-training quantization", layers, selection.left_out))
    for line in (chosen, settled):
        if line is not None and str(line):
            rank_zero_info(str(line))
    if alpha is not None:
        _say_moved(moved)
    return model


def _check_no_training(observer: Any) -> None:
    """Raise if an observer needs training."""
    if isinstance(observer, str) and observer in OBSERVERS and OBSERVERS[observer].learns:
        raise ValueError(
            f"observer={observer!r} trains steps with the weights, and post-training quantization trains nothing. Take "
            "QuantizationAwareTraining(observer='learned'), or 'moving_average', 'percentile' or 'histogram' here."
        )


def _check_smooth(smooth: bool | float, activation_bits: int | None) -> float | None:
    """Return how much scale moves; None: nothing."""
    if smooth is False:
        return None
    alpha = 0.5 if smooth is True else smooth
    if not isinstance(alpha, float) or not 0.0 < alpha < 1.0:
        raise ValueError(f"`smooth` must be False, True or a number between 0 and 1, got {smooth!r}.")
    if activation_bits is None:
        raise ValueError(
            "`smooth` moves the scale of activations that are rounded, and with activation_bits=None they stay float. "
            "Leave one of the two out."
        )
    return alpha


def _say_moved(moved: Sequence[Smoothed]) -> None:
    if not moved:
        rank_zero_warn(
            "smooth: nothing was moved. No norm or Linear makes the inputs of a rounded Linear so that dividing its "
            "channels leaves the answers as they are."
        )
        return
    ((makers, _),) = by_reason(dict.fromkeys((one.maker for one in moved), ""))
    readers = sum(len(one.readers) for one in moved)
    rank_zero_info(f"smooth: scale moved into the weights of {readers} layers, from what {makers} make.")


def _range_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the ranges of all quantized layers, trained steps too."""
    layers = quantized_layers(model)
    observed = {
        f"{name}.{which}_{part}": buffer
        for name, layer in layers.items()
        for which in layer.watched
        for part, buffer in layer.state_of(which).items()
    }
    trained = {name: parameter.data for name, parameter in steps_of(layers).items()}
    first = {f"{name}.{FIRST}": getattr(layer, FIRST) for name, layer in layers.items() if FIRST in layer._buffers}
    return {**observed, **trained, **first}


def _graph_facts(model: nn.Module, inputs: ForwardInputs, layers: Mapping[str, QuantizedLayer]) -> GraphFacts:
    try:
        return find_ranges(model, inputs, layers)
    except ValueError as error:
        rank_zero_warn(
            "no output of a convolution gets a range, so those before an addition stay float in the exported file: "
            f"{error}"
        )
        return GraphFacts()


class _Batches:
    """What forward receives of each batch; the first is tried before anything is read from them.

    Args:
        model: The model.
        dataloader: The batches.
        inputs: Returns the arguments of forward for a batch; None: by the usual rule.
        number: How many are used; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any] | None,
        inputs: Callable[[Any], Any] | None,
        number: int | None,
    ) -> None:
        self._model, self._dataloader, self._inputs, self._number = model, dataloader, inputs, number
        self._held: list[ForwardInputs] = []

    def held(self, reader: str) -> list[ForwardInputs]:
        """Return all of them, in memory; ``reader`` begins the sentence that says what needs them, empty for ranges."""
        self._held = self._held or list(self._read(reader))
        return self._held

    def once(self) -> tuple[ForwardInputs, Iterable[ForwardInputs]]:
        """Return the first, and all of them to go through once."""
        if self._held:
            return self._held[0], self._held
        calls = self._read("")
        first = next(calls)
        return first, chain([first], calls)

    def _read(self, reader: str) -> Iterator[ForwardInputs]:
        if self._dataloader is None:
            raise ValueError(
                'ranges of activations need data: pass a dataloader, activation_ranges="dynamic" for the range of each '
                "call, or activation_bits=None to quantize weights only."
                if not reader
                else f"{reader} the inputs of the layers: pass a dataloader, or leave it out."
            )
        calls = batch_calls(self._model, self._dataloader, self._inputs, self._number)
        first = next(calls, None)
        if first is None:
            raise ValueError("the dataloader has no batch to take ranges or inputs from.")
        with evaluating(self._model), without_fast_path():
            try_batch(self._model, first, self._inputs)
        return chain([first], calls)


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
