"""The time of a call during a fit: the model as it would be deployed, against a frozen copy of how it began."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_optim import checkpoint
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.measure.latency import interleaved_latency
from lightning_optim.measure.size import bytes_of, free_bytes
from lightning_optim.modules import copy_module
from lightning_optim.quantization.layers import float_kernels
from lightning_optim.sharding import is_sharded, whole_state
from lightning_optim.target import ForwardInputs

__all__ = ["InferenceTime"]

LEAST_SECONDS = 0.05
"""Time given to latency pairs even in short epochs."""


class InferenceTime:
    """Measures calls of the model, and their ratio to calls of the reference.

    Args:
        example_inputs: As the callback takes them.
        batch_size: Rows of a call.
    """

    def __init__(self, example_inputs: Any, batch_size: int) -> None:
        self._arguments = (example_inputs, batch_size)
        self.inputs = InputSource(example_inputs, batch_size)
        self.reference: nn.Module | None = None
        """Frozen copy of the model as it was; None measures milliseconds only."""
        self.whole: nn.Module | None = None
        """Where a strategy divides the model, a copy of it on rank 0 that takes the gathered weights."""

    def anew(self) -> "InferenceTime":
        """Return one without reference and caught inputs; the whole copy goes along."""
        other = InferenceTime(*self._arguments)
        other.whole = self.whole
        return other

    def keep_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a whole copy before the model is divided, where two of them fit."""
        self.whole = None
        if 2 * bytes_of(pl_module) > free_bytes(torch.device("cpu")):
            return  # reported by `prepare`
        self.whole = copy_module(pl_module, compiled=True).requires_grad_(False)
        trainer.precision_plugin.convert_module(self.whole)

    def prepare(self, pl_module: pl.LightningModule, reference_plan: Mapping[str, Any] | None) -> None:
        """Copy the reference and find the inputs.

        Args:
            pl_module: The LightningModule at fit start.
            reference_plan: Structure of the reference; None keeps no reference.
        """
        source: nn.Module | None = self.whole if is_sharded(pl_module) else pl_module
        if reference_plan is not None and source is not None:
            self.reference = copy_module(source, compiled=True).requires_grad_(False)
            checkpoint.conform(self.reference, reference_plan)
        self.inputs.prepare(pl_module, "PerformanceScore")
        if source is None and pl_module.trainer.is_global_zero:
            rank_zero_warn(
                "PerformanceScore keeps no whole copy of this model (it does not fit, or was divided by a fit without "
                "this callback): the inference time is not measured, and P is NaN."
            )

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, reference_ms: float, train_seconds: float
    ) -> tuple[float, float]:
        """Return the ratio and the milliseconds of a call; rank 0 measures while the others wait.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule.
            reference_ms: What the milliseconds are divided by where there is no reference model.
            train_seconds: Time of the epoch, a share of which is spent.
        """
        measured = (math.nan, math.nan)
        live = self._gathered(pl_module) if is_sharded(pl_module) else pl_module
        if trainer.is_global_zero and self.inputs.inputs is not None and live is not None:
            with _on_device(pl_module.device, live, self.reference) as fits:
                if fits:
                    measured = self._timed(live, self.inputs.inputs, reference_ms, train_seconds)
        if trainer.world_size > 1:
            measured = trainer.strategy.broadcast(measured, src=0)
        return measured

    def _gathered(self, pl_module: pl.LightningModule) -> nn.Module | None:
        """Return the whole copy with the weights and the structure of now; None where this rank keeps none."""
        state = whole_state(pl_module, keep=self.whole is not None)
        if self.whole is not None:
            checkpoint.conform(self.whole, checkpoint.plain_plan(pl_module))
            self.whole.load_state_dict(state)
            self.whole.eval()
        return self.whole

    def _timed(
        self, model: nn.Module, inputs: ForwardInputs, reference_ms: float, train_seconds: float
    ) -> tuple[float, float]:
        budget = max(0.005 * train_seconds, LEAST_SECONDS)
        live = _Called(self.inputs.called(model))
        frozen = None if self.reference is None else _Called(self.inputs.called(self.reference))
        with _silent(model), _silent(self.reference), float_kernels(live, *([frozen] if frozen else [])):
            result = interleaved_latency(live, inputs, frozen, seconds=budget, least=10, most=100)
        ratio = result.milliseconds / reference_ms if result.ratio is None else result.ratio
        return ratio, result.milliseconds

    def release(self) -> None:
        """Stop catching inputs, free the reference. The whole copy stays: a divided model is not made whole again."""
        self.inputs.release()
        self.reference = None


@contextmanager
def _on_device(device: torch.device, *models: nn.Module | None) -> Iterator[bool]:
    """Bring what is measured to the device where it fits, and back afterwards."""
    coming = [model for model in models if model is not None and next(model.parameters()).device != device]
    fits = sum(map(bytes_of, coming)) <= free_bytes(device)
    if not fits:
        rank_zero_warn(
            f"the inference time is not measured, and P is NaN: the whole model and its reference do not fit what is "
            f"free on {device}."
        )
    for model in coming if fits else ():
        model.to(device)
    try:
        yield fits
    finally:
        for model in coming if fits else ():
            model.to("cpu")


@contextmanager
def _silent(module: Any) -> Iterator[None]:
    """Let ``self.log`` in a forward do nothing: it would be timed, and log what measuring feeds it."""
    hidden = ("log", "log_dict")
    before = {} if module is None else {name: module.__dict__[name] for name in hidden if name in module.__dict__}
    for name in hidden if module is not None else ():
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in hidden if module is not None else ():
            del module.__dict__[name]
        if module is not None:
            module.__dict__.update(before)


class _Called(nn.Module):
    """Calls a module's class-level forward: not the compiled one, not the one DDP redirects."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.module.__dict__:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.module(*args, **kwargs)
