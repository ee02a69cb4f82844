"""The channels of a live model: what can leave, what did, and what an event would take. No Trainer here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_optim.change import Changed
from lightning_optim.measure.latency import interleaved_latency
from lightning_optim.measure.macs import count_macs
from lightning_optim.measure.size import SIZES
from lightning_optim.modules import CONVOLUTIONS, LINEARS, copy_module
from lightning_optim.patterns import Pattern
from lightning_optim.structured.allocation import Allocation, Pool, Shortfall, one_pool, shortfall
from lightning_optim.structured.coupled import CoupledUnits
from lightning_optim.structured.events import Event, event_damage, leaving_channels, plan_event
from lightning_optim.structured.find import ChannelReport, find_prunable, known_groups
from lightning_optim.structured.goal import Goal
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.renamed import renamed_groups
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import ForwardInputs, Weight, named_layers

__all__ = ["Dense", "LiveChannels", "NothingPrunable", "reading_weights"]

Ratio = float | dict[Pattern, float]


def reading_weights(target: nn.Module) -> dict[str, Weight]:
    """Return the weights of a module's Linear and convolution layers, by name."""
    return {
        f"{name}.weight": Weight(f"{name}.weight", layer, layer.weight)
        for name, layer in named_layers(target)
        if isinstance(layer, (*LINEARS, *CONVOLUTIONS)) and isinstance(layer.weight, nn.Parameter)
    }


class NothingPrunable(ValueError):
    """No group of a model can be pruned."""


@dataclass
class Dense:
    """The model before anything left: what a run keeps in its state."""

    channels: dict[str, int]
    parameters: float
    macs: float | None = None
    outputs: dict[str, list[str]] = field(default_factory=dict)
    """The layers whose outputs each group holds, which may name it when the first is removed."""

    def follow(self, changed: Changed, prefix: str) -> dict[str, str]:
        """Rename groups after layers moved or were removed; returns the names that they had, by the new ones."""
        names = renamed_groups(self.channels, self.outputs, changed, prefix)
        self.channels = {new: self.channels[old] for new, old in names.items()}
        layers = {
            new: [changed.layer(prefix + layer) for layer in self.outputs.get(old, ())] for new, old in names.items()
        }
        self.outputs = {
            name: [layer.removeprefix(prefix) for layer in each if layer is not None] for name, each in layers.items()
        }
        return names

    def left_in(self, target: nn.Module) -> float:
        """Return the parameters that are left, as a fraction of the dense model's."""
        return SIZES["parameters"](target) / self.parameters


class LiveChannels:
    """The groups of a model that is pruned bit by bit.

    Args:
        target: The module to prune, as it is now.
        prefix: What its names begin with in the whole model.
        inputs: What its forward receives.
        report: Its groups as they are now.
        dense: What it was before anything left.
        allocation: How channels are chosen.
    """

    def __init__(
        self,
        target: nn.Module,
        prefix: str,
        inputs: ForwardInputs,
        report: ChannelReport,
        dense: Dense,
        allocation: Allocation,
    ) -> None:
        self.target = target
        self.prefix = prefix
        self.inputs = inputs
        self.report = report
        self.dense = dense
        self.allocation = allocation
        self.channels = {name: group.channels for name, group in report.groups.items()}
        """How many each group has now."""
        dense.outputs = {
            name: list(dict.fromkeys(member.layer for member in group.members if member.side == "out"))
            for name, group in report.groups.items()
        }
        self._traced: TracedModel | None = None

    @classmethod
    def find(
        cls,
        target: nn.Module,
        prefix: str,
        inputs: ForwardInputs,
        selected: tuple[set[str], dict[str, str]],
        allocation: Allocation,
        *,
        check: bool,
        macs: bool,
        progress: bool = False,
    ) -> "LiveChannels":
        """Find the groups of a dense model.

        Args:
            target: The module to prune.
            prefix: What its names begin with in the whole model.
            inputs: What its forward receives.
            selected: The layers whose outputs may leave, and those left alone with the reason.
            allocation: How channels are chosen.
            check: Try every group on copies.
            macs: Whether its multiplications are counted.
            progress: Show a progress bar on rank zero while they are tried.

        Raises:
            NothingPrunable: If nothing can be removed.
            ValueError: If the model cannot be traced.
        """
        report = find_prunable(target, inputs, *selected, check=check, progress=progress)
        if not report.groups:
            raise NothingPrunable(f"can remove nothing: {report.reasons()}.")
        dense = Dense(
            {name: group.channels for name, group in report.groups.items()},
            SIZES["parameters"](target),
            float(count_macs(target, inputs)) if macs else None,
        )
        return cls(target, prefix, inputs, report, dense, allocation)

    @classmethod
    def again(
        cls, target: nn.Module, prefix: str, inputs: ForwardInputs, dense: Dense, allocation: Allocation
    ) -> "LiveChannels":
        """Find the groups of a model again that lost channels already."""
        return cls(target, prefix, inputs, known_groups(target, inputs, dense.channels), dense, allocation)

    def weights(self) -> dict[str, Weight]:
        """Return the weights whose inputs are channels of a group, by name below the target."""
        found = {}
        for group in self.report.groups.values():
            for member in group.members:
                layer = self.target.get_submodule(member.layer)
                weight = layer._parameters.get("weight")
                if member.side == "in" and member.parameter is None and weight is not None and weight.ndim > 1:
                    name = f"{member.layer}.weight"
                    found[name] = Weight(name, layer, weight)
        return found

    def ratios(self, ratio: Ratio) -> dict[str, float]:
        """Return the ratio of each group."""
        if isinstance(ratio, dict):
            return self.report.ratios(ratio, self.target, self.prefix)
        return dict.fromkeys(self.report.groups, ratio)

    def pools(self, ratio: Ratio, due: Callable[[float], float]) -> list[Pool]:
        """Return what is asked of which groups.

        Args:
            ratio: Fraction that is gone at the end, of all groups or by pattern.
            due: From such a fraction to the one that is due now.
        """
        if not isinstance(ratio, dict):
            return [one_pool(due(ratio), self.report.groups, self.allocation)]
        pools = self.report.pools(ratio, self.target, self.prefix)
        return [Pool(due(pool.ratio), pool.names, pool.even) for pool in pools]

    def begin_event(self) -> None:
        """Look at the model anew: an event before, or another technique, may have changed it.

        A resumed run looks at it in the same way, so it goes on as this one does.
        """
        self._traced = TracedModel(self.target, self.inputs)
        present = known_groups(self.target, self.inputs, self.dense.channels, self._traced)
        self.report = replace(present, left_out=self.report.left_out)
        self.channels = {name: group.channels for name, group in self.report.groups.items()}

    def end_event(self) -> None:
        """Drop the trace, which holds a forward pass."""
        self._traced = None

    def plan(
        self,
        ratios: float | list[Pool],
        statistics: Mapping[str, Mapping[str, Tensor]],
        *,
        last: bool,
        chosen: Mapping[str, list[int]] | None = None,
    ) -> Event:
        """Choose which channels leave so that ``ratios`` of the dense ones are gone; ``chosen`` ones leave first."""
        return plan_event(
            self.target,
            self.inputs,
            self.report.groups,
            self.dense.channels,
            ratios,
            self.allocation,
            statistics,
            self.prefix,
            last=last,
            chosen=chosen,
            traced=self._traced,
        )

    def choose(
        self,
        pools: list[Pool],
        statistics: Mapping[str, Mapping[str, Tensor]],
        chosen: Mapping[str, list[int]],
        *,
        last: bool,
    ) -> dict[str, list[int]]:
        """Choose which channels are to leave at a later event, by group, without removing any.

        Args:
            pools: What is to be gone by then.
            statistics: What the criterion needs.
            chosen: Channels that leave before; they are not among those returned.
            last: Whether no event follows the later one.
        """
        groups, dense = self.report.groups, self.dense.channels
        found = leaving_channels(
            self.target, groups, dense, pools, self.allocation, statistics, self.prefix, last=last, chosen=chosen
        )
        return {name: sorted(set(channels) - set(chosen.get(name, ()))) for name, channels in found.items()}

    def units(self, names: Iterable[str]) -> dict[str, CoupledUnits]:
        """Return what leaves together in some groups."""
        return {name: CoupledUnits.of(self.target, self.report.groups[name]) for name in names}

    def damage(self, event: Event) -> str | None:
        """Say what an event would break, on copies; None when it breaks nothing."""
        return event_damage(self.target, self.inputs, self.report.groups, event, self._traced)

    def note(self, event: Event) -> None:
        """Take down how many channels each group has after an event."""
        self.channels = {name: after for name, (_, after) in event.channels.items()}

    def shortfall(self, pools: list[Pool]) -> Shortfall:
        """Compare what is gone with what was asked."""
        return shortfall(self.report.groups, self.dense.channels, self.channels, pools, self.allocation.round_to)

    def fraction_left(self) -> float:
        """Return the parameters that are left, as a fraction of the dense model's."""
        return self.dense.left_in(self.target)

    def fraction_after(self, event: Event, goal: Goal, dense: Callable[[], nn.Module]) -> float:
        """Return a figure after an event, as a fraction of the dense model's.

        Args:
            event: What would leave.
            goal: The figure.
            dense: Makes the dense model, which a latency is compared with.
        """
        smaller = copy_module(self.target, rounded=False)
        apply_removal(smaller, event.removal)
        if goal.figure == "parameters":
            return SIZES["parameters"](smaller) / self.dense.parameters
        if goal.figure == "macs":
            return count_macs(smaller, self.inputs) / (self.dense.macs or 1.0)
        measured = interleaved_latency(smaller, self.inputs, dense(), least=40)
        return measured.ratio if measured.ratio is not None else 1.0
