"""PerformanceScore: the score P of the model at the end of every epoch, as it would be deployed."""

import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchmetrics import Metric

from lightning_optim import checkpoint
from lightning_optim.callbacks.base import callbacks_of, compressions
from lightning_optim.callbacks.inference_time import InferenceTime
from lightning_optim.callbacks.logged import MetricsSince
from lightning_optim.callbacks.monitors import check_score_is_known
from lightning_optim.callbacks.score_table import MEASURED, ScoreRow, score_table
from lightning_optim.callbacks.validation_metric import ValidationMetric, WithMetric, check_metric
from lightning_optim.checks import check_choice, check_count, check_fraction
from lightning_optim.functional.score import (
    Terms,
    checked_references,
    checked_weights,
    guarded,
    performance_score,
)
from lightning_optim.measure.size import SIZES
from lightning_optim.sharding import reshard
from lightning_optim.strategies.common import check_supported
from lightning_optim.target import find_target

__all__ = ["PerformanceScore"]


class PerformanceScore(WithMetric):
    """Compute the score P at the end of every validated epoch; lower is better.

    ``P = wS*S/Sref + wTtrain*Ttrain/Tref + wTinfer*Tinfer/Tref + wA*(1 - A)``: size S, training time of the epoch,
    inference time of one call, accuracy A on held-out data. With ``reference="raw"`` this is the source's formula to
    the letter. Without a floor under the accuracy the formula prefers an empty model: set ``max_drop`` or
    ``min_accuracy`` and choose by ``P``, never by ``P/unguarded``.

    Args:
        accuracy: Name of the held-out metric, as the LightningModule logs it in validation. Only the value of this
            epoch's validation counts: an epoch whose validation does not log it has no P (NaN, infeasible). Or a
            ``torchmetrics.Metric``, for modules that log none: it is updated with the model's outputs in
            validation_step and the batch's labels.
        mode: ``"max"``: the metric is an accuracy in [0, 1]; ``"min"`` or ``"loss"``: it stands for 1 - A.
        weights: Of ``size``, ``train_time``, ``inference_time``, ``accuracy``: non-negative numbers, used as they
            are; what is missing is 0 and not measured. None is the source's example for a recommender (0.4, 0, 0.6,
            0.1).
        reference: ``"baseline"``: the model as it was at fit start (training time: the first epoch after the warm-up
            epoch and before any compression event; the warm-up epoch itself where there is none); ``"raw"``: all 1;
            or a dict of ``size``, ``train_time`` (s), ``inference_time`` (ms).
        size: ``"parameters"``, ``"nonzero"`` or ``"bits"`` (parameters times their bits, over 32).
        max_drop: A model whose accuracy is more than this below the best seen before the compression began is
            infeasible.
        min_accuracy: A model below this accuracy is infeasible.
        until_reached: ``"infeasible"``: a model is infeasible until every compression callback reached its end;
            ``"score"``: it is scored as it is.
        batch_size: Rows in the timed call.
        every_n_epochs: Epochs between scores.
        example_inputs: What the LightningModule's forward receives (tensor, tuple or dict of keywords), taken as it
            is. Default: its ``example_input_array``, else caught from the first training batch and cut to
            ``batch_size`` rows.

    Logged: ``P`` (an infeasible model's is ``1000 * (P + 1)``), ``P/unguarded``, ``P/shown`` (NaN for an
    infeasible model: a curve that its 1000s do not squash), ``P/feasible``, the ratios
    ``P/size``, ``P/train_time``, ``P/inference_time`` and ``P/error``, and ``P/raw/size``, ``P/raw/train_time_s``,
    ``P/raw/inference_time_ms``, ``P/raw/accuracy``. An epoch without validation has no P. Where P is NaN (a term with
    weight, or the accuracy, is missing or NaN) the model is infeasible.

    How it is measured: training time is the wall time of the epoch without validation, without this callback's own
    work and without the events of the compression callbacks. Inference time is the median ratio over eight rounds of
    interleaved calls of the model and of a frozen copy (in a round each the mean of its faster calls, with its weights
    at a new place in memory), on one thread in eval mode and full precision of the stored weights (no autocast, not
    compiled); weights, RNG and BatchNorm statistics are not touched. Under DDP rank 0 measures.

    State: references, best accuracy and the rows of the final table, so a resumed run keeps its baseline. The copy
    costs the model's memory once more. Where the strategy divides the model, rank 0 keeps two whole copies on its CPU
    and measures one of them with the gathered weights; where they do not fit, P is NaN and a warning says so.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a name is unknown, a number is out of range, or ``reference`` lacks a term that has weight.

    Examples:
        >>> from lightning_optim import CompressedCheckpoint, WeightPruning
        >>> callbacks = [
        ...     WeightPruning(0.8),
        ...     PerformanceScore("val_acc", size="nonzero", max_drop=0.01),
        ...     CompressedCheckpoint(monitor="P"),
        ... ]
    """

    def __init__(
        self,
        accuracy: str | Metric = "val_acc",
        *,
        mode: Literal["max", "min", "loss"] = "max",
        weights: Mapping[str, float] | None = None,
        reference: Literal["baseline", "raw"] | dict[str, float] = "baseline",
        size: str = "parameters",
        max_drop: float | None = None,
        min_accuracy: float | None = None,
        until_reached: Literal["infeasible", "score"] = "infeasible",
        batch_size: int = 1,
        every_n_epochs: int = 1,
        example_inputs: Any = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("max", "min", "loss"))
        if not isinstance(accuracy, str) or not accuracy:
            check_metric(accuracy, mode, "PerformanceScore")
            self._metric = ValidationMetric(accuracy, "PerformanceScore")  # type: ignore[arg-type]
        check_choice("until_reached", until_reached, ("infeasible", "score"))
        check_fraction("max_drop", max_drop)
        check_fraction("min_accuracy", min_accuracy)
        check_count("batch_size", batch_size)
        check_count("every_n_epochs", every_n_epochs)
        self.accuracy = accuracy if isinstance(accuracy, str) else type(accuracy).__name__
        self.mode = mode
        self.weights = checked_weights(weights)
        self.reference = _checked_reference(reference, self.weights)
        self.size = SIZES.resolve(size)
        self.max_drop = max_drop
        self.min_accuracy = min_accuracy
        self.until_reached = until_reached
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.example_inputs = example_inputs
        self._fitted: tuple[Any, Any] | None = None
        self._restored = False
        self._inference = InferenceTime(example_inputs, batch_size)
        self._forget()

    def _forget(self) -> None:
        """Begin a new run: no references, no rows."""
        self._references: dict[str, float] = {}
        self._reference_plan: dict[str, Any] = dict(checkpoint.EMPTY)
        self._train_reference_is_warm_up = True
        self._dense_accuracy: float | None = None
        self._best: ScoreRow | None = None
        self._last: ScoreRow | None = None
        self._epochs = 0
        self._event_seconds = 0.0
        self._accuracy_logged = False
        self._drop_measurements()

    def _drop_measurements(self) -> None:
        self._inference = self._inference.anew()
        self._began = 0.0
        self._validation_began = 0.0
        self._not_training = 0.0
        self._events_before = 0.0
        self._validated = False
        self._logged = MetricsSince()
        self._validation: dict[str, torch.Tensor] = {}

    # Checks before the first step.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what could only give a wrong or stale P."""
        if stage != "fit":
            return
        if trainer.barebones:
            raise MisconfigurationException(
                "PerformanceScore reads the logged accuracy, and Trainer(barebones=True) logs nothing. Take the "
                "callback out, or train without barebones."
            )
        check_supported("PerformanceScore", trainer.strategy)
        for callback in callbacks_of(trainer):
            check_score_is_known(trainer, callback, self.every_n_epochs)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the references from the model as it is, unless the run goes on."""
        goes_on = self._fitted is not None and (self._fitted[0]() is trainer and self._fitted[1]() is pl_module)
        self._fitted = None  # until this fit has really started
        if not self._restored and not goes_on:
            self._forget()
            self._references = dict(self.reference) if isinstance(self.reference, dict) else {}
            if self.reference == "baseline":
                self._references["size"] = self.size(find_target(pl_module)[1])
            self._reference_plan = checkpoint.plain_plan(pl_module)
        self._drop_measurements()
        if self.weights["inference_time"] > 0:
            self._inference.prepare(pl_module, self._reference_plan if self.reference == "baseline" else None)
        self._fitted = (weakref.ref(trainer), weakref.ref(pl_module))

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a whole copy on rank 0: a model that is divided is neither copied nor called by one rank alone."""
        self._inference.whole = None
        if trainer.state.fn == "fit" and self.weights["inference_time"] > 0 and trainer.is_global_zero:
            self._inference.keep_whole(trainer, pl_module)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the accuracy's name before the first step, where the sanity check logged anything."""
        logged = trainer.callback_metrics
        if self._metric is not None:
            return
        if logged and self.accuracy not in logged:
            raise MisconfigurationException(self._unknown_name(logged))
        self._accuracy_logged = self._accuracy_logged or self.accuracy in logged

    def _unknown_name(self, logged: Mapping[str, Any]) -> str:
        names = ", ".join(sorted(logged)) or "nothing"
        return (
            f"PerformanceScore(accuracy={self.accuracy!r}): validation logged {names}. "
            "Log the held-out accuracy in validation_step with self.log, or name one that is logged."
        )

    # Times.

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()
        self._not_training = 0.0
        self._validated = False
        self._validation = {}
        self._events_before = _event_seconds(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Catch what forward receives from the first batch, where no example was given."""
        if self.weights["inference_time"] > 0:
            self._inference.inputs.begin_batch(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read what was caught."""
        self._inference.inputs.end_batch(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock; what was logged before is not of this validation."""
        self._validation_began = time.perf_counter()
        self._logged.begin(trainer)
        if self._metric is not None:
            self._metric.begin(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock; note what this validation logged."""
        if not trainer.sanity_checking:
            self._not_training += time.perf_counter() - self._validation_began
            self._validated = True
            self._validation = self._logged.read(trainer)
            value = None if self._metric is None else self._metric.value()
            if value is not None:
                self._validation[self.accuracy] = torch.tensor(value)

    # The score.

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, score and log; nothing in an epoch without validation."""
        train_seconds = self._train_seconds(trainer)
        self._epochs += 1
        self._take_train_reference(trainer, train_seconds)
        if not self._validated or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        accuracy = self._read_accuracy()
        reshard(pl_module)
        raw = {
            "size": self.size(find_target(pl_module)[1]) if self.weights["size"] > 0 else None,
            "train_time": train_seconds if self.weights["train_time"] > 0 else None,
        }
        ratios = {name: self._ratio(name, value) for name, value in raw.items()}
        ratios["inference_time"] = raw["inference_time"] = None
        if self.weights["inference_time"] > 0:
            one_call = self._references.get("inference_time", 1.0)
            measured = self._inference.measure(trainer, pl_module, one_call, train_seconds)
            ratios["inference_time"], raw["inference_time"] = measured
        terms = Terms(**ratios, error=1.0 - accuracy)
        score = math.nan if math.isnan(accuracy) else performance_score(terms, self.weights)
        if not math.isfinite(score) and self.accuracy in self._validation:
            rank_zero_warn(
                f"P is {score} at epoch {trainer.current_epoch} ({terms}): a term that has weight could not be "
                "measured, or the accuracy is NaN. EarlyStopping on P stops here unless check_finite=False."
            )
        feasible = self._is_feasible(trainer, accuracy) and math.isfinite(score)
        self._last = ScoreRow(trainer.current_epoch, score, feasible, **asdict(terms))
        if feasible and (self._best is None or score < self._best.score):
            self._best = self._last
        self._log(pl_module, terms, raw, accuracy, score, feasible)

    def _train_seconds(self, trainer: pl.Trainer) -> float:
        elapsed = time.perf_counter() - self._began - self._not_training
        elapsed -= _event_seconds(trainer) - self._events_before
        if trainer.world_size > 1:
            seconds = torch.tensor(elapsed, device=trainer.strategy.root_device)
            elapsed = float(trainer.strategy.reduce(seconds, reduce_op="max"))
        return elapsed

    def _take_train_reference(self, trainer: pl.Trainer, seconds: float) -> None:
        """Take the warm-up epoch until there is a later one before the first event."""
        if self.reference != "baseline" or self.weights["train_time"] == 0:
            return
        if self._epochs == 1:
            self._references["train_time"] = seconds
        elif self._train_reference_is_warm_up and _event_seconds(trainer) == 0.0:
            self._references["train_time"] = seconds
            self._train_reference_is_warm_up = False

    def _read_accuracy(self) -> float:
        """Return the accuracy that this epoch's validation logged, NaN where only earlier ones logged it."""
        if self.accuracy not in self._validation:
            if not self._accuracy_logged:
                raise MisconfigurationException(self._unknown_name(self._validation))
            rank_zero_warn(
                f"PerformanceScore(accuracy={self.accuracy!r}): validation does not log it in every epoch. Epochs "
                "without it have no P: it is logged as NaN and infeasible, and EarlyStopping on P stops there unless "
                "check_finite=False. Log it in every validation, or validate every n epochs (check_val_every_n_epoch)."
            )
            return math.nan
        self._accuracy_logged = True
        value = float(self._validation[self.accuracy])
        if self.mode != "max":
            return 1.0 - value
        if not math.isnan(value) and not 0.0 <= value <= 1.0:
            raise ValueError(
                f"PerformanceScore(accuracy={self.accuracy!r}): an accuracy is in [0, 1], got {value:g}. Divide "
                "percent by 100; for a loss pass mode='loss'."
            )
        return value

    def _ratio(self, name: str, value: float | None) -> float | None:
        return None if value is None else value / self._references.get(name, 1.0)

    def _is_feasible(self, trainer: pl.Trainer, accuracy: float) -> bool:
        windows = [callback.window for callback in compressions(trainer)]
        begun = any(window.last_event >= 0 and window.progress() > 0.0 for window in windows)
        if not math.isnan(accuracy) and (not begun or self._dense_accuracy is None):
            self._dense_accuracy = max(accuracy, accuracy if self._dense_accuracy is None else self._dense_accuracy)
        if self.until_reached == "infeasible" and not all(callback.reached_end for callback in compressions(trainer)):
            return False
        if self.min_accuracy is not None and not accuracy >= self.min_accuracy:
            return False
        return self.max_drop is None or accuracy >= (self._dense_accuracy or 0.0) - self.max_drop

    def _log(
        self,
        pl_module: pl.LightningModule,
        terms: Terms,
        raw: Mapping[str, float | None],
        accuracy: float,
        score: float,
        feasible: bool,
    ) -> None:
        metrics: dict[str, float | None] = {
            "P": guarded(score, feasible),
            "P/unguarded": score,
            "P/shown": score if feasible else math.nan,
            "P/feasible": float(feasible),
            "P/raw/size": raw["size"],
            "P/raw/train_time_s": raw["train_time"],
            "P/raw/inference_time_ms": raw["inference_time"],
            "P/raw/accuracy": accuracy,
            **{f"P/{name}": value for name, value in asdict(terms).items()},
        }
        known = {name: torch.tensor(value) for name, value in metrics.items() if value is not None}
        pl_module.log_dict(known, sync_dist=True)

    # The end of a run.

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table of the terms at baseline, best and last."""
        if self._last is not None:
            is_baseline, times = self.reference == "baseline", self.weights["train_time"] > 0
            rank_zero_info(
                score_table(
                    self._best,
                    self._last,
                    self.weights,
                    dense_accuracy=self._dense_accuracy if is_baseline else None,
                    against_warm_up=is_baseline and times and self._train_reference_is_warm_up,
                )
            )
        elif self._epochs >= self.every_n_epochs:
            rank_zero_warn("PerformanceScore computed no P: no epoch was validated. Pass a validation loader.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the reference copy."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Free the reference copy: Lightning calls no ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        if self._metric is not None:
            self._metric.close()
        self._inference.release()
        self._drop_measurements()
        self._restored = False

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return references and rows as plain types."""
        return {
            "references": dict(self._references),
            "reference_plan": dict(self._reference_plan),
            "train_reference_is_warm_up": self._train_reference_is_warm_up,
            "dense_accuracy": self._dense_accuracy,
            "best": None if self._best is None else asdict(self._best),
            "last": None if self._last is None else asdict(self._last),
            "epochs": self._epochs,
            "accuracy_logged": self._accuracy_logged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._references = dict(state_dict["references"])
        self._reference_plan = dict(state_dict["reference_plan"])
        self._train_reference_is_warm_up = state_dict["train_reference_is_warm_up"]
        self._dense_accuracy = state_dict["dense_accuracy"]
        self._best = None if state_dict["best"] is None else ScoreRow(**state_dict["best"])
        self._last = None if state_dict["last"] is None else ScoreRow(**state_dict["last"])
        self._epochs = state_dict["epochs"]
        self._accuracy_logged = state_dict.get("accuracy_logged", self._last is not None)  # not in files of 0.1
        self._restored = bool(self._references) or self.reference == "raw"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fitted": None, "_inference": InferenceTime(self.example_inputs, self.batch_size)}


def _event_seconds(trainer: pl.Trainer) -> float:
    return sum(callback.event_seconds for callback in compressions(trainer))


def _checked_reference(reference: Any, weights: Mapping[str, float]) -> str | dict[str, float]:
    if isinstance(reference, str):
        check_choice("reference", reference, ("baseline", "raw"))
        return reference
    if not isinstance(reference, Mapping):
        raise TypeError(f"`reference` must be 'baseline', 'raw' or a dict of numbers, got {reference!r}.")
    found = checked_references(reference)
    missing = [name for name in MEASURED if weights[name] > 0 and name not in reference]
    if missing:
        raise ValueError(f"`reference` lacks {', '.join(missing)}, which has weight in P. Give all terms with weight.")
    return {name: found[name] for name in reference}
