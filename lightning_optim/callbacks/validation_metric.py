"""A metric of torchmetrics that a callback computes in validation, for modules that log none."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_optim.distillation.positions import find_labels, find_logits, named_inputs
from lightning_optim.target import ForwardInputs, find_target, is_redirected, named_layers

__all__ = ["ValidationMetric", "WithMetric", "check_metric"]


class ValidationMetric:
    """Updates a metric with what the target returns in the validation step, and the batch's labels.

    The output is that of the last call of the target's forward in the step; where the step calls parts of the target
    instead (``self.net(x)``), that of the last part it calls.

    Args:
        metric: A metric of torchmetrics with one value.
        user: How messages begin.
    """

    def __init__(self, metric: Metric, user: str) -> None:
        self.metric = metric
        self.name = type(metric).__name__
        self._user = user
        self._handles: list[Any] = []
        self._calls: list[tuple[nn.Module, ForwardInputs, Any]] = []
        self._open: list[nn.Module] = []
        self._updates = 0

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Begin a validation."""
        self.metric.to(pl_module.device)
        self.metric.reset()
        self._updates = 0

    def begin_batch(self, pl_module: pl.LightningModule) -> None:
        """Watch the calls of a batch."""
        self.close()
        for _, layer in named_layers(find_target(pl_module)[1]):
            self._handles.append(layer.register_forward_pre_hook(self._enter))
            self._handles.append(layer.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    def _enter(self, layer: nn.Module, args: Any) -> None:
        if not is_redirected(layer):  # DDP's call of the step itself
            self._open.append(layer)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._open or self._open[-1] is not layer:
            return
        self._open.pop()
        if not self._open:
            self._calls.append((layer, ForwardInputs(args, kwargs), output))

    def end_batch(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Update the metric with a batch."""
        calls, target = self._calls, find_target(pl_module)[1]
        self.close()
        own = [call for call in calls if call[0] is target] or calls
        if not own:
            raise MisconfigurationException(
                f"{self._user}: validation_step never called the model, so {self.name} has no outputs. Call self(...) "
                "in validation_step, or log the metric there and pass its name."
            )
        called, inputs, output = own[-1]
        outputs, labels = find_logits(output), find_labels(batch, named_inputs(called, inputs))
        if outputs is None or not isinstance(labels, Tensor):
            what = "no tensor in the model's output" if outputs is None else "no labels in the batch"
            raise MisconfigurationException(
                f"{self._user}: there is {what} for {self.name}. Log the metric in validation_step and pass its name."
            )
        self._update(outputs.detach(), labels)

    def _update(self, outputs: Tensor, labels: Tensor) -> None:
        predictions, targets = _as_taken(outputs, labels, self.metric)
        try:
            self.metric.update(predictions, targets)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise MisconfigurationException(
                f"{self._user}: {self.name} does not fit outputs {list(outputs.shape)} ({_kind(outputs)}) and labels "
                f"{list(labels.shape)} ({_kind(labels)}): {' '.join(str(error).split())}"
            ) from error
        self._updates += 1

    def value(self) -> float | None:
        """Return the metric over the validation, on all ranks the same; None if no batch was seen."""
        if not self._updates:
            return None
        value = self.metric.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MisconfigurationException(
                f"{self._user}: {self.name} must give one number, got {shape}. Let it average (average='macro')."
            )
        return float(value)

    def close(self) -> None:
        """Remove the hooks, and forget what was caught."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._open = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_calls": [], "_open": []}


class WithMetric(pl.Callback):
    """A callback that may compute a metric of its own in validation."""

    _metric: ValidationMetric | None = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch what the model returns."""
        if self._metric is not None:
            self._metric.begin_batch(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metric."""
        if self._metric is not None:
            self._metric.end_batch(pl_module, batch)


def _as_taken(outputs: Tensor, labels: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return outputs and labels as the metrics of torchmetrics take them.

    A last dimension of 1 that only one of them has is dropped. Metrics of classification take whole numbers as labels
    (BCE takes floats), and the classes as dimension 1.
    """
    if outputs.shape == (*labels.shape, 1):
        outputs = outputs.squeeze(-1)
    elif labels.shape == (*outputs.shape, 1):
        labels = labels.squeeze(-1)
    if any(cls.__module__.startswith("torchmetrics.classification") for cls in type(metric).__mro__):
        if labels.is_floating_point() and bool((labels == labels.round()).all()):
            labels = labels.long()
        if outputs.ndim > 2 and outputs.ndim == labels.ndim + 1 and outputs.shape[:-1] == labels.shape:
            outputs = outputs.movedim(-1, 1)
    return outputs, labels


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_metric(metric: Any, mode: str, user: str) -> None:
    """Check that a metric has one value, and a direction that goes with ``mode``.

    Raises:
        TypeError: If it is neither a name nor a metric.
        ValueError: If lower values of it are better and ``mode`` is "max", or the other way round.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"`accuracy` must be the name of a logged metric or a torchmetrics.Metric, got {metric!r}.")
    if metric.higher_is_better is not None and metric.higher_is_better != (mode == "max"):
        better = "higher" if metric.higher_is_better else "lower"
        other = "max" if metric.higher_is_better else "min"
        raise ValueError(f"{user}: {better} values of {type(metric).__name__} are better. Pass mode={other!r}.")
