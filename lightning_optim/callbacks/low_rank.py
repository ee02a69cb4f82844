"""LowRankFactorization: layers become two of low rank while the model trains, and the run goes on."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_optim.callbacks.base import CompressionCallback, compressions
from lightning_optim.callbacks.pooled_inputs import PooledInputs
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.checks import check_count
from lightning_optim.functional.low_rank import LowRankCriterion
from lightning_optim.functional.statistics import needs_of
from lightning_optim.low_rank.change import NOT_SEEN, Decided, Factorization, LayerRank, decide, rank_listing
from lightning_optim.low_rank.factorize import check_criterion
from lightning_optim.low_rank.layers import LowRank, numbers_of
from lightning_optim.low_rank.selection import DEFAULT_ENERGY, IS_FACTOR, RankGoal, reasons, select_layers
from lightning_optim.optimizers import held_ids
from lightning_optim.patterns import Pattern
from lightning_optim.progress import progress_bar
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import is_sharded
from lightning_optim.target import Weight, find_target, named_layers
from lightning_optim.window import Window

__all__ = ["LowRankFactorization"]


class LowRankFactorization(CompressionCallback):
    """Make Linear layers and 1x1 convolutions two layers of low rank while the model trains.

    A layer with a weight of ``[out, in]`` becomes ``reduce`` (``[rank, in]``) and ``expand`` (``[out, rank]``, with the
    bias), which are ordinary layers: smaller and faster on any hardware wherever ``rank < out * in / (out + in)``. They
    lose least of the layer's outputs on the inputs of the batches before the event. What is left trains on; layers
    where two would not be smaller stay as they are, and the table at the event names them.

    Args:
        energy: Fraction of the energy that each layer keeps, in (0, 1]: of the squared norm of its outputs, as the
            criterion weights it; or by layer ``{pattern: energy}`` (the first match counts, what matches none stays).
        rank: Instead of ``energy``: the rank (int), a fraction of the full rank (float in (0, 1)), or by layer
            ``{pattern: rank}``.
        criterion: Name in ``functional.low_rank.LOW_RANK_CRITERIA`` (``"second_moment"``, ``"input_norm"``, ``"svd"``,
            ``"random"``) or a callable ``(weight, stats) -> Directions``.
        start: Where the window opens: a step (int) or a fraction of the planned steps (float).
        end: The event, at which the layers become two.
        observe_steps: For how many steps before the event the layers' inputs are read, at most since ``start``. A step
            costs up to ``in / out`` of the layer's own forward pass; ``"second_moment"`` holds in x in numbers a layer
            meanwhile.
        module: Dotted name of the module to factorize; default the whole model.
        include: Exactly the layers to factorize (names, glob patterns, layer classes), instead of the default: every
            Linear, 1x1 convolution without groups and transformers' Conv1D, except the last Linear/Conv.
        exclude: Layers that stay whole.

    Logged at the event: ``low_rank/parameters`` (fraction of the selected weights' numbers that is left) and
    ``low_rank/energy`` (mean over the layers that became two). A table gives each layer's rank.

    State: the window, what was collected, and the ranks. A resumed run continues bit for bit. The optimizer keeps the
    state of biases; factors are new parameters and start without, in the group of the weight they replace. Weight decay
    acts on each factor. Strategies: a single device and DDP (rank 0 computes the factors of the statistics of all).
    Those that divide the model go on with one whose window is over, and refuse any other before the first step.

    It acts after channels are removed and before weights are pruned and rounded; both select the factors like any other
    layer. A weight that several layers share, and one that a parametrization computes, stays whole.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, a name is unknown, ``energy`` and ``rank`` are both given, or, at fit
            start, no layer can be factorized.

    References:
        Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
        Compression".

    Examples:
        >>> factorization = LowRankFactorization(rank=0.25, start=0.1, end=0.2)  # a quarter of each layer's full rank
        >>> factorization = LowRankFactorization(energy={"encoder.*": 0.99, "*": 0.95})  # energies by layer
    """

    instead = (
        "Take Trainer(strategy='optim_ddp') or a single device, or factorize before the model is sharded: "
        "factorize(...), or load_from_checkpoint(...) of a factorized file, and train that."
    )

    def __init__(
        self,
        *,
        energy: float | dict[Pattern, float] = DEFAULT_ENERGY,
        rank: int | float | dict[Pattern, int | float] | None = None,
        criterion: LowRankCriterion | str | dict[str, Any] = "second_moment",
        start: int | float = 0.1,
        end: int | float = 0.2,
        observe_steps: int = 32,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        super().__init__(Window(start, end, events=1), module=module, include=include, exclude=exclude)
        self.goal = RankGoal.of(energy, rank)
        self.criterion = check_criterion(criterion)
        check_count("observe_steps", observe_steps)
        self.observe_steps = observe_steps
        self._needs = needs_of(self.criterion)
        self._statistics = Collected(self._needs)
        self._inputs = PooledInputs(self._needs, self._statistics)
        self._weights: dict[str, Weight] = {}
        self._layers: dict[str, nn.Module] = {}
        self._left_out: dict[str, str] = {}
        self._ranks: dict[str, LayerRank] = {}

    @property
    def ranks(self) -> dict[str, LayerRank]:
        """What the layers became that are two now, by name; empty before the event."""
        return dict(self._ranks)

    # What the base asks for.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights of the selected layers, or those of their factors."""
        return {
            f"{name}.{leaf}": parameter
            for name, layer in self._layers.items()
            for leaf, parameter in layer.named_parameters()
        }

    def selected(self) -> Mapping[str, nn.Module]:
        """Return the selected layers."""
        return self._layers

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Select the layers, and refuse a model that is divided among devices."""
        if is_sharded(pl_module) and not self.window.closed:
            raise MisconfigurationException(
                f"LowRankFactorization cannot replace layers under {type(trainer.strategy).__name__}: their parameters "
                "are divided among the devices. Factorize under 'optim_ddp' or on one device, and go on here from its "
                "file (ckpt_path) once the window is over, or load it with lightning_optim.load_from_checkpoint and "
                "leave LowRankFactorization out."
            )
        self._prefix, target = find_target(pl_module, self.module)
        if fresh:
            self._ranks = {}
            self._statistics.clear()
        if self.window.closed:  # the layers are those of the file
            layers = dict(pl_module.named_modules())
            self._weights, self._layers = {}, {name: layers[name] for name in self._ranks if name in layers}
        else:
            self._select(target, pl_module)
        self.check_peers(trainer)
        self._statistics.place({name: weight.parameter.device for name, weight in self._weights.items()})
        rank_zero_info(self._table())

    def _select(self, target: nn.Module, pl_module: pl.LightningModule) -> None:
        selection = select_layers(
            target,
            self._prefix,
            goal=self.goal,
            needs=self._needs,
            include=self.include,
            exclude=self.exclude,
            root=pl_module,
        )
        self._weights = {weight.name: weight for weight in selection.chosen.values()}
        self._left_out = selection.left_out
        self._layers = {name: weight.layer for name, weight in selection.chosen.items()}
        if not selection.chosen:  # of a model whose layers are two already the steps count
            self._layers = {name: x for name, x in named_layers(target, self._prefix) if isinstance(x, LowRank)}
        if not self._layers:
            raise MisconfigurationException(
                f"LowRankFactorization selects no layer: left out are {reasons(selection)}. Name what to factorize "
                "with include=[...]."
            )
        self._statistics.check(self._weights, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the windows of techniques that act before this one, which are all known now."""
        if not self.window.closed:
            self._check_order(trainer)
        super().on_train_start(trainer, pl_module)

    def _check_order(self, trainer: pl.Trainer) -> None:
        end = self.window.end_step or 0
        ours = {id(weight.parameter) for weight in self._weights.values()}
        if end == 0 and self._statistics:
            raise MisconfigurationException(
                "LowRankFactorization has its event before the first batch, and its criterion needs the layers' "
                "inputs. Set `end` to step 1 or later, or take criterion='svd'."
            )
        for peer in compressions(trainer):
            if peer is self or ours.isdisjoint(map(id, peer.target_parameters().values())):
                continue
            who, window = type(peer).__name__, peer.window
            if peer.order < self.order and (window.end_step or 0) > end:
                problem = f"acts until step {window.end_step}. Let it end first: lower its `end`, or raise"
            elif peer.order > self.order and (window.start_step or 0) < end and not getattr(trainer, "fast_dev_run", 0):
                problem = f"acts on them from step {window.start_step or 0} on. Let it begin then or later, or lower"
            else:
                problem = _named_weight(peer, self._weights)
            if problem:
                raise MisconfigurationException(
                    f"LowRankFactorization replaces layers at step {end}, and {who} {problem} the `end` of "
                    "LowRankFactorization."
                )

    def register_hooks(self, trainer: pl.Trainer) -> None:
        """Watch the optimizers, and refuse those that cannot follow."""
        super().register_hooks(trainer)
        self.check_holders("replace layers")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers' inputs in the last batches of the window."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step, window = self.window.step + 1, self.window
        if window.start_step is None or window.end_step is None:
            return
        first = max(window.start_step, window.end_step - self.observe_steps + 1)
        if first <= step <= window.end_step and self._weights:
            self._inputs.watch(trainer, self._weights)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the watch of this batch: its forward pass is over, and what others call is not read."""
        if pl_module.automatic_optimization:
            self._inputs.stop()

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the step, and take what its batches brought: from here on a file may be written."""
        super().count_step(optimizer)
        self._inputs.pool()

    def after_step(self, optimizer: Optimizer) -> None:
        """Note what a criterion of one's own reads from the gradients."""
        if self._statistics and self.window.within and self._weights:
            held = held_ids(optimizer)
            weights = {name: weight.parameter for name, weight in self._weights.items()}
            self._statistics.after_step({name: weight for name, weight in weights.items() if id(weight) in held})

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the layers at the end of the window. A failed event leaves the model as it was."""
        if not self.window.closes_now or not self._weights:
            return
        numbers = sum(map(numbers_of, self._layers.values()))
        decided = self._decide(trainer)
        self._ranks = {name: each.becomes for name, each in decided.items() if each.becomes is not None}
        stay = {name: each.stays for name, each in decided.items() if each.becomes is None}
        self._left_out = {**stay, **self._left_out}
        self._weights = {}
        self._statistics.clear()
        if self._ranks:
            self.commit(trainer, pl_module, Factorization.of(decided))
        self._say(trainer, pl_module, numbers)

    def _decide(self, trainer: pl.Trainer) -> dict[str, Decided]:
        """Choose the factors of every layer; all ranks hold the same statistics, and rank 0 computes."""
        decided = {}
        bar = bool(getattr(trainer.progress_bar_callback, "is_enabled", False))
        with progress_bar("factorizing", len(self._weights), shown=bar) as advance:
            for weight in self._weights.values():
                name = weight.name.rpartition(".")[0]
                if not self._statistics.has(weight.name):
                    decided[name] = Decided(None, None, NOT_SEEN)
                elif trainer.is_global_zero:
                    collected = self._statistics.pooled(weight.name)
                    decided[name] = decide(name, weight, self.goal, self._prefix, self.criterion, collected)
                advance()
        if trainer.world_size > 1:
            ours = {name: each.to("cpu") for name, each in decided.items()}
            decided = trainer.strategy.broadcast(ours, src=0)
        return decided

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Follow layers that moved, lost channels or were removed."""
        self._statistics.follow(changed)
        self._inputs.follow(changed)
        names = {name: changed.layer(name) for name in self._layers}
        self._layers = {new: self._layers[old] for old, new in names.items() if new is not None}
        self._ranks = {new: self._ranks[old] for old, new in names.items() if new is not None and old in self._ranks}
        successors = {name: changed.successor(name) for name in self._weights}
        self._weights = {
            now[0]: Weight(now[0], weight.layer, now[1])
            for name, weight in self._weights.items()
            if (now := successors[name]) is not None
        }

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window, statistics and ranks as plain types and tensors."""
        return {
            **super().state_dict(),
            "ranks": {name: each.as_plain() for name, each in self._ranks.items()},
            "left_out": dict(self._left_out),
            "squares": self._statistics.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._ranks = {name: LayerRank.of_plain(plain) for name, plain in state_dict["ranks"].items()}
        self._left_out = dict(state_dict["left_out"])
        self._statistics.load_state_dict(state_dict["squares"])

    def plan_entry(self) -> dict[str, Any]:
        """Return what was asked, and the rank of each layer that became two."""
        return {
            "technique": "LowRankFactorization",
            self.goal.argument: as_plain(self.goal.asked),
            "ranks": {name: each.rank for name, each in self._ranks.items()},
        }

    # Messages.

    def _table(self) -> str:
        title = f"{self.label}: step {self.window.end_step}, {self.goal.argument}={self.goal.asked}"
        selected = dict.fromkeys((name.rpartition(".")[0] for name in self._weights), "selected")
        return str(rank_listing(self._ranks, {**selected, **self._left_out}, title=title))

    def _say(self, trainer: pl.Trainer, pl_module: pl.LightningModule, before: int) -> None:
        left = sum(map(numbers_of, self._layers.values())) / before
        said = f"{self.label}: step {self.window.step}, asked {self.goal.argument} {self.goal.asked}"
        rank_zero_info(self._table())
        if not self._ranks:
            rank_zero_warn(f"{said}; no layer became two, for the reasons in the table above. Ask for less.")
            energy = 1.0
        else:
            energy = sum(each.energy for each in self._ranks.values()) / len(self._ranks)
            rank_zero_info(
                f"{said}; {len(self._ranks)} of {len(self._layers)} layers became two that keep {energy:.2%} of the "
                f"energy; {left:.2%} of the parameters are left. The optimizer's state starts anew for their weights: "
                f"{', '.join(self._ranks)}."
            )
        self.log_event(trainer, pl_module, {"low_rank/parameters": left, "low_rank/energy": energy})

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what became of it."""
        asked = f"asked {self.goal.argument} {self.goal.asked}"
        if not self.reached_end:
            return (
                f"{self.label}: the run ended at step {self.window.step}, before the window's end at step "
                f"{self.window.end_step}: {asked}; no layer became two."
            )
        if not self._ranks and IS_FACTOR in self._left_out.values():
            return f"{self.label}: {asked}; the layers were two before."
        before = sum(each.parameters[0] for each in self._ranks.values())
        after = sum(each.parameters[1] for each in self._ranks.values())
        return f"{self.label}: {asked}; {len(self._ranks)} layers are two, with {after:,} of {before:,} parameters."

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed."""
        self._inputs.release()
        super().release(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": {}, "_layers": {}}


def _named_weight(peer: CompressionCallback, weights: Collection[str]) -> str:
    """Return the problem of a peer that names a weight, which will be none after the event; empty without one."""
    for pattern in (*(peer.include or ()), *(peer.exclude or ())):
        name = next((name for name in weights if pattern == name or name.endswith(f".{pattern}")), None)
        if name is not None:
            layer = str(pattern).rpartition(".")[0]
            return f"names the weight {pattern!r}, which is gone then. Name the layer, {layer!r}, or lower"
    return ""
