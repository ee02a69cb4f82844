"""GradientNoiseScale: measures in training how large the batch may be before it wastes samples."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_optim._upstream import BatchNorm
from lightning_optim.callbacks.judging import judging_copy, takes_index
from lightning_optim.callbacks.windowed import mro_names
from lightning_optim.checks import check_count
from lightning_optim.functional.noise_scale import gradient_moments, sample_efficiency

__all__ = ["GradientNoiseScale"]


class GradientNoiseScale(pl.Callback):
    """Measure the gradient noise scale ``tr(Σ) / |G|²`` in training, in samples.

    Far below it, twice the batch halves the steps; far above it, twice the batch wastes half of the samples. It comes
    from the gradients of two batch sizes: with gradient accumulation the first accumulated batch and their mean; under
    DDP one rank's batch and the mean over the ranks (no extra backward pass in either); on a single device without
    accumulation the first half of the batch, by a backward pass of its own that leaves no trace in model, optimizer,
    logs and random numbers. Training is the same with and without this callback.

    Args:
        every_n_steps: Optimizer steps between measurements.
        smoothing: How much of the earlier measurements stays in the mean of each of the two terms, in [0, 1). A single
            measurement is mostly noise.

    Logged: ``batch/noise_scale`` (samples), ``batch/critical_size``, the same as a whole number of at least 1: the
    global batch at which a run needs twice the fewest samples and twice the fewest steps; and ``batch/efficiency``,
    ``1 / (1 + B / noise_scale)``: which fraction of the present global batch's samples small batches would have needed.
    While the estimate of ``|G|²`` is not positive nothing is logged. The noise scale grows while the loss falls:
    judge by the later part of a run.

    The loss must be a mean over the samples of the batch. BatchNorm normalizes half a batch differently from the whole,
    so a batch that is split gives too large a noise scale, or none: a warning says so. Optimization must be automatic;
    strategies are one device and DDP.

    State: both means, so that a resumed run goes on bit for bit.

    Raises:
        ValueError: If ``every_n_steps`` is no positive number, or ``smoothing`` not in [0, 1).

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training".

    Examples:
        >>> import lightning.pytorch as pl
        >>> callback = GradientNoiseScale(every_n_steps=50)
        >>> trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> trainer.fit(module, datamodule=data)  # doctest: +SKIP
        >>> trainer.callback_metrics["batch/critical_size"]  # doctest: +SKIP
    """

    def __init__(self, *, every_n_steps: int = 50, smoothing: float = 0.9) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps)
        is_number = isinstance(smoothing, (int, float)) and not isinstance(smoothing, bool)
        if not is_number or not 0.0 <= smoothing < 1.0:
            raise ValueError(f"`smoothing` must be a fraction in [0, 1), got {smoothing!r}.")
        self.every_n_steps = every_n_steps
        self.smoothing = float(smoothing)
        self._squared = 0.0
        self._trace = 0.0
        self._weight = 0.0
        self._forget()

    def _forget(self) -> None:
        """Drop what a step has gathered so far."""
        self._handles: list[Any] = []
        self._parts: list[Tensor] = []
        self._small: Tensor | None = None
        self._rows = 0
        self._batches = 0
        self._split = False

    @property
    def noise_scale(self) -> float | None:
        """The smoothed noise scale in samples; None while it cannot be told."""
        if self._weight == 0.0 or self._squared <= 0.0:
            return None
        return max(self._trace, 0.0) / self._squared

    # Checks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what has no gradients of two batch sizes."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientNoiseScale reads the gradients of Lightning's own optimization, and this module optimizes "
                "manually. Take the callback out, or set automatic_optimization = True."
            )
        if not {"SingleDeviceStrategy", "DDPStrategy"} & mro_names(trainer.strategy):
            raise MisconfigurationException(
                f"GradientNoiseScale works on one device and with DDP, not with {type(trainer.strategy).__name__}. "
                "Measure on a few devices with DDP: the noise scale does not depend on the strategy."
            )

        if trainer.accumulate_grad_batches * trainer.world_size == 1 and any(
            isinstance(layer, BatchNorm) for layer in pl_module.modules()
        ):
            rank_zero_warn(
                "GradientNoiseScale splits batches on one device, and BatchNorm normalizes half a batch differently: "
                "the noise scale comes out too large, or cannot be told. Accumulate gradients: "
                "accumulate_grad_batches=2 with half of the batch."
            )

    # One step.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a measurement where one is due."""
        if batch_idx % trainer.accumulate_grad_batches:
            self._batches += 1
            return
        self._release()
        if trainer.global_step % self.every_n_steps:
            return
        self._rows, aligned = _rows_of(batch, trainer)
        self._batches = 1
        if trainer.accumulate_grad_batches * trainer.world_size > 1:
            return
        if self._rows < 2 or not aligned:
            what = "of one sample" if aligned else "whose tensors have different numbers of rows"
            raise MisconfigurationException(
                f"GradientNoiseScale compares two batch sizes, and a batch {what} cannot be split. Accumulate "
                "gradients (accumulate_grad_batches=2 with half of the batch), or train with DDP."
            )
        self._split = True
        self._small = _squared_norm_of_half(trainer, pl_module, batch, batch_idx, self._rows // 2)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Watch the gradients of one batch: under DDP hooks get them before the ranks are averaged."""
        if self._rows and self._batches == 1 and not self._split and self._small is None:
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._take))  # type: ignore[no-untyped-call]

    def _take(self, gradient: Tensor) -> None:
        self._parts.append(_squared(gradient))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up what was seen; Lightning divides the loss of an accumulated batch, and a scaler multiplies it."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        total = torch.stack(self._parts).sum() if self._parts else torch.zeros((), device=pl_module.device)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches / (scaler.get_scale() if scaler is not None else 1.0)
        self._small, self._handles, self._parts = total * factor**2, [], []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Compare with the gradient of the whole batch, before it is clipped."""
        small, rows, batches = self._small, self._rows, self._batches
        split, accumulated = self._split, trainer.accumulate_grad_batches
        self._release()
        if small is None or batches != accumulated:  # the last window of an epoch may be shorter
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        big = torch.stack([_squared(gradient) for gradient in gradients]).sum()
        means = torch.stack([small.to(big.device), big, torch.tensor(float(rows), device=big.device)])
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means, reduce_op="mean")
        small_norm, big_norm, mean_rows = means.tolist()
        global_batch = mean_rows * accumulated * trainer.world_size
        small_batch = rows // 2 if split else mean_rows
        self._add(*gradient_moments(small_norm, big_norm, small_batch=small_batch, big_batch=global_batch))
        self._log(trainer, pl_module, global_batch)

    def _add(self, squared: float, trace: float) -> None:
        """Take a measurement into both means; the first ones count for what they are (Adam's correction)."""
        before, self._weight = self._weight, self.smoothing * self._weight + 1.0 - self.smoothing
        kept, new = self.smoothing * before / self._weight, (1.0 - self.smoothing) / self._weight
        self._squared = kept * self._squared + new * squared
        self._trace = kept * self._trace + new * trace

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, global_batch: float) -> None:
        noise = self.noise_scale
        if noise is None or trainer.barebones:
            return
        metrics = {
            "batch/noise_scale": noise,
            "batch/critical_size": float(max(1, round(noise))),
            "batch/efficiency": sample_efficiency(global_batch, noise),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log_dict(metrics, logger=False)

    # The end, and the state.

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove hooks that are left."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove hooks that are left: Lightning calls no ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return both means as plain types."""
        return {"squared": self._squared, "trace": self._trace, "weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._squared, self._trace = state_dict["squared"], state_dict["trace"]
        self._weight = state_dict["weight"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_parts": [], "_small": None}


def _squared(gradient: Tensor) -> Tensor:
    values = gradient.detach()
    values = values.coalesce().values() if values.is_sparse else values
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm**2


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return [tensor for tensor in found if tensor.ndim]


def _rows_of(batch: Any, trainer: pl.Trainer) -> tuple[int, bool]:
    """Return the samples of a batch, and whether its tensors have one row for each."""
    sizes = {tensor.shape[0] for tensor in _tensors(batch)}
    if len(sizes) == 1:
        return sizes.pop(), True
    of_loader = getattr(trainer.train_dataloader, "batch_size", None)
    if not isinstance(of_loader, int):
        raise MisconfigurationException(
            f"GradientNoiseScale cannot tell the samples of a batch of {type(batch).__name__}: its tensors have "
            f"{', '.join(map(str, sorted(sizes))) or 'no'} rows, and the loader no `batch_size`. Let the loader return "
            "tensors with one row per sample."
        )
    return of_loader, False


def _squared_norm_of_half(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, rows: int
) -> Tensor:
    """Return the squared norm of the gradient of a batch's first rows, by a copy that shares the weights."""
    part = apply_to_collection(batch, Tensor, lambda tensor: tensor[:rows].clone() if tensor.ndim else tensor.clone())
    own = judging_copy(trainer, pl_module)
    for copied, original in zip(own.modules(), pl_module.modules(), strict=True):
        copied.training = original.training
    parameters = [parameter for parameter in own.parameters() if parameter.requires_grad]
    step: Any = own.training_step
    with isolate_rng(), torch.enable_grad(), trainer.precision_plugin.train_step_context():
        output = step(*((part, batch_idx) if takes_index(step) else (part,)))
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        return torch.full((), float("nan"), device=pl_module.device)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.stack([_squared(gradient) for gradient in gradients if gradient is not None]).sum()
