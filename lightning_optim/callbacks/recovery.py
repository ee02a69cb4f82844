"""What helps a model recover after channels left: BatchNorm statistics averaged anew, and rising learning rates."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_optim._upstream import BatchNorm

__all__ = ["Recovery"]


class Recovery:
    """The time since the last removal, and what is done in it.

    Args:
        recalibrate_batches: BatchNorm's running statistics become the plain mean over this many batches.
        warmup_steps: Learning rates rise from 0 over this many steps.
    """

    def __init__(self, recalibrate_batches: int, warmup_steps: int) -> None:
        self.recalibrate_batches = recalibrate_batches
        self.warmup_steps = warmup_steps
        self.removed_at: int | None = None
        self.batches_since = 0
        self._momenta: list[tuple[Any, float | None]] = []
        self._warm_ups: list[_WarmUp] = []

    def begin(self, step: int) -> None:
        """Channels were removed at a step."""
        self.removed_at, self.batches_since = step, 0

    def begin_batch(self, target: nn.Module) -> None:
        """Let this batch's BatchNorm statistics enter a plain mean: momentum 1, 1/2, 1/3 ..."""
        if self.removed_at is None or self.batches_since >= self.recalibrate_batches:
            return
        for layer in target.modules():
            if isinstance(layer, BatchNorm) and layer.track_running_stats:
                self._momenta.append((layer, layer.momentum))
                layer.momentum = 1 / (self.batches_since + 1)
        self.batches_since += 1

    def end_batch(self) -> None:
        """Restore BatchNorm's momenta."""
        for layer, momentum in self._momenta:
            layer.momentum = momentum
        self._momenta = []

    def warmth(self, step: int) -> float:
        """Return the factor on the learning rates of the step after ``step``, in (0, 1]."""
        if self.removed_at is None or self.warmup_steps == 0:
            return 1.0
        return min(1.0, (step - self.removed_at + 1) / (self.warmup_steps + 1))

    def warm_up(self, optimizers: Iterable[Optimizer], step: Callable[[], int]) -> list[Any]:
        """Let the optimizers' learning rates follow :meth:`warmth`; returns handles that end it."""
        if not self.warmup_steps:
            return []
        self._warm_ups = [_WarmUp(optimizer, lambda: self.warmth(step())) for optimizer in optimizers]
        return [
            handle
            for warm_up in self._warm_ups
            for handle in (
                warm_up.optimizer.register_step_pre_hook(warm_up.before),
                warm_up.optimizer.register_step_post_hook(warm_up.after),
            )
        ]

    def release(self) -> None:
        """Restore momenta and learning rates; a step that failed on its way left lower ones."""
        self.end_batch()
        for warm_up in self._warm_ups:
            warm_up.restore()
        self._warm_ups = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_momenta": [], "_warm_ups": []}


class _WarmUp:
    """Lowers an optimizer's learning rates for one step, so that schedulers never see it."""

    def __init__(self, optimizer: Optimizer, warmth: Callable[[], float]) -> None:
        self.optimizer = optimizer
        self._warmth = warmth
        self._rates: list[Any] = []

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._warmth()

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
