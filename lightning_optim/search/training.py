"""One trial: trains the model by its recipe, and measures it beside the dense one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_optim.callbacks.base import callbacks_of
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.checkpoint import load_from_checkpoint
from lightning_optim.modules import copy_module
from lightning_optim.recipe import Recipe
from lightning_optim.report.columns import Row
from lightning_optim.report.comparison import compare
from lightning_optim.sharding import is_sharded
from lightning_optim.target import ForwardInputs, find_target

__all__ = ["Measured", "Setting"]

Evaluate = Callable[[Any], float | Mapping[str, float]]

DENSE_NAME = "dense"


@dataclass
class Measured:
    """What a trial gave.

    Attributes:
        row: Its row of the comparison with the dense model.
        notes: Of the comparison.
    """

    row: Row
    notes: list[str]


@dataclass
class Setting:
    """What all trials of a search have in common.

    Attributes:
        make_module: Returns a new LightningModule.
        make_trainer: Returns a new Trainer.
        evaluate: Function of a model, as :func:`~lightning_optim.compare` takes it.
        data: Arguments of ``fit``.
        teacher: For recipes that distill.
        example_inputs: Of the forward; None: caught from the first batch.
        options: Of :func:`~lightning_optim.compare`.
        accuracy: Name of the metric that ``evaluate`` returns as a bare number.
        seed: Of every trial's training.
    """

    make_module: Callable[[], pl.LightningModule]
    make_trainer: Callable[..., pl.Trainer]
    evaluate: Evaluate
    data: Mapping[str, Any]
    teacher: Any
    example_inputs: Any
    options: Mapping[str, Any]
    accuracy: str
    seed: int
    _inputs: "tuple[str, ForwardInputs] | None" = field(default=None, init=False)

    def train(
        self,
        recipe: Recipe,
        number: int,
        watching: Sequence[pl.Callback] = (),
        begin: Callable[[pl.Trainer], None] | None = None,
    ) -> tuple[pl.LightningModule, pl.Trainer]:
        """Train a new module by a recipe; every trial begins with the same random numbers.

        Args:
            recipe: Empty for the dense model.
            number: Of the trial, which has a folder of its own below the recipe's ``checkpoint: dirpath``.
            watching: More callbacks.
            begin: Called with the Trainer before it fits.

        Returns:
            The fitted module, which may be a DistillationModule around the student, and its Trainer.
        """
        pl.seed_everything(self.seed, workers=True, verbose=False)
        module = self.make_module()
        if not isinstance(module, nn.Module):
            raise TypeError(f"`make_module` must return a LightningModule, got {type(module).__name__}.")
        wrapped = recipe.wrap(module, self.teacher) if recipe.distillation is not None else module
        recipe = _in_own_folder(recipe, number)
        batch_size = self.options.get("batch_size", 32)
        catch = _Catch(InputSource(self.example_inputs, batch_size or 1))
        callbacks = [*recipe.callbacks(example_inputs=self.example_inputs), *watching, catch]
        trainer = self._trainer(callbacks)
        if begin is not None:
            begin(trainer)
        trainer.fit(wrapped, **self.data)
        if trainer.interrupted:
            raise KeyboardInterrupt
        self._inputs = catch.found or self._inputs
        return wrapped, trainer

    def result(self, module: pl.LightningModule, trainer: pl.Trainer, recipe: Recipe) -> pl.LightningModule:
        """Return what a run results in: what the recipe's checkpoint kept, if it has one, else the last weights."""
        for callback in callbacks_of(trainer):
            path = getattr(callback, "best_model_path", "")
            if recipe.checkpoint is not None and type(callback).__name__ == "CompressedCheckpoint" and path:
                fresh = self.make_module()
                wrapped = recipe.wrap(fresh, self.teacher) if recipe.distillation is not None else fresh
                best: pl.LightningModule = load_from_checkpoint(wrapped, path)
                return best
        return module

    def _trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        """Make a Trainer with these callbacks: passed to ``make_trainer`` where it takes any, else added."""
        how = _takes_callbacks(self.make_trainer)
        if how == "keyword":
            trainer = self.make_trainer(callbacks=callbacks)
        else:
            trainer = self.make_trainer(callbacks) if how == "position" else self.make_trainer()
        if not hasattr(trainer, "fit"):
            raise TypeError(f"`make_trainer` must return a Trainer, got {type(trainer).__name__}.")
        there = callbacks_of(trainer)
        if how:
            missing = [callback for callback in callbacks if not any(callback is other for other in there)]
            if missing:
                raise ValueError(
                    f"`make_trainer` takes callbacks, and its Trainer has no {type(missing[0]).__name__}. Pass them "
                    "on: Trainer(callbacks=callbacks, ...)."
                )
        else:
            last = [callback for callback in there if isinstance(callback, pl.callbacks.Checkpoint)]
            own = [callback for callback in there if callback not in last]
            late = [callback for callback in callbacks if isinstance(callback, pl.callbacks.Checkpoint)]
            rest = [callback for callback in callbacks if callback not in late]
            trainer.callbacks = [*own, *rest, *last, *late]  # type: ignore[attr-defined]  # checkpoints act last
        return trainer

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of a module that may still be in training."""
        with isolate_rng(), torch.no_grad():
            found = self.evaluate(copy_module(find_target(model)[1]))
        metrics = found if isinstance(found, Mapping) else {self.accuracy: found}
        return {str(name): float(value) for name, value in metrics.items()}

    def accuracy_of(self, model: nn.Module) -> float:
        """Return the accuracy of a module that may still be in training."""
        return self.score(model)[self.accuracy]

    def measure(self, module: nn.Module, *, dense: bool) -> Measured:
        """Compare a trained model with the dense one.

        The dense model's times do not depend on its weights, so that an untrained one stands for it.
        """
        target = find_target(module)[1]
        if is_sharded(target):
            raise MisconfigurationException(
                "`search` measures whole models, and the strategy of this Trainer divides them. Use DDP or one device."
            )
        metrics = self.score(target)
        if self._inputs is None:
            raise ValueError("no inputs of the model's forward were caught in training. Pass `example_inputs`.")
        layer, inputs = self._inputs
        models = {DENSE_NAME: target} if dense else {DENSE_NAME: self._reference(target), "trial": target}
        with isolate_rng():
            report = compare(
                {name: model.get_submodule(layer) for name, model in models.items()},
                inputs.kwargs or inputs.args,
                evaluate=lambda model: dict(metrics),
                accuracy=self.accuracy,
                progress_bar=False,
                **self.options,
            )
        return Measured(report.rows[-1], report.notes)

    def _reference(self, like: nn.Module) -> nn.Module:
        with isolate_rng():
            pl.seed_everything(self.seed, verbose=False)
            module = self.make_module()
            with suppress(RuntimeError):  # a hook that asks for a Trainer: layers made there are missed below
                module.configure_model()
        device = next((parameter.device for parameter in like.parameters()), torch.device("cpu"))
        return module.to(device).eval()


class _Catch(pl.Callback):
    """Catches what the model's forward receives."""

    def __init__(self, source: InputSource) -> None:
        self._source = source
        self.found: tuple[str, ForwardInputs] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take what is given, or what the module declares."""
        self._source.prepare(pl_module, "search")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch a batch while nothing is known."""
        self._source.begin_batch(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read what was caught."""
        self._source.end_batch(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the inputs, with the name of the module that takes them below the target."""
        if self._source.inputs is not None:
            prefix = find_target(pl_module)[0]
            self.found = f"{self._source.layer}.".removeprefix(prefix).rstrip("."), self._source.inputs
        self._source.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._source.release()


def _in_own_folder(recipe: Recipe, number: int) -> Recipe:
    """Let the checkpoints of a trial not lie among those of others."""
    arguments = recipe.checkpoint or {}
    if arguments.get("dirpath") is None:
        return recipe
    return replace(recipe, checkpoint={**arguments, "dirpath": str(Path(arguments["dirpath"]) / f"trial_{number}")})


def _takes_callbacks(make_trainer: Callable[..., Any]) -> str:
    """Return whether a function takes callbacks: by "keyword", by "position", or not ("")."""
    parameters = inspect.signature(make_trainer).parameters
    if "callbacks" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return "keyword"
    needed = [each for each in parameters.values() if each.default is each.empty]
    return "position" if len(needed) == 1 and needed[0].kind is not needed[0].VAR_POSITIONAL else ""
