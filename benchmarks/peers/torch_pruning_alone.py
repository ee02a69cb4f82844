"""torch-pruning's own MagnitudePruner in a callback written by hand, as its README trains: step, new optimizer, go on.

The pruner follows the same cubic schedule (``iterative_pruning_ratio_scheduler``) at the steps of our events. After
each of its steps the parameters are other objects: the optimizer gets them and starts with an empty state, in place,
so that the learning-rate schedule goes on.
"""

from typing import Any

import lightning.pytorch as pl
import torch_pruning as tp
from task import END, START, Digits, Task, Trained, Variant, cubic, cut_at, work
from torch import nn

from lightning_optim.window import Window

EVENTS = 8
RATIO = 0.5


def steps_of(task: Task) -> list[int]:
    """Return the steps at which our callback prunes, but the first, where the schedule asks for nothing."""
    window = Window(START, END, events=EVENTS)
    window.resolve(task.steps() * task.epochs)
    return window.event_steps()[1:]


def build(module: nn.Module, task: Task, ignored: list[nn.Module]) -> Any:
    """Return its pruner of a dense model."""
    example = next(iter(task.loader(0)))
    inputs = example["inputs"] if isinstance(example, dict) else example[0][:2]
    events = len(steps_of(task))
    return tp.pruner.MagnitudePruner(
        module,
        inputs,
        tp.importance.GroupMagnitudeImportance(),
        global_pruning=isinstance(task, Digits),
        pruning_ratio=RATIO,
        iterative_steps=events,
        iterative_pruning_ratio_scheduler=lambda ratio, steps: [cubic(s / steps, ratio) for s in range(steps + 1)],
        ignored_layers=ignored,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )


def last_layer(module: nn.Module) -> list[nn.Module]:
    return [[layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]]


class Pruning(pl.Callback):
    """The callback that a user of the library writes."""

    def __init__(self, task: Task, pruner: Any = None) -> None:
        self.task, self.pruner, self.steps = task, pruner, set(steps_of(task))
        self.lengths: dict[int, int] = {}  # of the history after each step, which its user has to keep

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pruner is None:
            self.pruner = build(pl_module, self.task, last_layer(pl_module))
        pl_module.train()  # it leaves the model in eval mode

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step not in self.steps:
            return
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        (optimizer,) = trainer.optimizers
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self.pruner.step()
        self.lengths[trainer.global_step] = len(self.pruner.pruning_history())
        pl_module.train()
        parameters = dict(pl_module.named_parameters())
        for group, members in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [parameters[name] for name in members]
        optimizer.state.clear()


def replayed(module: pl.LightningModule, task: Task, run: Trained) -> list[pl.Callback]:
    """Bring a fresh model to the widths of the checkpoint, with the pruning history that a user must have kept."""
    finished = next(callback for callback in run.callbacks if isinstance(callback, Pruning))
    cut = task.steps() * cut_at(task, 0.5)
    done = [length for step, length in finished.lengths.items() if step <= cut]
    pruner = build(module, task, last_layer(module))
    pruner.load_pruning_history(finished.pruner.pruning_history()[: done[-1]])
    pruner.current_step = len(done)
    module.train()
    return [Pruning(task, pruner)]


def replayed_with_counts(module: pl.LightningModule, task: Task, run: Trained) -> list[pl.Callback]:
    """Restore also how many channels there were at first, which the pruner counts at its first step."""
    finished = next(callback for callback in run.callbacks if isinstance(callback, Pruning))
    (callback,) = replayed(module, task, run)
    callback.pruner._scope_initial_channels = dict(finished.pruner._scope_initial_channels)
    return [callback]


VARIANTS = [
    Variant(
        "torch-pruning 50%",
        "channel pruning, 50%",
        lambda task: [Pruning(task)],
        by_hand={
            "pruning_history and current_step kept by the user and replayed on the dense model before fit": replayed,
            "the same, and the private _scope_initial_channels copied": replayed_with_counts,
        },
    ),
]


if __name__ == "__main__":
    work(VARIANTS)
