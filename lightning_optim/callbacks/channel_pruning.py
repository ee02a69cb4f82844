"""ChannelPruning: channels leave the model while it trains, and the run goes on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import checkpoint
from lightning_optim.callbacks.base import CompressionCallback, ranks_per_batch
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.callbacks.recovery import Recovery
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.checks import check_choice, check_count, check_flags
from lightning_optim.functional.channels import ChannelCriterion
from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.measure.size import SIZES
from lightning_optim.modules import copy_module
from lightning_optim.optimizers import held_ids
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import is_sharded
from lightning_optim.structured.allocation import Allocation, one_pool
from lightning_optim.structured.events import check_ratio
from lightning_optim.structured.goal import Goal, smallest_ratio
from lightning_optim.structured.live import Dense, LiveChannels, NothingPrunable, reading_weights
from lightning_optim.structured.removal import ChannelRemoval
from lightning_optim.structured.renamed import renamed_groups
from lightning_optim.structured.selection import refuse_shared, select_roots
from lightning_optim.target import Pattern, find_target
from lightning_optim.window import Window

__all__ = ["ChannelPruning"]


class ChannelPruning(CompressionCallback):
    """Remove channels from layers while the model trains: the model gets smaller and faster on any hardware.

    At each event the schedule gives the fraction of channels that should be gone; in every group of coupled layers
    the least important ones leave all its layers at once: weights, biases, norm statistics, gradients and optimizer
    state. The optimizer, schedulers and the run stay; the checkpoint says what changed, and
    :func:`lightning_optim.load_from_checkpoint` rebuilds it in the user's class.

    Args:
        pruning_ratio: Fraction of the channels that is gone at the end, in (0, 1), or by layer ``{pattern: ratio}``
            (the first match counts, what matches none is left alone). It is reached within one unit of one group
            (a channel, a multiple, a channel of each block, a head); a larger miss is a warning. Removing half of
            the channels of every layer removes about three quarters of the parameters between them.
        target: Instead of ``pruning_ratio``: ``{"parameters": 0.3}``, ``{"macs": 0.5}`` or ``{"latency": 0.5}``: at
            most this fraction of the dense model's at the end. At each event the smallest ratio that reaches what the
            schedule asks is found by halving. Latency is measured as PerformanceScore measures it (rank 0 decides), so
            such a run is exempt from resuming bit for bit; widths already cut are restored exactly.
        strict: Raise when ``target`` cannot be reached at the end of the window; else say so.
        criterion: Name in ``functional.channels.CHANNEL_CRITERIA`` or a callable ``(slices) -> [channels]``.
        scope: ``"global"`` ranks the channels of all groups together (none loses more than nine tenths),
            ``"layer"`` takes the same fraction of each, within one unit.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable.
        start: Where the window opens: a step (int) or a fraction of the planned steps (float).
        end: The last event.
        events: How many events, spread evenly over the window.
        round_to: Keep multiples of this; the groups make up for what rounding keeps. None: 8 on CUDA, no rounding on
            a CPU.
        example_inputs: What the target's forward receives. Default: the module's ``example_input_array``, else caught
            from the first training batch. A list holds the inputs of several calls, where one does not reach every
            layer.
        optimizer_state: ``"slice"`` keeps the state of the surviving weights, ``"reset"`` forgets it.
        recalibrate_batches: After an event BatchNorm's running statistics become the plain mean over this many training
            batches, instead of trailing behind by their momentum; 0: they are left to it.
        warmup_steps: After an event the learning rates rise again from 0 over this many steps; 0: they do not.
        reduction: How the layers of a group decide together: ``"mean"``, ``"sum"`` or ``"max"``.
        check: Try each group once, and every event, on copies: removing must equal setting to zero, norms taken over
            the channels that stay. Each group is tried in the part of the model that holds its layers, with a copy in
            float64 and at most seven forward passes. Without it channels are removed unchecked.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly the layers whose outputs may leave (names, glob patterns, layer classes), instead of the
            default: all but embeddings and the last Linear/Conv.
        exclude: Layers whose outputs stay.

    Logged at every event: ``channels/parameters`` (fraction of the dense model's), and with a goal in them
    ``channels/macs`` or ``channels/latency``.

    State: the window, the channels of the dense model, and what the criterion collects (``taylor``: one float32 per
    weight; ``activation``: one per input of a layer). A resumed
    run continues bit for bit. Strategies: a single device and DDP (the model is wrapped anew after each event). Those
    that divide the model go on with one whose window is over, and refuse any other before the first step.

    Attention loses whole heads, a mixture's experts the same inner channels; the residual width is removed where its
    table is in ``include``. The numbers of a Hugging Face configuration follow at the end of the window, on a copy.
    What cannot be treated (``nn.MultiheadAttention``, recurrent layers, the outputs, whatever fails the check) is left
    alone, with its reason in the table.

    References:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".
    """

    instead = (
        "Take Trainer(strategy='optim_ddp') or a single device, or prune before the model is sharded: "
        "prune_channels(...), or load_from_checkpoint(...) of a pruned file, and train that."
    )

    def __init__(
        self,
        pruning_ratio: float | dict[Pattern, float] = 0.5,
        *,
        target: dict[str, float] | None = None,
        strict: bool = True,
        criterion: ChannelCriterion | str = "magnitude",
        scope: Literal["global", "layer"] = "global",
        schedule: Schedule | str | dict[str, Any] = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        events: int = 8,
        round_to: int | None = None,
        example_inputs: Any = None,
        optimizer_state: Literal["slice", "reset"] = "slice",
        recalibrate_batches: int = 0,
        warmup_steps: int = 0,
        reduction: Literal["mean", "sum", "max"] = "mean",
        check: bool = True,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        super().__init__(Window(start, end, events=events), module=module, include=include, exclude=exclude)
        self.pruning_ratio = check_ratio(pruning_ratio)
        self.target = None if target is None else Goal.of(target)
        if target is not None and pruning_ratio != 0.5:
            raise ValueError(f"`target` takes the place of `pruning_ratio`; got {target!r} and {pruning_ratio!r}.")
        check_flags(strict=strict, check=check)
        check_count("events", events)
        self.strict = strict
        self.schedule = SCHEDULES.resolve(schedule)
        check_choice("optimizer_state", optimizer_state, ("slice", "reset"))
        self.optimizer_state = optimizer_state
        check_count("recalibrate_batches", recalibrate_batches, 0)
        check_count("warmup_steps", warmup_steps, 0)
        self.recalibrate_batches = recalibrate_batches
        self.warmup_steps = warmup_steps
        self._recovery = Recovery(recalibrate_batches, warmup_steps)
        self.check = check
        self.round_to = round_to
        self.allocation = Allocation.of(criterion, scope=scope, reduction=reduction, round_to=round_to)
        self._inputs = InputSource(example_inputs, 2, module, several=True)
        self._live: LiveChannels | None = None
        self._dense: Dense | None = None
        self._reached: float | None = None
        self._statistics = Collected(self.allocation.needs)
        self._batch = Collected(self.allocation.needs)

    # What the base asks for.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the target."""
        return dict(self._target.named_parameters())

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Take up the state, and find the groups where the inputs are known already."""
        if is_sharded(pl_module) and not self.window.closed:
            raise MisconfigurationException(
                f"ChannelPruning cannot remove channels under {type(trainer.strategy).__name__}: their parameters are "
                "divided among the devices. Prune under 'optim_ddp' or on one device, and go on here from its file "
                "(ckpt_path) once the window is over, or load it with lightning_optim.load_from_checkpoint and leave "
                "ChannelPruning out."
            )
        self._prefix, self._target = find_target(pl_module, self.module)
        self._whole = pl_module
        self._live = None
        if fresh:
            self._dense, self._recovery.removed_at, self._reached = None, None, None
            self._statistics.clear()
        self._statistics.place({name: parameter.device for name, parameter in self._target.named_parameters()})
        self._inputs.prepare(pl_module, "ChannelPruning")
        refuse_shared(pl_module, self._target, self._prefix)
        self._selected = select_roots(self._target, self._prefix, self.include, self.exclude)
        # After the window nothing is removed, and another technique may have replaced the layers of a group.
        if self._inputs.inputs is not None and not is_sharded(pl_module) and not self.window.closed:
            self._find_groups(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Catch what forward receives from the first batch, where no example was given."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._recovery.end_batch()
        if not self.window.closed:
            self._inputs.begin_batch(pl_module)
        if self._batch.reads_inputs and self.window.within:  # all layers: a resumed run learns its groups from a batch
            self._batch.watch(reading_weights(self._target))
        self._recovery.begin_batch(self._target)

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Slice the gathered gradients with their parameters, and rename what moved."""
        self._statistics.follow(changed, self._prefix)
        if self._dense is None:
            return
        if all(now == name for name, now in changed.layers.items()):
            return
        before, groups = self._dense.channels, {} if self._live is None else self._live.report.groups
        names = renamed_groups(before, groups, changed, self._prefix)
        self._dense.channels = {new: before[old] for new, old in names.items()}
        if self._live is not None:
            live = LiveChannels.again(self._target, self._prefix, self._live.inputs, self._dense, self.allocation)
            self._dense.channels = {new: before[names[new]] for new in live.channels}
            self._live = live

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what was caught, and run the event that is due."""
        self._recovery.end_batch()
        self._batch.stop()
        if self._batch.reads_inputs and self.window.within:
            names = list(reading_weights(self._target))
            self._statistics.pool(self._batch, names, trainer, ranks_per_batch(trainer))
        if self._live is None and not self.window.closed:
            self._inputs.end_batch(pl_module)
            if self._inputs.inputs is not None:
                self._inputs.inputs = trainer.strategy.broadcast(self._inputs.inputs, src=0)
                self._find_groups(trainer, pl_module)
        super().finish_batch(trainer, pl_module)

    def register_hooks(self, trainer: pl.Trainer) -> None:
        """Watch the optimizers, refuse those that cannot follow a removal, and warm up their learning rates."""
        super().register_hooks(trainer)
        self.check_holders("remove channels")
        self._handles += self._recovery.warm_up(self._holders, lambda: self.window.step)

    def after_step(self, optimizer: Optimizer) -> None:
        """Note gradients while the window is open, where the criterion needs them."""
        if self._statistics and self.window.within:
            held = held_ids(optimizer)
            self._statistics.after_step({n: p for n, p in self._target.named_parameters() if id(p) in held})

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the step, and end the watch: techniques call the model now, or copies of it with its hooks."""
        super().count_step(optimizer)
        self._batch.stop()

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what the schedule asks now. A failed event leaves the model as it was."""
        if self._live is None:
            raise MisconfigurationException(
                "ChannelPruning has an event before the first batch, and no example inputs yet. Pass `example_inputs`, "
                "or start at step 1 or later."
            )
        self._batch.stop()
        progress = self.window.progress()
        if progress > 0.0:  # the schedule begins with the dense model: nothing to rank
            self._live.begin_event()
            try:
                self._remove(trainer, pl_module, self._live)
            finally:
                self._live.end_event()
            self._statistics.clear()
        self._say(trainer, pl_module, self._live)

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule, live: LiveChannels) -> None:
        statistics = self._statistics.by_statistic()
        pools = live.pools(self.pruning_ratio, self._due)
        if self.target is not None:
            ratio = self._ratio_for(trainer, live, self.target, statistics)
            pools = [one_pool(ratio, live.report.groups, self.allocation)]
        event = live.plan(pools, statistics, last=self.window.closes_now)
        if not event.removal.kept:
            return
        problem = live.damage(event) if self.check else None
        if problem is not None:
            raise RuntimeError(f"ChannelPruning at step {self.window.step} changed nothing: {problem}.")
        change = ChannelRemoval(self._prefix, event.removal, configs=self.window.closes_now)
        self.commit(trainer, pl_module, change, reset=self.optimizer_state == "reset")
        live.note(event)
        self._recovery.begin(self.window.step)

    def _due(self, final: float) -> float:
        """Return which part of a fraction is due now."""
        return self.schedule(self.window.progress(), 0.0, final)

    def _ratio_for(
        self, trainer: pl.Trainer, live: LiveChannels, goal: Goal, statistics: Mapping[str, Mapping[str, Tensor]]
    ) -> float:
        """Return the smallest ratio that leaves at most the fraction of the figure that is due; rank 0 decides."""
        due = 1.0 - self._due(1.0 - goal.fraction)

        def fraction_at(ratio: float) -> float:
            event = live.plan(ratio, statistics, last=self.window.closes_now)
            return live.fraction_after(event, goal, self._dense_copy)

        found: tuple[float, float] = (0.0, 0.0)
        if trainer.is_global_zero:
            found = smallest_ratio(fraction_at, due)
        ratio, reached = trainer.strategy.broadcast(found, src=0) if trainer.world_size > 1 else found
        if self.window.progress() == 1.0 and reached > due:
            smallest, left = ", ".join(live.report.groups), ", ".join(live.report.left_out) or "none"
            sentence = (
                f"{self.label}: asked {goal.figure} at {due:.2%} of the dense model's, reached {reached:.2%}. What "
                f"stops it: {smallest} are at their smallest; left alone are {left}."
            )
            if self.strict:
                raise RuntimeError(sentence + " Ask for more, take more layers in, or pass strict=False.")
            rank_zero_warn(sentence)
        self._reached = reached
        return ratio

    def _dense_copy(self) -> nn.Module:
        """Return a copy with the structure of the user's class: what a latency is compared with."""
        duplicate = copy_module(self._whole, rounded=False)
        checkpoint.conform(duplicate, checkpoint.EMPTY)
        return duplicate.get_submodule(self._prefix.rstrip("."))

    # Groups.

    def _find_groups(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._inputs.layer != self._prefix.rstrip("."):
            called = self._inputs.layer
            raise MisconfigurationException(
                f"the training step calls {called!r} and not the forward of what ChannelPruning prunes. Pass "
                f"module={called!r}, or `example_inputs` for the LightningModule's own forward."
            )
        inputs = self._inputs.inputs
        if inputs is None:
            raise RuntimeError("no example inputs.")
        if self._dense is None:
            macs = self.target is not None and self.target.figure == "macs"
            try:
                self._live = LiveChannels.find(
                    self._target,
                    self._prefix,
                    inputs,
                    self._selected,
                    self.allocation,
                    check=self.check,
                    macs=macs,
                    progress=bool(getattr(trainer, "progress_bar_callback", None)),
                )
            except NothingPrunable as error:
                raise MisconfigurationException(f"ChannelPruning {error}") from error
            self._dense = self._live.dense
        else:
            self._live = LiveChannels.again(self._target, self._prefix, inputs, self._dense, self.allocation)
        self._live.ratios(self.pruning_ratio)
        self._statistics.check(self._live.weights(), pl_module)
        self.check_peers(trainer)
        if self.round_to is None and trainer.strategy.root_device.type == "cuda":
            self.allocation = self._live.allocation = self.allocation.rounded(8)
        rank_zero_info(self._table(self._live))

    def selected(self) -> dict[str, nn.Module]:
        """Return the layers whose outputs may be removed, once they are known."""
        names = [] if self._live is None else self._live.report.groups
        return {self._prefix + name: self._target.get_submodule(name) for name in names}

    def _say(self, trainer: pl.Trainer, pl_module: pl.LightningModule, live: LiveChannels) -> None:
        dense, left = live.dense.channels, live.fraction_left()
        before = sum(dense[name] for name in live.channels)
        now = sum(live.channels.values())
        multiple = self.allocation.round_to
        rounded = f" (kept in multiples of {multiple})" if multiple else ""
        miss = None if self.target is not None else live.shortfall(live.pools(self.pruning_ratio, self._due))
        fewer = f", {miss.channels} fewer than asked" if miss is not None and miss.channels else ""
        rank_zero_info(
            f"{self.label}: step {self.window.step}, asked {self._words_of_asked(live)}; {before - now} of {before} "
            f"channels gone in {len(live.channels)} groups{rounded}{fewer}; {left:.2%} of the parameters are left."
        )
        if miss is not None and miss.exceeds and self.window.closes_now:
            rank_zero_warn(f"{self.label}: {miss.sentence()}")
        metrics = {"channels/parameters": left}
        if self.target is not None and self.target.figure != "parameters" and self._reached is not None:
            metrics[f"channels/{self.target.figure}"] = self._reached
        self.log_event(trainer, pl_module, metrics)

    def _words_of_asked(self, live: LiveChannels) -> str:
        if self.target is not None:
            return f"{1.0 - self._due(1.0 - self.target.fraction):.2%} of the dense {self.target.figure}"
        dense, ratios = live.dense.channels, live.ratios(self.pruning_ratio)
        gone = sum(dense[name] * self._due(ratio) for name, ratio in ratios.items())
        return f"{gone / sum(dense[name] for name in ratios):.2%} of the channels gone"

    def _fraction_left(self) -> float:
        return SIZES["parameters"](self._target) / self._dense.parameters if self._dense else 1.0

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window, dense model and gradients as plain types and tensors."""
        return {
            **super().state_dict(),
            "channels": None if self._dense is None else dict(self._dense.channels),
            "parameters": None if self._dense is None else self._dense.parameters,
            "macs": None if self._dense is None else self._dense.macs,
            "removed_at": self._recovery.removed_at,
            "batches_since": self._recovery.batches_since,
            "squares": self._statistics.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        channels = state_dict["channels"]
        self._dense = None
        if channels is not None:
            self._dense = Dense(dict(channels), state_dict["parameters"], state_dict["macs"])
        self._recovery.removed_at = state_dict["removed_at"]
        self._recovery.batches_since = state_dict["batches_since"]
        self._statistics.load_state_dict(state_dict["squares"])

    def plan_entry(self) -> dict[str, Any]:
        """Return what was asked, and what is left."""
        goal = self.pruning_ratio if self.target is None else {self.target.figure: self.target.fraction}
        entry = {"technique": "ChannelPruning", "asked": as_plain(goal)}
        if self._dense is None or getattr(self, "_target", None) is None:  # restored, and not fitted since
            return entry
        return {**entry, "parameters_left": self._fraction_left()}

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what is left."""
        if self._dense is None:
            return f"{self.label}: the run ended before a batch was seen."
        ended = "" if self.reached_end else f"the run ended at step {self.window.step}, before the window's end; "
        return f"{self.label}: {ended}{self._fraction_left():.2%} of the parameters are left."

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed, and restore momenta and learning rates."""
        self._inputs.release()
        self._batch.stop()
        self._recovery.release()
        super().release(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_target": None,
            "_live": None,
            "_whole": None,
        }

    def _table(self, live: LiveChannels) -> str:
        ratios = live.ratios(self.pruning_ratio)
        removed = {name: f"{ratio:.0%}" if self.target is None else "to the goal" for name, ratio in ratios.items()}
        title = f"{self.label}: steps {self.window.start_step} to {self.window.end_step}"
        return live.report.table(title, live.dense.channels, removed)
