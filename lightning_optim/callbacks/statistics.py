"""The statistics of one criterion in a running fit: when they are collected, and on which process."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.change import Changed
from lightning_optim.functional.statistics import STATISTICS, Collector
from lightning_optim.modules import is_compiled, is_inside_compiled
from lightning_optim.target import Weight

__all__ = ["Collected"]

Resize = Callable[[str, Tensor], Tensor]
"""From the part of a weight's tensor that this process holds to the whole, or back; by the weight's name."""


class Collected:
    """What a criterion needs besides the weights, collected since the last event.

    Args:
        needs: Names that the criterion asks for.
    """

    def __init__(self, needs: Collection[str]) -> None:
        self._collectors: dict[str, Collector] = {name: STATISTICS[name]() for name in STATISTICS if name in needs}
        self._handles: list[Any] = []
        self._whole = False

    def __bool__(self) -> bool:
        return bool(self._collectors)

    @property
    def elementwise(self) -> bool:
        """Whether every statistic has one number per weight."""
        return all(collector.elementwise for collector in self._collectors.values())

    @property
    def reads_inputs(self) -> bool:
        """Whether a statistic is read from the layers' inputs."""
        return any(collector.reads_inputs for collector in self._collectors.values())

    @property
    def watching(self) -> bool:
        """Whether inputs are watched now."""
        return bool(self._handles)

    def check(self, weights: Mapping[str, Weight], pl_module: nn.Module) -> None:
        """Refuse weights for which something cannot be collected.

        Raises:
            MisconfigurationException: If a layer has no such statistic, or inputs would be read in a compiled module,
                which does not see hooks that come and go.
        """
        for collector in self._collectors.values():
            for name, weight in weights.items():
                collector.know(name, weight.layer)
                problem = collector.problem(name, weight.layer)
                if problem is not None:
                    raise MisconfigurationException(
                        f"the criterion needs the {collector.title}, which are {problem}. Pass it in `exclude`, or "
                        "take another criterion."
                    )
            if collector.reads_inputs and _is_any_compiled(weights, pl_module):
                raise MisconfigurationException(
                    f"the criterion needs the {collector.title}, which cannot be read inside a module that "
                    "torch.compile compiled. Take another criterion, or train without compiling."
                )

    def watch(self, weights: Mapping[str, Weight]) -> None:
        """Watch the layers' inputs, where a statistic is read from them; watching twice is harmless."""
        if not self._handles:
            self._handles = [
                collector.attach(name, weight.layer)
                for collector in self._collectors.values()
                if collector.reads_inputs
                for name, weight in weights.items()
            ]

    def stop(self) -> None:
        """Stop watching inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """Look at weights right after their optimizer stepped."""
        for collector in self._collectors.values():
            for name, parameter in parameters.items():
                collector.after_step(name, parameter)

    def has(self, name: str) -> bool:
        """Whether every statistic of a weight was seen since the last event."""
        return all(name in collector for collector in self._collectors.values())

    def pool(self, batch: "Collected", names: Sequence[str], trainer: pl.Trainer, ranks_per_batch: int) -> None:
        """Take what a batch brought, from all processes: each holds the same sums afterwards, which a file can hold.

        A weight that one of them did not see is left out. Every process must ask.

        Args:
            batch: The inputs that this process has watched; it is empty afterwards.
            names: The weights, in the same order everywhere.
            trainer: The running Trainer.
            ranks_per_batch: How many processes get the same batch.
        """
        for statistic, collector in self._collectors.items():
            sums = batch._collectors[statistic].sums
            seen = torch.tensor([float(name in sums) for name in names], device=trainer.strategy.root_device)
            if trainer.world_size > 1 and collector.reads_inputs:
                seen = trainer.strategy.reduce(seen, reduce_op="min")
            for name, everywhere in zip(names, seen.tolist(), strict=True):
                if everywhere and trainer.world_size > 1:
                    collector.add(name, trainer.strategy.reduce(sums[name], reduce_op="sum") / ranks_per_batch)
                elif everywhere:
                    collector.add(name, sums[name])
        batch.clear()

    def pooled(self, name: str) -> dict[str, Tensor]:
        """Return the statistics of one weight by their names, where :meth:`pool` gathered what was read from inputs."""
        return {statistic: collector.value(name, _as_it_is) for statistic, collector in self._collectors.items()}

    def values(self, trainer: pl.Trainer, name: str, ranks_per_batch: int) -> dict[str, Tensor]:
        """Return the statistics of one weight by their names, of all processes together.

        Raises:
            MisconfigurationException: If one was not seen since the last event.
        """
        for statistic, collector in self._collectors.items():
            if name not in collector:
                raise MisconfigurationException(
                    f"the criterion needs the {statistic} of {name}, and none was seen before this event: the layer "
                    "took no part in training. Pass it in `exclude`, or start at step 1 or later."
                )

        total = partial(_total, trainer, ranks_per_batch)
        return {statistic: collector.value(name, total) for statistic, collector in self._collectors.items()}

    def by_statistic(self) -> dict[str, dict[str, Tensor]]:
        """Return each statistic by weight, of every weight that was seen; what is read from inputs was pooled."""
        return {
            statistic: {name: collector.value(name, _as_it_is) for name in collector.sums}
            for statistic, collector in self._collectors.items()
        }

    def clear(self) -> None:
        """Start over: an event has used what was collected."""
        for collector in self._collectors.values():
            collector.clear()

    def follow(self, changed: Changed, prefix: str = "") -> None:
        """Follow a change of the model; ``prefix`` precedes the names in the whole model."""
        for collector in self._collectors.values():
            collector.follow(changed, prefix)

    def place(self, devices: Mapping[str, torch.device], part: Resize | None = None) -> None:
        """Move what was loaded to the weights' devices, and keep the parts that this process holds."""
        for collector in self._collectors.values():
            collector.to(devices)
            if part is not None and self._whole and collector.elementwise:
                collector.sums = {name: part(name, whole) for name, whole in collector.sums.items()}
        self._whole = False

    def state_dict(self, whole: Resize | None = None) -> dict[str, Any]:
        """Return the sums by statistic, whole tensors of what is held in parts."""
        state = {statistic: collector.state_dict() for statistic, collector in self._collectors.items()}
        for statistic, collector in self._collectors.items():
            if whole is not None and collector.elementwise and not self._whole:
                state[statistic]["sums"] = {name: whole(name, part) for name, part in collector.sums.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Files of 0.1 hold one state for all statistics: it is taken where one was collected, and two of them lay in one
        sum. ChannelPruning wrote this form in 0.1 and early 0.2.
        """
        if "sums" in state:
            state = dict.fromkeys(self._collectors, state) if len(self._collectors) == 1 else {}
        for statistic, collector in self._collectors.items():
            collector.load_state_dict(state.get(statistic, {"sums": {}, "counts": {}}))
        self._whole = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}


def _total(trainer: pl.Trainer, ranks_per_batch: int, sums: Tensor) -> Tensor:
    """Sum over the processes that saw different batches."""
    reduced: Tensor = trainer.strategy.reduce(sums, reduce_op="sum")
    return reduced / ranks_per_batch


def _is_any_compiled(weights: Mapping[str, Weight], pl_module: nn.Module) -> bool:
    """Whether any of the weights' layers is called inside a graph of torch.compile or of ``module.compile()``."""
    if is_compiled(pl_module, parts=False) or any(map(is_inside_compiled, weights)):
        return True
    called = [name for name, part in pl_module.named_modules() if getattr(part, "_compiled_call_impl", None)]
    return any(not name or weight.startswith(f"{name}.") for name in called for weight in weights)


def _as_it_is(sums: Tensor) -> Tensor:
    return sums
