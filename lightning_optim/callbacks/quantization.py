"""QuantizationAwareTraining: the model learns to compute with few bits, inside the fit that trains it."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim._upstream import BatchNorm
from lightning_optim.callbacks.base import (
    CompressionCallback,
    callbacks_of,
    ranks_per_batch,
)
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.change import Changed
from lightning_optim.modules import is_compiled
from lightning_optim.provenance import as_plain
from lightning_optim.quantization.coverage import coverage_table
from lightning_optim.quantization.layers import PHASES, QuantizedLayer
from lightning_optim.quantization.outputs import find_outputs, has_convolutions
from lightning_optim.quantization.prepare import (
    QuantizationScheme,
    QuantizedLayers,
    drop_outputs,
    prepare,
    quantized_layers,
    select_layers,
    set_phase,
)
from lightning_optim.quantization.ranges import copy_ranges, fold_ranges, settle_ranges, unseen_inputs
from lightning_optim.sharding import is_sharded
from lightning_optim.target import ForwardInputs, Pattern, averaged_copies, find_target, move_inputs
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
        weight_granularity: What shares a scale: "per_channel" (per row of a table), "per_tensor", or "per_group:32"
            (32 inputs of a row), meant for 4 bits and below.
        bits: Weight bits by name or glob pattern, instead of ``weight_bits``; the first that matches counts.
        start: Where observing begins: a step (int) or a fraction of the planned steps (float).
        observe_steps: Steps of observing; None: 5 % of the planned steps, at least 1.
        freeze: From where on ranges and BatchNorm statistics are fixed.
        observer: How a range is found: "moving_average", "min_max" or "histogram" (see ``functional.observers``).
        example_inputs: What the target's forward receives. Needed only for convolutions, whose graph is read once:
            an output that an addition reads gets a range too, without which engines run the convolution in float.
            Default: the module's ``example_input_array``, else caught from the batch that leads to ``start``.
        module: Dotted name of the module to quantize; default the whole model.
        include: Exactly what is quantized (names, glob patterns, layer classes), instead of the default: every Linear,
            Conv1d/2d/3d, Embedding and EmbeddingBag, the last layer too.
        exclude: What stays float.

    Logged: ``quantization/phase`` (0 off, 1 observe, 2 fake quantize, 3 frozen) when it changes. A table at fit start
    says per layer the bits, or why it stays float.

    State: window and phase; ranges are buffers of the layers, so they are in every checkpoint. A resumed run continues
    bit for bit. A new ``fit`` of a model that is quantized keeps it so, and follows its ranges until ``freeze``.
    Strategies: a single device, DDP, and all that divide the model (``optim_zero2``, ``optim_fsdp``, ``optim_hsdp``,
    ``optim_tp``, ``optim_2d``); ranges are pooled over ranks by one all-reduce per optimizer step. Layers that share
    features (``optim_tp``) gather what they observe, and the weights whose rows are cut.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference"; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference".
    """

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        start: int | float = 0.5,
        observe_steps: int | None = None,
        freeze: int | float = 0.9,
        observer: str = "moving_average",
        weight_granularity: str = "per_channel",
        bits: dict[Pattern, int] | None = None,
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
        self.scheme = QuantizationScheme(
            weight_bits, activation_bits, weight_granularity, observer, {} if bits is None else bits
        )
        self._inputs = InputSource(example_inputs, 2, module)
        self._layers: dict[str, QuantizedLayer] = {}
        self._observed_until: int | None = None
        self._rounded: list[str] = []
        self._unseen: set[str] = set()
        self._outputs: list[str] = []
        self._outputs_known = False
        self._strategy: Any = None
        self._ranks_per_batch = 1
        self._frozen_norms: list[nn.Module] = []
        self._whole: pl.LightningModule | None = None

    # What the base asks for.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the layers that exist already, before any weight is loaded; fit start prepares the others."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not _builds_later(pl_module):
            self._prepare(trainer, pl_module)

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare what was built since ``setup``, and keep a whole copy where the graph is still to be read."""
        if trainer.state.fn != "fit":
            return
        self._prepare(trainer, pl_module)
        if has_convolutions(self._layers) and trainer.is_global_zero:
            self._whole = deepcopy(pl_module)

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

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Prepare what is not yet, and put the layers into the phase that is due."""
        if fresh:
            self._outputs, self._outputs_known = [], False
        selection = self._prepare(trainer, pl_module)
        self.check_peers(trainer)
        self._strategy, self._ranks_per_batch = trainer.strategy, ranks_per_batch(trainer)
        if fresh:
            self._rounded = [n for n, x in self._layers.items() if x.quantization_phase in ("fake_quantize", "frozen")]
        if not self._outputs_known:
            if has_convolutions(self._layers):
                self._inputs.prepare(pl_module, type(self).__name__)
            else:
                self._outputs_known = True
        self._enter(trainer, pl_module, self._phase_due(), say=False)
        title = f"{self.label}: steps {self.window.start_step} to {self.window.end_step}"
        rank_zero_info(coverage_table(title, self._layers, selection.left_out))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the layers observe this batch, hold BatchNorm where it is frozen, and catch inputs where needed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._hold_norms(trainer, pl_module)
        for layer in self._layers.values():
            layer.observing = layer.quantization_phase in ("observe", "fake_quantize")
        if not self._outputs_known and self._is_open(self.window.step + 1):
            self._inputs.begin_batch(pl_module)

    def _is_open(self, step: int) -> bool:
        return self.window.start_step is not None and step >= self.window.start_step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training forward is over: what others call in this batch is not observed."""
        if pl_module.automatic_optimization:
            self._stop_observing()

    def _stop_observing(self) -> None:
        for layer in self._layers.values():
            layer.observing = False

    def after_step(self, optimizer: Optimizer) -> None:
        """Fold what passed into the ranges: one all-reduce for all layers."""
        fold_ranges(self._layers, self._pool if self._strategy.world_size > 1 else None)

    def _pool(self, seen: Tensor, operation: str) -> Tensor:
        pooled: Tensor = self._strategy.reduce(seen, reduce_op=operation)
        return pooled if operation == "max" else pooled / self._ranks_per_batch

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the observing of this batch, and enter the phase that is due."""
        self._stop_observing()
        if self._stepped:  # seen after the last step: no file holds it, so a resumed run would not have it
            self._forget_seen()
        found = self._inputs.inputs is not None and self._is_open(self.window.step)
        if not self._outputs_known and (found or self._inputs.catching):
            self._find_outputs(trainer, pl_module)
        if self._follows:
            self._copy_ranges(trainer)
        super().finish_batch(trainer, pl_module)

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase that is due now."""
        self._enter(trainer, pl_module, self._phase_due())

    # Phases.

    @property
    def phase(self) -> str:
        """The phase the layers are in, but for those whose input was never seen."""
        layers = [layer for name, layer in self._layers.items() if name not in self._unseen] or self._layers.values()
        return PHASES[min((PHASES.index(layer.quantization_phase) for layer in layers), default=0)]

    @property
    def _follows(self) -> bool:
        return self.phase in ("observe", "fake_quantize")

    def _phase_due(self) -> str:
        step, window = self.window.step, self.window
        if window.start_step is None or window.end_step is None or self._observed_until is None:
            return "off"
        passed = (window.start_step, self._observed_until, window.end_step)
        return PHASES[sum(step >= bound for bound in passed)]

    def _phase_of(self, name: str, due: str) -> str:
        """Return a layer's phase: one that was rounded when the fit began stays so.

        One whose input was never seen is observed until it is, and stays float once ranges are frozen.
        """
        if name in self._unseen:
            return "off" if due == "frozen" else "observe"
        return "fake_quantize" if name in self._rounded and due in ("off", "observe") else due

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule, phase: str, *, say: bool = True) -> None:
        rounds = PHASES.index(phase) >= PHASES.index("fake_quantize")
        self._unseen = unseen_inputs(self._layers) if rounds else set()
        wanted = {name: self._phase_of(name, phase) for name in self._layers}
        changing = {name: x for name, x in self._layers.items() if not _is_in(x, wanted[name])}
        changes = any(layer.quantization_phase != wanted[name] for name, layer in changing.items())
        if not changing:
            return
        if rounds:
            settle_ranges({name: layer for name, layer in changing.items() if name not in self._unseen})
        if phase == "frozen" and changes:
            self._leave_float()
        if phase == "frozen" and trainer.world_size > 1:
            self._share_norms(trainer, pl_module)
        for module in (pl_module, *averaged_copies(trainer)):
            self._set_phases(module, wanted)
        self._copy_ranges(trainer)
        if changes and is_compiled(pl_module):
            torch.compiler.reset()  # graphs of earlier phases count towards its limit, beyond which it runs eager
        if changes and say:
            self._report(trainer, pl_module)

    def _leave_float(self) -> None:
        """Say which layers are frozen as float, since no batch called them; those that were asked for raise."""
        unseen = [name for name in self._layers if name in self._unseen]
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

    def _set_phases(self, module: nn.Module, wanted: Mapping[str, str]) -> None:
        layers = self._layers_of(module)
        for phase in dict.fromkeys(wanted.values()):
            set_phase(module, {name: layer for name, layer in layers.items() if wanted[name] == phase}, phase)

    def _layers_of(self, module: nn.Module) -> dict[str, QuantizedLayer]:
        layers = quantized_layers(module)
        return {name: layers[name] for name in self._layers}

    def _copy_ranges(self, trainer: pl.Trainer) -> None:
        for copy in averaged_copies(trainer):
            copy_ranges(self._layers, self._layers_of(copy))

    def _share_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give every rank the BatchNorm statistics of rank 0: they enter the training forward pass from now on."""
        for layer in _batch_norms(find_target(pl_module, self.module)[1]):
            for buffer in layer.buffers():
                buffer.copy_(trainer.strategy.broadcast(buffer, src=0))

    def _hold_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep BatchNorm on its running statistics while frozen, unless weight averaging computes them anew."""
        if self.phase != "frozen" or any(getattr(callback, "momenta", None) for callback in callbacks_of(trainer)):
            self._release_norms()
            return
        for layer in _batch_norms(find_target(pl_module, self.module)[1]):
            if layer.training:
                layer.eval()
                self._frozen_norms.append(layer)

    def _release_norms(self) -> None:
        for layer in self._frozen_norms:
            layer.train()
        self._frozen_norms = []

    # Layers.

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> QuantizedLayers:
        prefix, target = find_target(pl_module, self.module)
        selection = select_layers(target, prefix, include=self.include, exclude=self.exclude, root=pl_module)
        self.scheme.check_patterns(selection.chosen, prefix)
        for module in (pl_module, *averaged_copies(trainer)):
            if self.scheme.activation_bits is None:
                drop_outputs(module, selection.chosen)
            prepare(module, selection.chosen, self.scheme, prefix)
        ours = {*selection.chosen, *self._outputs}
        self._layers = {name: layer for name, layer in quantized_layers(pl_module).items() if name in ours}
        return selection

    def _find_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the graph once, and let the outputs that need it have a range; rank 0 decides."""
        outputs: dict[str, bool] = {}
        try:
            self._inputs.end_batch(pl_module)
            if self._inputs.inputs is not None and (trainer.is_global_zero or not is_sharded(pl_module)):
                outputs = self._read_outputs(pl_module, self._inputs.inputs)
        except ValueError as error:
            rank_zero_warn(
                f"{self.label}: no output of a convolution gets a range, so those before an addition stay float in "
                f"the exported file: {error}"
            )
        if trainer.world_size > 1:
            outputs = trainer.strategy.broadcast(outputs, src=0)
        self._outputs_known = True
        self._inputs.release()
        self._whole = None
        self._outputs = list(outputs)
        prefix, _ = find_target(pl_module, self.module)
        phases = {name: layer.quantization_phase for name, layer in self._layers.items()}
        for module in (pl_module, *averaged_copies(trainer)):
            prepare(module, (), self.scheme, prefix, outputs)
        layers = quantized_layers(pl_module)
        self._layers |= {name: layers[name] for name in outputs}
        joining = dict.fromkeys(outputs.keys() - phases.keys(), self._phase_due())  # BatchNorms
        for module in (pl_module, *averaged_copies(trainer)):
            self._set_phases(module, phases | joining)

    def _read_outputs(self, pl_module: pl.LightningModule, inputs: ForwardInputs) -> dict[str, bool]:
        """Read the graph of the module, or of its whole copy where the module itself is divided."""
        whole = pl_module if self._whole is None else self._whole
        device = next(whole.parameters()).device
        called = self._inputs.called(whole)
        return find_outputs(called, move_inputs(inputs, device), self._layers, self._inputs.layer)

    # The window.

    def resolve_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule, passed: int = 0) -> None:
        """Turn the window into steps, and the end of observing with it."""
        super().resolve_window(trainer, pl_module, passed)
        start, freeze = self.window.start_step, self.window.end_step
        if start is None or freeze is None:
            raise RuntimeError("the window was just resolved.")
        if self.scheme.activation_bits is None:
            self._observed_until = start
            return
        planned = planned_steps(trainer, automatic_optimization=pl_module.automatic_optimization) - passed
        run = freeze if math.isinf(planned) else planned
        steps = self.observe_steps or max(1, round(OBSERVED_PART * run))
        self._fit_observing(steps, fast_dev_run=bool(getattr(trainer, "fast_dev_run", False)))

    def _fit_observing(self, steps: int, *, fast_dev_run: bool) -> None:
        """Let observing end before ranges are frozen: a start that was given as a fraction moves forward for it."""
        start, freeze = self.window.start_step or 0, self.window.end_step or 0
        if fast_dev_run:
            steps = min(steps, freeze)
        if start + steps > freeze and (fast_dev_run or isinstance(self.window.start, float)):
            start = max(0, freeze - steps)
        if start + steps > freeze or steps == 0:
            raise MisconfigurationException(
                f"ranges are observed for {steps} steps from `start` (step {start}), which is not over by `freeze` "
                f"(step {freeze}). Start earlier, freeze later, or lower `observe_steps`."
            )
        self.window.start_step, self._observed_until = start, start + steps

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window and phases as plain types; ranges are in the module's ``state_dict``."""
        return {
            **super().state_dict(),
            "observed_until": self._observed_until,
            "rounded": list(self._rounded),
            "outputs": list(self._outputs),
            "outputs_known": self._outputs_known,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._observed_until = state_dict["observed_until"]
        self._rounded, self._outputs = list(state_dict["rounded"]), list(state_dict["outputs"])
        self._outputs_known = state_dict["outputs_known"]

    def plan_entry(self) -> dict[str, Any]:
        """Return what was asked, and the phase."""
        return {
            "technique": "QuantizationAwareTraining",
            "weight_bits": self.scheme.weight_bits,
            "activation_bits": self.scheme.activation_bits,
            "weight_granularity": self.scheme.weight_granularity,
            "bits": as_plain(self.scheme.bits),
            "phase": self.phase,
        }

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Rename layers that moved; drop those that were removed or replaced by layers that are not quantized.

        Weight scales are computed from the weights; activation scales have no channels.
        """
        names = {name: changed.layer(name) for name in self._layers}
        for name, layer in dict[str, nn.Module](self._layers).items():
            if names[name] is not None and not isinstance(layer, QuantizedLayer):  # its class was replaced
                rank_zero_info(f"{self.label}: {names[name]} is now a {type(layer).__name__}, which stays float.")
                names[name] = None
        self._layers = {new: self._layers[old] for old, new in names.items() if new is not None}
        self._rounded = [new for old in self._rounded if (new := names.get(old)) is not None]
        self._outputs = [new for old in self._outputs if (new := names.get(old)) is not None]
        self._unseen = {new for old in self._unseen if (new := names.get(old)) is not None}

    # Words.

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        words = {"observe": "observing ranges", "fake_quantize": "rounding", "frozen": "ranges frozen", "off": "off"}
        count = len(self._layers) - len(self._unseen)
        rank_zero_info(f"{self.label}: step {self.window.step}, {words[self.phase]} in {count} layers.")
        self.log_event(trainer, pl_module, {"quantization/phase": float(PHASES.index(self.phase))})

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and in which phase the model is."""
        activations = "float" if self.scheme.activation_bits is None else f"uint{self.scheme.activation_bits}"
        asked = (
            f"asked int{self.scheme.weight_bits} weights and {activations} activations in {len(self._layers)} layers"
        )
        if self._unseen:
            asked += f", of which {len(self._unseen)} never ran and stay float"
        if self.reached_end:
            return f"{self.label}: {asked}; they are {self.phase.replace('_', ' ')}."
        return (
            f"{self.label}: the run ended at step {self.window.step}, before the window's end at step "
            f"{self.window.end_step}: {asked}; they are in phase {self.phase!r}."
        )

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed, and drop what was observed since the last step."""
        self._inputs.release()
        self._release_norms()
        self._strategy = self._whole = None
        self._stop_observing()
        self._forget_seen()
        super().release(pl_module)

    def _forget_seen(self) -> None:
        for layer in self._layers.values():
            layer.seen_input = layer.seen_output = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give BatchNorm its mode back, before the user's own last hooks."""
        self._release_norms()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": {}, "_strategy": None, "_frozen_norms": [], "_whole": None}


def _is_in(layer: QuantizedLayer, phase: str) -> bool:
    return layer.quantization_phase == phase and (not layer.quantizes_output or layer.output_phase == phase)


def _batch_norms(target: nn.Module) -> list[nn.Module]:
    return [layer for layer in target.modules() if isinstance(layer, BatchNorm)]


def _builds_later(pl_module: pl.LightningModule) -> bool:
    """Whether layers may be built after ``Callback.setup``."""
    base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
    return any(getattr(type(pl_module), hook) is not getattr(base, hook) for hook in ("setup", "configure_model"))
