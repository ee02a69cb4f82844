"""WeightPruning: zeros that grow by a schedule while the model trains, and stay zero."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.callbacks.base import CompressionCallback, compressions
from lightning_optim.callbacks.masks import HeldMasks, zeros_of
from lightning_optim.callbacks.ranking import Ranking
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.functional.criteria import CRITERIA, Criterion
from lightning_optim.functional.masks import Granularity, parse_granularity
from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.functional.statistics import needs_of
from lightning_optim.optimizers import held_ids
from lightning_optim.patterns import Pattern, first_match
from lightning_optim.provenance import as_plain
from lightning_optim.sparsity.goals import Goal, check_goals, checked_sparsity, make_goals, number_of
from lightning_optim.sparsity.selection import check_weights, select, without_misfits
from lightning_optim.tables import by_reason, by_stack, render
from lightning_optim.target import Selection, find_target
from lightning_optim.window import Window

__all__ = ["WeightPruning"]


class WeightPruning(CompressionCallback):
    """Set the least important weights to zero while the model trains, more of them at every event.

    At each event of the window the schedule gives the sparsity due, the criterion ranks the weights, and the lowest
    become zero. From then on they stay zero: masks are applied right after every optimizer step, before any other
    forward pass, averaging or checkpoint sees the weights.

    Masks make a model smaller on disk (compressed) and prepare it for sparse kernels. They do **not** make dense
    kernels faster.

    Args:
        sparsity: Fraction of the selected weights that are zero at the end, in [0, 1); a dict
            ``{pattern: sparsity}``, the first matching pattern counts and what matches none stays dense (patterns
            choose among what is selected; one that is a layer's own name takes that layer in); ``"hold"``
            keeps the zeros a module has and prunes nothing (to fine-tune a sparse model); ``None`` means 0.8, or
            ``1 - n/m`` for ``n:m``.
        granularity: What is removed together: ``"weight"``, ``"row"`` (all weights of an output), ``"column"`` (all
            weights of an input), blocks such as ``"4x4"``, or ``"n:m"`` such as ``"2:4"``, which keeps n of each m
            consecutive inputs (of a convolution: input channels at one place of the kernel), as sparse tensor cores
            need it; ``"2:4@unfold"`` groups along input channel x kernel instead. Along the schedule the number kept
            falls from m to n. Layers that cannot have it (transposed convolutions, vectors, for n:m a number of inputs
            that is no multiple of m) are left out, and the table at fit start lists them. The outputs and inputs of a
            Conv1D (GPT-2) are those of a Linear, and each expert of a mixture is a matrix of its own.
        criterion: Name in ``functional.criteria.CRITERIA`` or a callable ``(weight, stats) -> scores``.
        scope: ``"global"`` ranks all selected weights (of one pattern) together, ``"layer"`` each layer (each expert)
            by itself.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable ``(u, initial, final) -> sparsity``.
        start: First event: a step (int) or a fraction of the planned steps (float).
        end: Last event, where the final sparsity is reached.
        every_n_steps: Steps between events.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly what is pruned (names, glob patterns, layer classes), instead of the default: matrices and
            kernels of all layers (experts too) but norms, embeddings and the last Linear/Conv. Biases only by
            ``"*.bias"``.
        exclude: What is left alone.

    Logged: ``pruning/sparsity`` and ``pruning/asked`` at every event (with the module's name at the end where several
    instances run). One line per event says asked and achieved.

    State: window, masks at one bit per weight, and for a criterion that needs the gradient one float32 per selected
    weight. A resumed run continues bit for bit; the weights in a checkpoint are the masked ones, so it loads
    everywhere. A new ``fit`` keeps the zeros that the module has. A run of 0.1 that is resumed keeps its order of n:m,
    which was ``"n:m@unfold"``.

    Strategies: a single device, DDP, and all that divide the model (``optim_zero2``, ``optim_fsdp``, ``optim_hsdp``,
    ``optim_tp``, ``optim_2d``): the masks are those of one process, whatever the number of devices. Live masks cost the
    memory of the selected weights (there: of the parts) once more.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, a name is unknown, or, at fit start, nothing is selected or the window
            lies outside of the run.

    References:
        Zhu and Gupta 2017, "To prune, or not to prune"; Mishra et al. 2021, "Accelerating Sparse Deep Neural
        Networks" (2:4).

    Examples:
        >>> pruning = WeightPruning(0.8, start=100, end=500, every_n_steps=100)
        >>> pruning.preview(1000)[-1]
        (500, 0.8)
    """

    def __init__(
        self,
        sparsity: float | dict[Pattern, float] | Literal["hold"] | None = None,
        *,
        granularity: str = "weight",
        criterion: Criterion | str = "magnitude",
        scope: Literal["global", "layer"] = "global",
        schedule: Schedule | str | dict[str, Any] = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        every_n_steps: int = 100,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        super().__init__(
            Window(start, end, every_n_steps=every_n_steps), module=module, include=include, exclude=exclude
        )
        self.granularity = parse_granularity(granularity)
        self._in_force = self.granularity  # another one in a resumed run of 0.1
        self.criterion = CRITERIA.resolve(criterion)
        self.schedule = SCHEDULES.resolve(schedule)
        if scope not in ("global", "layer"):
            raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")
        self.scope = scope
        self.sparsity = checked_sparsity(sparsity, self.granularity.final_sparsity)
        self._needs = needs_of(self.criterion)
        self._statistics = Collected(self._needs)
        self._held = HeldMasks()
        self._goals: list[Goal] = []
        self._to_reach_anew = False

    @property
    def reached_end(self) -> bool:
        """Whether the model is as sparse as requested."""
        return self.sparsity == "hold" or self.window.closed

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks in force, bool (True keeps), by the weight's name in ``state_dict()``; empty before any zero.

        Where a strategy shards the weights, every rank must ask: the masks are gathered.
        """
        return self._held.whole_masks()

    def preview(self, total_steps: int) -> list[tuple[int, float]]:
        """Return ``(step, sparsity)`` at every event of a run of ``total_steps`` on a dense model.

        Raises:
            TypeError: If there is no single sparsity (``"hold"``, or a dict).
        """
        if not isinstance(self.sparsity, float):
            raise TypeError(f"preview shows one sparsity, got {self.sparsity!r}.")
        window = Window(self.window.start, self.window.end, every_n_steps=self.window.every_n_steps)
        window.resolve(total_steps)
        return [(step, self._due(0.0, self.sparsity, window.progress(step))) for step in window.event_steps()]

    def _due(self, initial: float, final: float, progress: float) -> float:
        return max(initial, self.schedule(progress, min(initial, final), final))

    # What the base asks for.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the selected weights."""
        return {name: weight.parameter for name, weight in self._held.weights.items()}

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Select the weights, take masks from state or from the zeros that are there, and set the goals."""
        prefix, target = find_target(pl_module, self.module)
        self._in_force = self.granularity if fresh else self._in_force
        selection = self._select(target, prefix, selected_before=() if fresh else tuple(self._held.initial))
        self._held.weights = selection.chosen
        check_weights(selection)
        self._statistics.check(selection.chosen, pl_module)
        self.check_peers(trainer)
        if fresh:
            self._held.clear()
            self._statistics.clear()
            self._held.take_zeros(hold=self.sparsity == "hold")
        elif self._held.restored:
            self._held.take_restored()
            self._warn_of_old_order()
        devices = {name: parameter.device for name, parameter in self.target_parameters().items()}
        self._statistics.place(devices, self._held.part)
        weights, initial = self._held.weights, self._held.initial
        self._goals = make_goals(weights, self.sparsity, scope=self.scope, initial=initial, prefix=prefix)
        check_goals(self._goals, weights, self._in_force)
        if self._held:
            self._held.apply(trainer)
        rank_zero_info(self._table(selection))

    def _select(self, target: nn.Module, prefix: str, selected_before: Sequence[str]) -> Selection:
        patterns = self.sparsity if isinstance(self.sparsity, dict) else None
        selection = select(target, prefix, include=self.include, exclude=self.exclude, patterns=patterns)
        if self.sparsity == "hold":
            return selection
        return without_misfits(selection, self._in_force, selected_before, by_default=self.include is None)

    def after_step(self, optimizer: Optimizer) -> None:
        """Zero what the optimizer revived; collect statistics while the window is open."""
        collects = bool(self._statistics) and self.window.within
        if len(self._holders) == 1 and not collects:
            self._held.after_step(self._held.keeps)
            return
        held = held_ids(optimizer)
        parameters = {name: p for name, p in self.target_parameters().items() if id(p) in held}
        self._held.after_step(self._held.keeps if len(self._holders) == 1 else parameters)
        if collects:
            self._statistics.after_step(parameters)

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Slice masks and statistics with their weights; follow weights that moved, were removed or added.

        Removed channels held more zeros than those that stay, so the sparsity that was reached is reached anew.
        """
        self._to_reach_anew = bool(self._held) and self.sparsity != "hold"
        names = self._held.follow(changed)
        for goal in self._goals:
            goal.names = [names[name] for name in goal.names if name in names]
        self._goals = [goal for goal in self._goals if goal.names]
        self._statistics.follow(changed)
        if changed.added:
            self._take_in(pl_module, changed)

    def _take_in(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Select among the parameters that another technique added, as a resumed run does."""
        prefix, target = find_target(pl_module, self.module)
        selection = self._select(target, prefix, selected_before=tuple(self._held.initial))
        held, added = self._held.weights, set(changed.added)
        weights = {name: w for name, w in selection.chosen.items() if name in held or w.parameter in added}
        if weights.keys() == held.keys():
            return
        new = [name for name in weights if name not in held]
        rank_zero_info(f"{self.label}: {', '.join(new)} joined what is pruned.")
        self._held.take_in(weights)
        sparsity = self.sparsity
        if isinstance(sparsity, dict):  # a pattern may have matched nothing but what is gone
            used = {first_match(sparsity, name, weight.layer, prefix) for name, weight in weights.items()}
            sparsity = {pattern: fraction for pattern, fraction in sparsity.items() if pattern in used}
        self._goals = make_goals(weights, sparsity, scope=self.scope, initial=self._held.initial, prefix=prefix)

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is due, or the last one again where channels left since."""
        if self.sparsity == "hold":  # a resumed run has the window of the file, and no goals
            return
        again, self._to_reach_anew = self._to_reach_anew and not self.window.due(), False
        super().finish_batch(trainer, pl_module)
        if not again:
            return
        if self._statistics:
            zeros = f"{self._held.reached:.2%} of the selected weights are zero now"
            rank_zero_info(f"{self.label}: channels left; {zeros}.")
        else:
            self.apply_event(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers' inputs in the batches that lead to an event, where the criterion needs them."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.sparsity != "hold" and self.window.due(self.window.step + 1):
            self._statistics.watch(self._held.weights)

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the step; the one that leads to the event ends the watch, before other techniques call the model."""
        super().count_step(optimizer)
        if self._statistics.watching and self.window.due():
            self._statistics.stop()

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune to what the schedule asks now. A failed event leaves the model as it was."""
        self._statistics.stop()
        weights = self._held.weights
        if not weights:  # another technique removed all of them
            return
        asked = 0.0
        masks: dict[str, Tensor] = {}
        progress = self.window.progress()
        ranking = Ranking(
            trainer, self._held, self._statistics, self.criterion, self._needs, self._in_force, self.scope
        )
        division = ranking.division()
        for goal in self._goals:
            due = self._due(goal.initial, goal.final, progress)
            asked += due * number_of(weights, goal.names)
            if progress == 0.0:  # the schedule begins with what is there: nothing to rank
                masks |= {name: self._held.of(name) for name in goal.names}
            else:
                masks |= ranking.new_masks(division, goal, due)
        keeps = self._held.put(masks)
        self._held.check_ranks_agree(trainer, keeps)
        self._held.keeps = keeps
        self._statistics.clear()
        self._held.apply(trainer)
        self._report(trainer, pl_module, asked / number_of(weights))

    def state_dict(self) -> dict[str, Any]:
        """Return window, packed masks and what the criterion has collected, as plain types and tensors."""
        return {
            **super().state_dict(),
            "granularity": str(self._in_force),
            **self._held.state_dict(),
            "squares": self._statistics.state_dict(self._held.whole),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; masks are matched with the module at fit start."""
        super().load_state_dict(state_dict)
        self._held.load_state_dict(state_dict)
        self._restored = self._restored or self._held.restored
        self._in_force = _granularity_of(state_dict, self.granularity)
        self._statistics.load_state_dict(state_dict["squares"])

    def plan_entry(self) -> dict[str, Any]:
        """Return names and shapes of the masks, what was asked and what is reached."""
        return {
            "technique": "WeightPruning",
            "masks": {name: tuple(self._held.weights[name].parameter.shape) for name in self._held.keeps},
            "asked": as_plain(self.sparsity),
            "reached": self._held.reached,
        }

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what the weights are now."""
        weights = self._held.weights
        if not weights:
            return f"{self.label}: another technique removed all selected weights."
        zeros = sum(zeros_of(weight) for weight in weights.values())
        reached = f"{zeros / number_of(weights):.2%} of the selected weights are zero"
        if self.sparsity == "hold":
            return f"{self.label}: held the zeros of the module; {reached}."
        asked = sum(goal.final * number_of(weights, goal.names) for goal in self._goals) / number_of(weights)
        if self.reached_end:
            return f"{self.label}: asked {asked:.2%} zeros; {reached}."
        return (
            f"{self.label}: the run ended at step {self.window.step}, before the window's end at step "
            f"{self.window.end_step}: asked {asked:.2%} zeros; {reached}."
        )

    def resolve_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule, passed: int = 0) -> None:
        """Turn the window into steps, where there are events."""
        if self.sparsity != "hold":
            super().resolve_window(trainer, pl_module, passed)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed."""
        self._statistics.stop()
        super().release(pl_module)

    # Messages.

    def _warn_of_old_order(self) -> None:
        kernels = [name for name, weight in self._held.weights.items() if weight.parameter.ndim > 2]
        if self._in_force != self.granularity and self.sparsity != "hold" and kernels:
            rank_zero_warn(
                f"{self.label}: the file was written by 0.1, which grouped {self.granularity} along input channel x "
                f"kernel. The run keeps its masks and goes on as {str(self._in_force)!r}, which sparse tensor cores do "
                f"not take for kernels ({', '.join(kernels[:3])}). For {self.granularity} along input channels prune "
                "the dense model anew."
            )

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, asked: float) -> None:
        reached = self._held.reached
        rank_zero_info(
            f"{self.label}: step {self.window.step}, asked {asked:.2%} zeros, achieved {reached:.2%} "
            f"in {len(self._held.weights)} tensors."
        )
        end = _suffix(self, trainer)
        self.log_event(trainer, pl_module, {f"pruning/sparsity{end}": reached, f"pruning/asked{end}": asked})

    def _table(self, selection: Selection) -> str:
        finals = {name: goal.final for goal in self._goals for name in goal.names}
        asked = {name: f"{finals[name]:.2%}" if name in finals else "held" for name in selection.chosen}
        rows = by_stack(
            (name, "x".join(map(str, weight.parameter.shape)), asked[name], f"{self._in_force}, {self.scope}")
            for name, weight in selection.chosen.items()
        )
        rows += [(names, "", "-", reason) for names, reason in by_reason(selection.left_out)]
        start, end = self.window.start_step, self.window.end_step
        title = f"{self.label}: steps {start} to {end}" if self._goals else f"{self.label}: hold"
        return render(title, ("parameter", "shape", "zeros asked", "how, or why not"), rows)


def _granularity_of(state_dict: Mapping[str, Any], asked: Granularity) -> Granularity:
    """Return the granularity that a saved run goes on with; 0.1 wrote none, and its n:m ran along input x kernel."""
    if "granularity" in state_dict or asked.final_sparsity is None or str(asked).endswith("@unfold"):
        return asked
    return parse_granularity(f"{asked}@unfold")


def _suffix(pruning: WeightPruning, trainer: pl.Trainer) -> str:
    """Return what tells several instances' metrics apart: the module, else the included names, else a number."""
    peers = [peer for peer in compressions(trainer) if isinstance(peer, WeightPruning)]
    if len(peers) == 1:
        return ""
    names = [peer.module or "+".join(map(str, peer.include or ["all"])) for peer in peers]
    place = peers.index(pruning)
    return f"/{names[place]}" if names.count(names[place]) == 1 else f"/{names[place]}.{place}"
