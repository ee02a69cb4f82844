"""ChannelPruning: channels leave the model while it trains, and the run goes on."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.callbacks.base import CompressionCallback
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.callbacks.goal_ratio import dense_copy, ratio_for
from lightning_optim.callbacks.pooled_inputs import PooledInputs
from lightning_optim.callbacks.recovery import Recovery
from lightning_optim.callbacks.shrinking import Shrinking
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.checks import check_choice, check_count, check_flags
from lightning_optim.functional.channels import ChannelCriterion
from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.optimizers import held_ids
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import is_sharded
from lightning_optim.structured.allocation import Allocation, Pool, one_pool
from lightning_optim.structured.events import check_ratio
from lightning_optim.structured.goal import Goal
from lightning_optim.structured.live import Dense, LiveChannels, NothingPrunable, reading_weights
from lightning_optim.structured.removal import ChannelRemoval
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
            from the first training batch. A list holds several calls, where one does not reach every layer.
        optimizer_state: ``"slice"`` keeps the state of the surviving weights, ``"reset"`` forgets it.
        recalibrate_batches: After an event BatchNorm's running statistics become the plain mean over this many training
            batches, instead of trailing behind by their momentum; 0: they are left to it.
        warmup_steps: After an event the learning rates rise again from 0 over this many steps; 0: they do not.
        reduction: How the layers of a group decide together: ``"mean"``, ``"sum"`` or ``"max"``.
        regularization: Name in ``functional.regularization.REGULARIZATIONS``: channels shrink before they are removed,
            in all layers that lose them, right after each step of the optimizers. ``"growing"``: from ``start`` on,
            those that the next event removes; they are chosen by the criterion at the event before (the first at
            ``start``), shrink faster and faster, and are what leaves. ``"group_lasso"``: from ``start`` to ``end``, all
            prunable channels, the small ones most; what leaves is chosen at the event. None: nothing shrinks.
        strength: How much, None for the regularization's default. ``"growing"``: without gradients, channels arrive at
            their event with exp(-strength) of their weights. ``"group_lasso"``: without gradients, the smallest
            channels of each group lose about strength x the group's mean norm over the window.
        check: Try each group once, and every event, on copies: removing must equal setting to zero, norms taken over
            the channels that stay. Each group is tried in the part of the model that holds its layers, with a copy in
            float64 and at most seven forward passes. Without it channels are removed unchecked.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly the layers whose outputs may leave (names, glob patterns, layer classes), instead of the
            default: all but embeddings and the last Linear/Conv.
        exclude: Layers whose outputs stay.

    Logged at every event: ``channels/parameters`` (fraction of the dense model's), and with a goal in them
    ``channels/macs`` or ``channels/latency``; with a regularization ``channels/leaving_norm`` (mean norm of the
    channels that leave, as a fraction of the mean of their groups).

    State: the window, the channels of the dense model, and what the criterion collects (``taylor``: one float32 per
    weight; ``activation``: one per input of a layer), and which channels shrink and how far they are. A resumed
    run continues bit for bit. Strategies: a single device and DDP (the model is wrapped anew after each event). Those
    that divide the model go on with one whose window is over, and refuse any other before the first step.

    Attention loses whole heads, a mixture's experts the same inner channels; the residual width is removed where its
    table is in ``include``. The numbers of a Hugging Face configuration follow at the end of the window, on a copy.
    What cannot be treated (``nn.MultiheadAttention``, recurrent layers, the outputs, whatever fails the check) is left
    alone, with its reason in the table.

    Raises:
        TypeError, ValueError: If an argument does not fit, or, at fit start, no channel can be removed.

    References:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"; Wang et al. 2021, "Neural Pruning via Growing
        Regularization"; Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks".

    Examples:
        >>> pruning = ChannelPruning(0.5, start=0.1, end=0.7, events=8, scope="layer")
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
        regularization: str | None = None,
        strength: float | None = None,
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
        self._shrinking = Shrinking(regularization, strength)
        self.regularization, self.strength = regularization, self._shrinking.strength
        if self._shrinking and start == end:
            raise ValueError(f"channels that are regularized shrink between `start` and `end`, got {start!r} for both.")
        if self._shrinking.chooses and start == 0 and set(self.allocation.needs) - {"generator"}:
            raise ValueError(
                f"regularization={regularization!r} chooses channels at `start`, and by step 0 the criterion has seen "
                "nothing. Start at step 1 or later."
            )
        self._inputs = InputSource(example_inputs, 2, module, several=True)
        self._live: LiveChannels | None = None
        self._dense: Dense | None = None
        self._reached: float | None = None
        self._coming: tuple[float, float] | None = None
        """Of a goal: the next event's ratio and what it leaves of the figure, where its channels shrink already."""
        self._leaving_norm: float | None = None
        self._statistics = Collected(self.allocation.needs)
        self._read = PooledInputs(self.allocation.needs, self._statistics)

    # What the base asks for.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the target."""
        return dict(self._target.named_parameters(remove_duplicate=False))

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
            self._coming = self._leaving_norm = None
            self._statistics.clear()
            self._shrinking.clear()
        self._shrinking.place(self._target)
        self._statistics.place({name: parameter.device for name, parameter in self.target_parameters().items()})
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
        if self._read.needed and self._collects(self.window.step + 1):
            self._read.watch(
                trainer, reading_weights(self._target)
            )  # all: a resumed run learns its groups from a batch
        self._recovery.begin_batch(self._target)

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Slice the gathered gradients with their parameters, and rename what moved."""
        self._statistics.follow(changed, self._prefix)
        self._shrinking.follow(changed, self._prefix)
        if self._dense is None:
            return
        if all(now == name for name, now in changed.layers.items()):
            return
        before = self._dense.channels
        names = self._dense.follow(changed, self._prefix)
        if self._live is not None:
            live = LiveChannels.again(self._target, self._prefix, self._live.inputs, self._dense, self.allocation)
            self._dense.channels = {new: before[names[new]] for new in live.channels}
            self._live = live

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the example inputs that were caught, and run the event that is due."""
        self._recovery.end_batch()
        self._read.stop()
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
        """Shrink what is to be removed, and note gradients where the criterion needs them."""
        if not self._statistics and not self._shrinking:
            return
        held = held_ids(optimizer)
        self._shrinking.after_step(self._target, self._holders.index(optimizer), held, self.window.step)
        if self._statistics and self._collects(self.window.step):
            self._statistics.after_step({n: p for n, p in self.target_parameters().items() if id(p) in held})

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the step, and take what its batches brought."""
        super().count_step(optimizer)
        self._read.pool()

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what the schedule asks now. A failed event leaves the model as it was."""
        if self._live is None:
            raise MisconfigurationException(
                "ChannelPruning has an event before the first batch, and no example inputs yet. Pass `example_inputs`, "
                "or start at step 1 or later."
            )
        self._read.stop()
        live, progress = self._live, self.window.progress()
        if progress > 0.0 or self._shrinking:  # the schedule begins with the dense model: nothing to rank or remove
            live.begin_event()
            try:
                self._remove(trainer, pl_module, live)
            finally:
                live.end_event()
            if progress > 0.0 or self._shrinking.chooses:  # else nothing was chosen by what was seen
                self._statistics.clear()
        self._say(trainer, pl_module, live)

    def _collects(self, step: int) -> bool:
        """Whether statistics are collected at a step; channels that shrink are chosen at the window's start already."""
        return self.window.nears(step) if self._shrinking.chooses else self.window.is_open(step)

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule, live: LiveChannels) -> None:
        statistics = self._statistics.by_statistic()
        last, leaving = self.window.closes_now, dict[str, list[int]]()
        event = None
        if self.window.progress() > 0.0:
            chosen = self._shrinking.chosen()
            found = self._coming if chosen is not None else self._goal(trainer, live, statistics, self.window.step)
            self._reached = None if found is None else found[1]
            event = live.plan(self._pools(live, self.window.step, found), statistics, last=last, chosen=chosen)
            problem = live.damage(event) if self.check and event.removal.kept else None
            if problem is not None:
                raise RuntimeError(f"ChannelPruning at step {self.window.step} changed nothing: {problem}.")
            leaving = event.leaving
            self._leaving_norm = self._shrinking.leaving_norm(self._target, leaving)
        if self._shrinking:
            self._shrink(trainer, live, statistics, leaving)
        removes = event is not None and bool(event.removal.kept)
        if event is None or not (removes or (last and self._recovery.removed_at is not None)):
            return  # else the last event removes nothing, and configurations follow what earlier ones removed
        change = ChannelRemoval(self._prefix, event.removal, configs=last)
        self.commit(trainer, pl_module, change, reset=removes and self.optimizer_state == "reset")
        if removes:
            live.note(event)
            self._recovery.begin(self.window.step)

    def _shrink(
        self,
        trainer: pl.Trainer,
        live: LiveChannels,
        statistics: Mapping[str, Mapping[str, Tensor]],
        leaving: dict[str, list[int]],
    ) -> None:
        """Let the channels shrink that are to leave after those that leave now: with these in place, to be sliced."""
        window, following = self.window, self.window.next_event
        if following is None:
            self._shrinking.clear()
        elif self._shrinking.chooses:
            self._coming = self._goal(trainer, live, statistics, following)
            pools = self._pools(live, following, self._coming)
            chosen = live.choose(pools, statistics, leaving, last=following == window.end_step)
            self._shrinking.begin(live.units(chosen), chosen, since=window.step, until=following)
        else:
            asked = live.ratios(self.pruning_ratio)
            names = [name for name in live.report.groups if self.target is not None or asked[name]]
            self._shrinking.begin(live.units(names), {}, since=window.start_step or 0, until=window.end_step or 0)

    def _goal(
        self, trainer: pl.Trainer, live: LiveChannels, statistics: Mapping[str, Mapping[str, Tensor]], step: int
    ) -> tuple[float, float] | None:
        """Return the ratio that reaches what is due of the goal at a step, and what it leaves; None without a goal."""
        if self.target is None:
            return None
        due, last = 1.0 - self._due(1.0 - self.target.fraction, step), self.window.progress(step) == 1.0
        dense = partial(dense_copy, self._whole, self._prefix)
        options: Any = {"dense": dense, "last": last, "strict": self.strict, "who": self.label}
        return ratio_for(trainer, live, self.target, due, statistics, **options)

    def _pools(self, live: LiveChannels, step: int, found: tuple[float, float] | None = None) -> list[Pool]:
        """Return what is to be gone of which groups at a step; ``found`` is what :meth:`_goal` returned."""
        if found is not None:
            return [one_pool(found[0], live.report.groups, self.allocation)]
        return live.pools(self.pruning_ratio, partial(self._due, step=step))

    def _due(self, final: float, step: int | None = None) -> float:
        """Return which part of a fraction is due at a step, now by default."""
        return self.schedule(self.window.progress(step), 0.0, final)

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
        miss = None if self.target is not None else live.shortfall(self._pools(live, self.window.step))
        fewer = f", {miss.channels} fewer than asked" if miss is not None and miss.channels else ""
        norm = self._leaving_norm
        small = "" if norm is None else f" (the last with {norm:.0%} of their groups' mean norm)"
        rank_zero_info(
            f"{self.label}: step {self.window.step}, asked {self._words_of_asked(live)}; {before - now} of {before} "
            f"channels gone in {len(live.channels)} groups{rounded}{fewer}{small}; {left:.2%} of the parameters are "
            "left."
        )
        if miss is not None and miss.exceeds and self.window.closes_now:
            rank_zero_warn(f"{self.label}: {miss.sentence()}")
        metrics = {"channels/parameters": left}
        if norm is not None:
            metrics["channels/leaving_norm"] = norm
        if self.target is not None and self.target.figure != "parameters" and self._reached is not None:
            metrics[f"channels/{self.target.figure}"] = self._reached
        self.log_event(trainer, pl_module, metrics)

    def _words_of_asked(self, live: LiveChannels) -> str:
        if self.target is not None:
            return f"{1.0 - self._due(1.0 - self.target.fraction):.2%} of the dense {self.target.figure}"
        dense, ratios = live.dense.channels, live.ratios(self.pruning_ratio)
        gone = sum(dense[name] * self._due(ratio) for name, ratio in ratios.items())
        return f"{gone / sum(dense[name] for name in ratios):.2%} of the channels gone"

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window, dense model and gradients as plain types and tensors."""
        return {
            **super().state_dict(),
            "channels": None if self._dense is None else dict(self._dense.channels),
            "parameters": None if self._dense is None else self._dense.parameters,
            "macs": None if self._dense is None else self._dense.macs,
            "outputs": {} if self._dense is None else self._dense.outputs,
            "removed_at": self._recovery.removed_at,
            "batches_since": self._recovery.batches_since,
            "squares": self._statistics.state_dict(),
            "shrinking": self._shrinking.state_dict(),
            "coming": self._coming,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        channels = state_dict["channels"]
        self._dense = None
        if channels is not None:
            figures, outputs = (state_dict["parameters"], state_dict["macs"]), state_dict.get("outputs", {})
            self._dense = Dense(dict(channels), *figures, {name: list(each) for name, each in outputs.items()})
        self._recovery.removed_at = state_dict["removed_at"]
        self._recovery.batches_since = state_dict["batches_since"]
        self._statistics.load_state_dict(state_dict["squares"])
        self._shrinking.load_state_dict(state_dict.get("shrinking"))  # files before 0.2 have none
        coming = state_dict.get("coming")
        self._coming = None if coming is None else (coming[0], coming[1])

    def plan_entry(self) -> dict[str, Any]:
        """Return what was asked, and what is left."""
        goal = self.pruning_ratio if self.target is None else {self.target.figure: self.target.fraction}
        entry = {"technique": "ChannelPruning", "asked": as_plain(goal)}
        if self._dense is None or getattr(self, "_target", None) is None:  # restored, and not fitted since
            return entry
        return {**entry, "parameters_left": self._dense.left_in(self._target)}

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what is left."""
        if self._dense is None:
            return f"{self.label}: the run ended before a batch was seen."
        ended = "" if self.reached_end else f"the run ended at step {self.window.step}, before the window's end; "
        return f"{self.label}: {ended}{self._dense.left_in(self._target):.2%} of the parameters are left."

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed, and restore momenta and learning rates."""
        self._inputs.release()
        self._read.release()
        self._recovery.release()
        super().release(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_target": None, "_live": None, "_whole": None}

    def _table(self, live: LiveChannels) -> str:
        ratios = live.ratios(self.pruning_ratio)
        removed = {name: f"{ratio:.0%}" if self.target is None else "to the goal" for name, ratio in ratios.items()}
        title = f"{self.label}: steps {self.window.start_step} to {self.window.end_step}"
        if self._shrinking:
            title += f", channels shrink by {self.regularization} (strength {self.strength:g})"
        return live.report.table(title, live.dense.channels, removed)
