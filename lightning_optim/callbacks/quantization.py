"""QuantizationAwareTraining: the model learns to compute with few bits, inside the fit that trains it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.callbacks.auto_bits import AutoBits
from lightning_optim.callbacks.base import CompressionCallback, builds_later, callbacks_of, ranks_per_batch
from lightning_optim.callbacks.frozen_norms import FrozenNorms, share_statistics
from lightning_optim.callbacks.learned_steps import LearnedSteps
from lightning_optim.callbacks.output_ranges import OutputRanges
from lightning_optim.change import Changed
from lightning_optim.modules import is_compiled
from lightning_optim.provenance import as_plain
from lightning_optim.quantization.auto_bits import check_effective_bits
from lightning_optim.quantization.coverage import coverage_table
from lightning_optim.quantization.layers import PHASES, QuantizedLayer
from lightning_optim.quantization.outputs import has_convolutions
from lightning_optim.quantization.phases import LayerPhases, observing_steps, phase_at, rounds
from lightning_optim.quantization.prepare import (
    QuantizedLayers,
    drop_outputs,
    prepare,
    quantized_layers,
    select_layers,
    set_phases,
)
from lightning_optim.quantization.ranges import Reduce, copy_ranges, fold_ranges, settle_ranges, unseen_inputs
from lightning_optim.quantization.scheme import QuantizationScheme
from lightning_optim.target import Pattern, averaged_copies, find_target
from lightning_optim.window import Window, planned_steps

__all__ = ["QuantizationAwareTraining"]

OBSERVED_PART = 0.05
"""Fraction of the run in which ranges are only observed, unless ``observe_steps`` says how long."""


class QuantizationAwareTraining(CompressionCallback):
    """Train with weights and activations rounded to integers, so that the exported integer model answers the same.

    Four phases: *off* until ``start`` (the run is the float run, bit for bit); *observe*, where the ranges of
    activations are followed; *fake quantize*, where weights and activations are rounded in the forward pass and
    gradients pass through the rounding; *frozen* from ``freeze`` on: ranges and BatchNorm statistics stay as they are.
    Validation after ``start`` sees the rounded model; observers see training batches only.

    :func:`lightning_optim.export_onnx` then writes the integers. In PyTorch the rounded model is not faster: it
    computes in float. At 8 bits :func:`lightning_optim.quantize_post_training` gives the same accuracy without
    training; where we measured it, training with rounding paid at 3 bits and not yet clearly at 4.

    Args:
        weight_bits: 2 to 8, symmetric.
        activation_bits: 2 to 8, affine, one scale per tensor; None: weights only.
        activation_ranges: "static": ranges are observed, and fixed from ``freeze`` on. "symmetric": the same with zero
            in the middle, so that there is no zero point (int8), as TensorRT needs it
            (``export_onnx(target="tensorrt")``); what is never negative has half as many steps then. "dynamic": inputs
            of Linear layers are rounded to 8 bits with the range of each call (those of convolutions stay float);
            nothing is observed, and rounding begins at ``start``. Language models have a few activations that are much
            larger than the others, which costs less with the latter, and least with ``activation_bits=None``.
        weight_granularity: What shares a scale: "per_channel" (per row of a table), "per_tensor", or "per_group:32"
            (32 inputs of a row), meant for 4 bits and below.
        bits: Weight bits by name or glob pattern, instead of ``weight_bits``; the first that matches counts. "auto":
            when rounding begins, each layer gets 2 to ``weight_bits`` bits so that the expected error of the model's
            outputs on the last batches before is least (see :func:`lightning_optim.quantize_post_training`). Rank 0
            chooses; of a model that is divided it keeps a whole copy on the way there.
        effective_bits: Mean bits of a weight with ``bits="auto"``.
        start: Where observing begins: a step (int) or a fraction of the planned steps (float).
        observe_steps: Steps of observing; None: 5 % of the planned steps, at least 1.
        freeze: From where on ranges and BatchNorm statistics are fixed.
        observer: How a range is found: "moving_average", "min_max", "percentile" or "histogram" (see
            ``functional.observers``). "learned": the steps of weights, and steps and zero points of inputs, are
            parameters that are trained by the optimizer of their layer's weight once rounding begins (LSQ).
        example_inputs: What the target's forward receives. Needed only for convolutions, whose graph is read once:
            an output that an addition reads gets a range too, without which engines run the convolution in float.
            Default: the module's ``example_input_array``, else caught from the batch that leads to ``start``.
        module: Dotted name of the module to quantize; default the whole model.
        include: Exactly what is quantized (names, glob patterns, layer classes), instead of the default: every Linear,
            Conv1d/2d/3d, ConvTranspose1d/2d/3d, MultiheadAttention, LSTM, GRU, Embedding and EmbeddingBag, the last
            layer too.
        exclude: What stays float.

    Logged: ``quantization/phase`` (0 off, 1 observe, 2 fake quantize, 3 frozen) when it changes. A table at fit start
    says per layer the bits, or why it stays float.

    State: window and phase; ranges are buffers of the layers, so they are in every checkpoint. A resumed run continues
    bit for bit. A new ``fit`` of a model that is quantized keeps it so, and follows its ranges until ``freeze``.
    Strategies: a single device, DDP, and all that divide the model (``optim_zero2``, ``optim_fsdp``, ``optim_hsdp``,
    ``optim_tp``, ``optim_2d``); ranges are pooled over ranks by one all-reduce per optimizer step. Layers that share
    features (``optim_tp``) gather what they observe, and the weights whose rows are cut.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, a name is unknown, arguments exclude each other, or, at fit start,
            nothing can be quantized.
        RuntimeError: At ``freeze``, if a layer that ``include`` names never ran.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference"; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference".

    Examples:
        >>> quantization = QuantizationAwareTraining(weight_bits=4, start=0.5, freeze=0.9)
        >>> quantization = QuantizationAwareTraining(  # a language model: weights alone, packed in the file
        ...     weight_bits=4, activation_bits=None, weight_granularity="per_group:32"
        ... )
    """

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        activation_ranges: str = "static",
        start: int | float = 0.5,
        observe_steps: int | None = None,
        freeze: int | float = 0.9,
        observer: str = "moving_average",
        weight_granularity: str = "per_channel",
        bits: dict[Pattern, int] | Literal["auto"] | None = None,
        effective_bits: float | None = None,
        example_inputs: Any = None,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        window = Window(start, freeze, every_n_steps=1, names=("start", "freeze"))
        super().__init__(window, module=module, include=include, exclude=exclude)
        if observe_steps is not None and (type(observe_steps) is not int or observe_steps < 1):
            raise ValueError(f"`observe_steps` must be a whole number >= 1 or None, got {observe_steps!r}.")
        self.observe_steps = observe_steps
        by_pattern = {} if bits is None or isinstance(bits, str) else bits
        self.scheme = QuantizationScheme(
            weight_bits, activation_bits, weight_granularity, observer, by_pattern, activation_ranges
        )
        check_effective_bits(bits, effective_bits, weight_bits)
        if observe_steps is not None and activation_ranges == "dynamic":
            raise ValueError(
                f'`activation_ranges="dynamic"` observes nothing, got observe_steps={observe_steps!r}. Leave it out.'
            )
        self._layers: dict[str, QuantizedLayer] = {}
        self._observed_until: int | None = None
        self._phases = LayerPhases()
        self._outputs = OutputRanges(example_inputs, module)
        self._norms = FrozenNorms()
        self._steps = LearnedSteps(self.label)
        self._auto = AutoBits(effective_bits, self.label)
        self._reduce: Reduce | None = None

    # Layers.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the layers that exist already, before any weight is loaded; fit start prepares the others."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not builds_later(pl_module):
            self._prepare(trainer, pl_module)
        elif stage == "fit" and self.scheme.learns:
            self._steps.before_optimizers(pl_module, lambda: self._prepare(trainer, pl_module))

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare what was built since ``setup``, and keep a whole copy if the graph is still to be read."""
        if trainer.state.fn != "fit":
            return
        self._prepare(trainer, pl_module)
        self._auto.keep_whole(trainer, pl_module)
        if has_convolutions(self._layers):
            self._outputs.keep_whole(trainer, pl_module)

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights of the quantized layers."""
        return {
            f"{name}.{leaf}": parameter
            for name, layer in self._layers.items()
            for leaf, parameter in layer.named_parameters(recurse=False)
        }

    def selected(self) -> dict[str, QuantizedLayer]:
        """Return the quantized layers."""
        return self._layers

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> QuantizedLayers:
        prefix, target = find_target(pl_module, self.module)
        selection = select_layers(target, prefix, include=self.include, exclude=self.exclude, root=pl_module)
        self.scheme = self._auto.scheme(self.scheme, pl_module)
        self.scheme.check_patterns(selection.chosen, prefix)
        for module in (pl_module, *averaged_copies(trainer)):
            if not self.scheme.observes:
                drop_outputs(module, selection.chosen)
            prepare(module, selection.chosen, self.scheme, prefix)
        ours = {*selection.chosen, *self._outputs.names}
        self._layers = {name: layer for name, layer in quantized_layers(pl_module).items() if name in ours}
        return selection

    def _add_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the outputs that need it have a range."""
        facts = self._outputs.read(trainer, pl_module, self._layers, self.label)
        prefix, _ = find_target(pl_module, self.module)
        phases = {name: layer.quantization_phase for name, layer in self._layers.items()}
        names = self._outputs.names
        joining = {name: self._phase_due for name in names if name not in phases}  # BatchNorms, modules with functions
        for module in (pl_module, *averaged_copies(trainer)):
            prepare(module, (), self.scheme, prefix, facts)
            set_phases(module, phases | joining)
        layers = quantized_layers(pl_module)
        self._layers |= {name: layers[name] for name in names}

    # Events of the Trainer.

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Prepare what is not yet, and put the layers into the phase that is due."""
        if fresh:
            self._outputs.forget()
            self._auto.forget()
        selection = self._prepare(trainer, pl_module)
        self.check_peers(trainer)
        self._reduce = _pooling(trainer) if trainer.world_size > 1 else None
        if fresh:
            self._phases.rounded = [name for name, layer in self._layers.items() if rounds(layer.quantization_phase)]
        self._outputs.prepare(pl_module, self._layers, type(self).__name__)
        self._enter(trainer, pl_module, say=False)
        self._steps.join(trainer, pl_module, self._layers)
        title = f"{self.label}: steps {self.window.start_step} to {self.window.end_step}"
        rank_zero_info(coverage_table(title, self._layers, selection.left_out))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the layers observe this batch, hold BatchNorm where it is frozen, and catch inputs where needed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:  # weights may have been unfrozen, or have joined an optimizer
            self._steps.join(trainer, pl_module, self._layers)
        # Weight averaging with its own momenta computes the statistics anew, in training mode.
        averages = any(getattr(callback, "momenta", None) for callback in callbacks_of(trainer))
        if self.phase != "frozen" or averages:
            self._norms.release()
        else:
            self._norms.hold(find_target(pl_module, self.module)[1])
        for layer in self._layers.values():
            layer.observing = layer.quantization_phase in ("observe", "fake_quantize")
        left = -1 if self._observed_until is None else self._observed_until - self.window.step
        self._auto.begin_batch(find_target(pl_module, self.module)[1], batch, batch_idx, left)
        if self._is_open(self.window.step + 1):
            self._outputs.begin_batch(pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training forward is over: what others call in this batch is not observed."""
        if pl_module.automatic_optimization:
            _stop_observing(self._layers.values())

    def after_step(self, optimizer: Optimizer) -> None:
        """Fold what passed into the ranges: one all-reduce for all layers."""
        fold_ranges(self._layers, self._reduce)

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the observing of this batch, and enter the phase that is due."""
        _stop_observing(self._layers.values())
        self._auto.end_batch(pl_module)
        if self._stepped:  # seen after the last step: no file holds it, so a resumed run would not have it
            _forget_seen(self._layers.values())
        if self._outputs.can_be_read(self._is_open(self.window.step)):
            self._add_outputs(trainer, pl_module)
        if self.phase in ("observe", "fake_quantize"):
            _copy_to_averaged(trainer, self._layers)
        super().finish_batch(trainer, pl_module)

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase that is due now."""
        self._enter(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give BatchNorm its mode back, before the user's own last hooks."""
        self._norms.release()

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed, and drop what was observed since the last step."""
        self._outputs.release()
        self._norms.release()
        self._steps.release()
        self._auto.release()
        self._reduce = None
        _stop_observing(self._layers.values())
        _forget_seen(self._layers.values())
        super().release(pl_module)

    # Phases.

    @property
    def phase(self) -> str:
        """The phase the layers are in, but for those whose input was never seen."""
        return self._phases.reached(self._layers)

    @property
    def _phase_due(self) -> str:
        return phase_at(self.window.step, self.window.start_step, self._observed_until, self.window.end_step)

    def _is_open(self, step: int) -> bool:
        return self.window.start_step is not None and step >= self.window.start_step

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, say: bool = True) -> None:
        phase = self._phase_due
        if rounds(phase) and self._auto.can_choose(trainer):
            chosen = self._auto.choose(trainer, pl_module, self._layers, self.scheme)
            selection = self._prepare(trainer, pl_module)
            rank_zero_info(coverage_table(f"{self.label}: bits chosen", self._layers, selection.left_out))
            rank_zero_info(f"{self.label}: {chosen}")
        self._phases.unseen = unseen_inputs(self._layers) if rounds(phase) else set()
        wanted = self._phases.wanted(self._layers, phase)
        changing = {name: layer for name, layer in self._layers.items() if not _is_in(layer, wanted[name])}
        changes = any(layer.quantization_phase != wanted[name] for name, layer in changing.items())
        if not changing:
            return
        if rounds(phase):
            seen = {name: layer for name, layer in changing.items() if name not in self._phases.unseen}
            settle_ranges(seen)
            self._steps.begin(trainer, {n: layer for n, layer in seen.items() if not rounds(layer.quantization_phase)})
        if phase == "frozen" and changes:
            self._leave_float()
        if phase == "frozen" and trainer.world_size > 1:
            share_statistics(find_target(pl_module, self.module)[1], trainer.strategy)
        for module in (pl_module, *averaged_copies(trainer)):
            set_phases(module, wanted)
        self._steps.train(trainer, self._layers)
        _copy_to_averaged(trainer, self._layers)
        if changes and is_compiled(pl_module):
            torch.compiler.reset()  # graphs of earlier phases count towards its limit, beyond which it runs eager
        if changes and say:
            count = len(self._layers) - len(self._phases.unseen)
            rank_zero_info(f"{self.label}: step {self.window.step}, {_DOING[self.phase]} in {count} layers.")
            self.log_event(trainer, pl_module, {"quantization/phase": float(PHASES.index(self.phase))})

    def _leave_float(self) -> None:
        """Say which layers are frozen as float, since no batch called them; those that were asked for raise."""
        unseen = [name for name in self._layers if name in self._phases.unseen]
        if not unseen:
            return
        named = f"{', '.join(unseen[:5])}{f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''}"
        if self.include is not None:
            raise RuntimeError(
                f"no input of {named} was seen between `start` and `freeze`, and `include` asks for it: the forward "
                f"pass does not call it in training. Pass exclude={unseen[:5]!r}."
            )
        rank_zero_warn(
            f"{self.label}: no input of {named} was seen between `start` and `freeze` (step {self.window.step}), so "
            "it has no range and stays float."
        )

    def resolve_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule, passed: int = 0) -> None:
        """Turn the window into steps, and the end of observing with it."""
        super().resolve_window(trainer, pl_module, passed)
        start, freeze = self.window.start_step, self.window.end_step
        if start is None or freeze is None:
            raise RuntimeError("the window was just resolved.")
        if not self.scheme.observes:
            self._observed_until = start
            return
        planned = planned_steps(trainer, automatic_optimization=pl_module.automatic_optimization) - passed
        run = freeze if math.isinf(planned) else planned
        self.window.start_step, self._observed_until = observing_steps(
            start,
            freeze,
            self.observe_steps or max(1, round(OBSERVED_PART * run)),
            movable=isinstance(self.window.start, float),
            fast_dev_run=bool(getattr(trainer, "fast_dev_run", False)),
        )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window and phases as plain types; ranges are in the module's ``state_dict``."""
        return {
            **super().state_dict(),
            "observed_until": self._observed_until,
            "rounded": list(self._phases.rounded),
            "outputs": list(self._outputs.names),
            "outputs_known": self._outputs.known,
            "auto_bits": self._auto.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._observed_until = state_dict["observed_until"]
        self._phases.rounded = list(state_dict["rounded"])
        if "auto_bits" in state_dict:  # files before 0.2 have none
            self._auto.load_state_dict(state_dict["auto_bits"])
        self._outputs.names, self._outputs.known = list(state_dict["outputs"]), state_dict["outputs_known"]

    def plan_entry(self) -> dict[str, Any]:
        """Return the requested bits, and the phase."""
        return {
            "technique": "QuantizationAwareTraining",
            "weight_bits": self.scheme.weight_bits,
            "activation_bits": self.scheme.activation_bits,
            "activation_ranges": self.scheme.activation_ranges,
            "weight_granularity": self.scheme.weight_granularity,
            "bits": as_plain(self.scheme.bits),
            "phase": self.phase,
        }

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Rename layers that moved; drop those that were removed or replaced, and take in those that were added.

        Weight scales are computed from the weights; activation scales have no channels.
        """
        names = {name: changed.layer(name) for name in self._layers}
        replaced = {n: x for n, x in dict[str, nn.Module](self._layers).items() if not isinstance(x, QuantizedLayer)}
        now = {old: None if old in replaced else new for old, new in names.items()}
        self._layers = {new: self._layers[old] for old, new in now.items() if new is not None}
        self._phases.rename(now)
        self._outputs.rename(now)
        self._auto.rename(now)
        self._steps.follow(pl_module.trainer, pl_module, changed, self._layers)
        if changed.added and pl_module.trainer.state.fn == "fit":  # layers that another technique added
            self._prepare(pl_module.trainer, pl_module)
            self._enter(pl_module.trainer, pl_module, say=False)
            self._steps.join(pl_module.trainer, pl_module, self._layers)
        for old, layer in replaced.items():
            if names[old] is not None and not any(name.startswith(f"{names[old]}.") for name in self._layers):
                rank_zero_info(f"{self.label}: {names[old]} is now a {type(layer).__name__}, which stays float.")

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was requested and in which phase the model is."""
        activations = "float" if self.scheme.activation_bits is None else f"uint{self.scheme.activation_bits}"
        kind = self.scheme.activation_ranges
        activations = f"{kind} {activations}" if kind == "dynamic" else activations
        activations = activations.removeprefix("u") if kind == "symmetric" else activations
        weights = f"int{self.scheme.weight_bits}"
        if self._auto.chosen is not None:
            weights = f"{self._auto.chosen.effective_bits:.2f} bits (of {self._auto.chosen.asked:g})"
        asked = f"asked {weights} weights and {activations} activations in {len(self._layers)} layers"
        if self._phases.unseen:
            asked += f", of which {len(self._phases.unseen)} never ran and stay float"
        if self.reached_end:
            return f"{self.label}: {asked}; they are {self.phase.replace('_', ' ')}."
        return (
            f"{self.label}: the run ended at step {self.window.step}, before the window's end at step "
            f"{self.window.end_step}: {asked}; they are in phase {self.phase!r}."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": {}, "_reduce": None}


_DOING = {"observe": "observing ranges", "fake_quantize": "rounding", "frozen": "ranges frozen", "off": "off"}


def _pooling(trainer: pl.Trainer) -> Reduce:
    """Return what pools a tensor over the ranks; ranks that share layers count the same batch several times."""
    per_batch = ranks_per_batch(trainer)

    def pool(seen: Tensor, operation: str) -> Tensor:
        pooled: Tensor = trainer.strategy.reduce(seen, reduce_op=operation)
        return pooled if operation == "max" else pooled / per_batch

    return pool


def _copy_to_averaged(trainer: pl.Trainer, layers: dict[str, QuantizedLayer]) -> None:
    for copy in averaged_copies(trainer):
        copy_ranges(layers, quantized_layers(copy))


def _stop_observing(layers: Iterable[QuantizedLayer]) -> None:
    for layer in layers:
        layer.observing = False


def _forget_seen(layers: Iterable[QuantizedLayer]) -> None:
    for layer in layers:
        for which in layer.watched:
            setattr(layer, f"seen_{which}", None)


def _is_in(layer: QuantizedLayer, phase: str) -> bool:
    return layer.quantization_phase == phase and (not layer.quantizes_output or layer.output_phase == phase)
