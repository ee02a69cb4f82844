"""WeightPruning: zeros that grow by a schedule while the model trains, and stay zero."""

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.optim import Optimizer

from lightning_optim.callbacks.base import CompressionCallback, compressions, ranks_per_batch
from lightning_optim.callbacks.division import Division, divide
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.functional.criteria import (
    CRITERIA,
    STATISTICS,
    Criterion,
    Statistics,
    parameter_generator,
    scores_of,
)
from lightning_optim.functional.masks import (
    Granularity,
    apply_masks,
    global_masks,
    keep_bits,
    pack_mask,
    parse_granularity,
    unpack_mask,
)
from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.functional.statistics import needs_of
from lightning_optim.functional.thresholds import Scores
from lightning_optim.modules import TRANSPOSED
from lightning_optim.patterns import Pattern, check_pattern, first_match, shown
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import copies, full, is_dtensor, local, reshard, shard_like, wrap_like
from lightning_optim.structured.removal import keep_channels
from lightning_optim.tables import by_reason, by_stack, render
from lightning_optim.target import Selection, Weight, averaged_copies, find_target, select_weights
from lightning_optim.window import Window

__all__ = ["WeightPruning"]

CHANCE_ZEROS = 1e-3
"""Fewer zeros than this fraction are not taken for an earlier pruning: initialisation and rounding leave a few."""


@dataclass
class _Goal:
    """Weights that are ranked together, the sparsity they began with and the one they end with."""

    names: list[str]
    initial: float
    final: float


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
            that is no multiple of m) are left out, and the table at fit start lists them.
        criterion: Name in ``functional.criteria.CRITERIA`` or a callable ``(weight, stats) -> scores``.
        scope: ``"global"`` ranks all selected weights (of one pattern) together, ``"layer"`` each layer by itself.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable ``(u, initial, final) -> sparsity``.
        start: First event: a step (int) or a fraction of the planned steps (float).
        end: Last event, where the final sparsity is reached.
        every_n_steps: Steps between events.
        module: Dotted name of the module to prune; default the whole model.
        include: Exactly what is pruned (names, glob patterns, layer classes), instead of the default: matrices and
            kernels of all layers but norms, embeddings and the last Linear/Conv. Biases only by ``"*.bias"``.
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
        self.sparsity = _checked_sparsity(sparsity, self.granularity.final_sparsity)
        self._needs = needs_of(self.criterion)
        self._weights: dict[str, Weight] = {}
        self._keeps: dict[str, Tensor] = {}
        self._removed = 0
        self._goals: list[_Goal] = []
        self._restored_masks: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        self._initial: dict[str, float] = {}
        self._statistics = Collected(self._needs)
        self._to_reach_anew = False

    @property
    def reached_end(self) -> bool:
        """Whether the model is as sparse as was asked."""
        return self.sparsity == "hold" or self.window.closed

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks in force, bool (True keeps), by the weight's name in ``state_dict()``; empty before any zero.

        Where a strategy divides the weights, every rank must ask: the masks are gathered.
        """
        return {name: self._whole(name, keep != 0) for name, keep in self._keeps.items()}

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
        return {name: weight.parameter for name, weight in self._weights.items()}

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Select the weights, take up masks from state or from the zeros that are there, and set the goals."""
        prefix, target = find_target(pl_module, self.module)
        self._in_force = self.granularity if fresh else self._in_force
        selected_before = () if fresh else tuple(self._initial)
        selection = self._that_fit(self._with_a_pattern(self._select(target, prefix), prefix), selected_before)
        self._weights = selection.chosen
        self._check_weights(selection)
        self._statistics.check(selection.chosen, pl_module)
        self.check_peers(trainer)
        if fresh:
            self._keeps, self._restored_masks = {}, {}
            self._statistics.clear()
            self._take_up_zeros()
        elif self._restored_masks:
            self._take_up_state()
            self._say_the_order()
        devices = {name: weight.parameter.device for name, weight in self._weights.items()}
        self._statistics.place(devices, self._part)
        self._goals = self._make_goals(prefix)
        self._check_goals()
        if self._keeps:
            self._apply(trainer, self._keeps)
        rank_zero_info(self._table(selection))

    def after_step(self, optimizer: Optimizer) -> None:
        """Zero what the optimizer revived; note gradients while the window is open."""
        if self._keeps:
            held = self._held_by(optimizer)
            apply_masks(self._held_parts(held), (self._keeps[name] for name in held))
        if self._statistics and self.window.within:
            self._statistics.after_step({name: self._weights[name].parameter for name in self._selected_by(optimizer)})

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Slice masks and statistics with their weights, and follow weights that moved or were removed.

        Removed channels held more zeros than those that stay, so the sparsity that was reached is reached anew.
        """
        self._to_reach_anew = bool(self._keeps) and self.sparsity != "hold"
        successors = {name: now for name in self._weights if (now := changed.successor(name)) is not None}
        for name, (_, parameter) in successors.items():
            kept = changed.surviving(name)
            if name in self._keeps and kept is not None:
                self._keeps[name] = keep_channels(self._keeps[name], kept, tuple(parameter.shape))
        self._weights = {
            now: replace(self._weights[name], name=now, parameter=parameter)
            for name, (now, parameter) in successors.items()
        }
        self._keeps = {now: self._keeps[name] for name, (now, _) in successors.items() if name in self._keeps}
        self._initial = {now: self._initial[name] for name, (now, _) in successors.items() if name in self._initial}
        for goal in self._goals:
            goal.names = [successors[name][0] for name in goal.names if name in successors]
        self._goals = [goal for goal in self._goals if goal.names]
        self._statistics.follow(changed)
        self._removed = sum(keep.numel() - int(torch.count_nonzero(keep)) for keep in self._keeps.values())

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is due, or the last one again where channels left since."""
        if self.sparsity == "hold":  # a resumed run has the window of the file, and no goals
            return
        again, self._to_reach_anew = self._to_reach_anew and not self.window.due(), False
        super().finish_batch(trainer, pl_module)
        if not again:
            return
        if self._statistics:
            rank_zero_info(f"{self.label}: channels left; {self._reached():.2%} of the selected weights are zero now.")
        else:
            self.apply_event(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers' inputs in the batches that lead to an event, where the criterion needs them."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        leads_to_event = self.sparsity != "hold" and self.window.due(self.window.step + 1)
        if leads_to_event:
            self._statistics.watch(self._weights)

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the step; the one that leads to the event ends the watch, before other techniques call the model."""
        super().count_step(optimizer)
        if self._statistics.watching and self.window.due():
            self._statistics.stop()

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune to what the schedule asks now. A failed event leaves the model as it was."""
        self._statistics.stop()
        asked = 0.0
        keeps: dict[str, Tensor] = {}
        progress = self.window.progress()
        division = self._divide(trainer)
        for goal in self._goals:
            due = self._due(goal.initial, goal.final, progress)
            asked += due * self._numel(goal.names)
            for name, mask in self._new_masks(trainer, division, goal, due).items():
                keeps[name] = keep_bits(mask, self._weights[name].parameter.dtype)
        asked /= self._numel(self._weights)
        self._check_ranks_agree(trainer, keeps)
        self._keeps = keeps
        self._statistics.clear()
        self._apply(trainer, keeps)
        self._report(trainer, pl_module, asked)

    def state_dict(self) -> dict[str, Any]:
        """Return window, packed masks and what the criterion has gathered, as plain types and tensors."""
        masks = self._packed_masks()
        return {
            **super().state_dict(),
            "granularity": str(self._in_force),
            "masks": {name: packed for name, (packed, _) in masks.items()},
            "shapes": {name: shape for name, (_, shape) in masks.items()},
            "initial": dict(self._initial),
            "squares": self._statistics.state_dict(self._whole),
        }

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole of what this rank holds a part of, as it does of the weight of that name."""
        weight = self._weights[name].parameter if name in self._weights else part
        if not is_dtensor(weight):
            return part
        bits = part.to(torch.uint8) if part.dtype == torch.bool else part
        return full(wrap_like(bits, weight)).to(part.dtype)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """Return the part that this rank holds of what has the shape of the weight of that name."""
        return local(shard_like(whole, self._weights[name].parameter))

    def _packed_masks(self) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Return the masks at one bit per weight; those of a loaded file as they came until a fit takes them up."""
        packed = {name: (pack_mask(mask), tuple(mask.shape)) for name, mask in self.masks.items()}
        return self._restored_masks or packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; masks are matched with the module at fit start."""
        super().load_state_dict(state_dict)
        self._restored_masks = {
            name: (packed, tuple(state_dict["shapes"][name])) for name, packed in state_dict["masks"].items()
        }
        self._restored = self._restored or bool(self._restored_masks)
        self._in_force = _granularity_of(state_dict, self.granularity)
        self._keeps = {}
        self._initial = dict(state_dict["initial"])
        self._statistics.load_state_dict(state_dict["squares"])

    def plan_entry(self) -> dict[str, Any]:
        """Return names and shapes of the masks, what was asked and what is reached."""
        return {
            "technique": "WeightPruning",
            "masks": {name: tuple(self._weights[name].parameter.shape) for name in self._keeps},
            "asked": as_plain(self.sparsity),
            "reached": self._reached(),
        }

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what the weights are now."""
        zeros = sum(_zeros(weight.parameter) for weight in self._weights.values())
        reached = f"{zeros / self._numel(self._weights):.2%} of the selected weights are zero"
        if self.sparsity == "hold":
            return f"{self.label}: held the zeros of the module; {reached}."
        asked = sum(goal.final * self._numel(goal.names) for goal in self._goals) / self._numel(self._weights)
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

    # Selection and goals.

    def _select(self, target: nn.Module, prefix: str) -> Selection:
        """Select by default or by ``include``; a sparsity pattern that is a layer's own name takes that layer in."""
        selection = select_weights(target, prefix, include=self.include, exclude=self.exclude)
        if self.include is not None or not isinstance(self.sparsity, dict):
            return selection
        layers = {name.rpartition(".")[0] for name in selection.left_out if name.endswith(".weight")}
        named = [p for p in self.sparsity if isinstance(p, str) and (p in layers or prefix + p in layers)]
        if not named:
            return selection
        exact = select_weights(target, prefix, include=named, exclude=self.exclude).chosen
        chosen = {**selection.chosen, **exact}
        return Selection(chosen, {name: why for name, why in selection.left_out.items() if name not in exact})

    def _with_a_pattern(self, selection: Selection, prefix: str) -> Selection:
        """Leave out what no pattern of a sparsity dict matches: it stays dense."""
        if not isinstance(self.sparsity, dict):
            return selection
        chosen = {n: w for n, w in selection.chosen.items() if self._first_pattern(w, prefix) is not None}
        unmatched = {name: "no pattern of sparsity" for name in selection.chosen if name not in chosen}
        return Selection(chosen, {**unmatched, **selection.left_out})

    def _that_fit(self, selection: Selection, selected_before: Collection[str]) -> Selection:
        """Leave out what the granularity does not fit; what an earlier part of this run selected stays in."""
        if self.sparsity == "hold":
            return selection
        new = {name: weight for name, weight in selection.chosen.items() if name not in selected_before}
        misfits = {name: reason for name, weight in new.items() if (reason := self._misfit(weight)) is not None}
        chosen = {name: weight for name, weight in selection.chosen.items() if name not in misfits}
        return Selection(chosen, {**misfits, **selection.left_out})

    def _misfit(self, weight: Weight) -> str | None:
        if str(self._in_force) == "weight" or isinstance(weight.parameter, UninitializedTensorMixin):
            return None
        if weight.parameter.ndim < 2:
            return f"a vector, which has no {self._in_force}"
        if isinstance(weight.layer, TRANSPOSED) or type(weight.layer).__name__ == "Conv1D":
            return f"{type(weight.layer).__name__}, stored as [in, out, ...]: no {self._in_force}"
        return self._in_force.misfit(weight.parameter.shape)

    def _check_weights(self, selection: Selection) -> None:
        if not selection.chosen:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in list(selection.left_out.items())[:6])
            raise MisconfigurationException(
                f"WeightPruning selects no layer: left out are {reasons or 'none, the module has no parameters'}. "
                "Name what to prune with include=[...]."
            )
        for name, weight in selection.chosen.items():
            problem = _problem(weight.parameter)
            if problem:
                layer = name.rpartition(".")[0]
                raise MisconfigurationException(
                    f"WeightPruning cannot prune {name}: it is {problem}. Pass exclude=[{layer!r}]."
                )

    def _take_up_zeros(self) -> None:
        """Hold the zeros that the module has: what was once removed stays removed."""
        zeros = {name: _zeros(weight.parameter) for name, weight in self._weights.items()}
        if sum(zeros.values()) == self._numel(self._weights):
            raise MisconfigurationException(
                f"all {self._numel(self._weights)} weights that WeightPruning selected are zero, so there is nothing "
                "to rank. Was the model initialised (or loaded)?"
            )
        # A layer that is zero as a whole was initialised so (a residual branch, an adapter), not pruned.
        held = {name for name, count in zeros.items() if 0 < count < self._weights[name].parameter.numel()}
        if sum(zeros[name] for name in held) <= CHANCE_ZEROS * self._numel(self._weights):
            held = set()
        if self.sparsity == "hold":
            held = {name for name, count in zeros.items() if count}
        self._initial = {name: zeros[name] / self._numel([name]) if name in held else 0.0 for name in self._weights}
        if held:
            for name, parameter in self.target_parameters().items():
                part = local(parameter.detach())
                mask = part != 0 if name in held else torch.ones_like(part, dtype=torch.bool)
                self._keeps[name] = keep_bits(mask, parameter.dtype)
        elif self.sparsity == "hold":
            raise MisconfigurationException(
                f"WeightPruning('hold') keeps the zeros a module has, and the {len(self._weights)} selected weights "
                f"have {sum(zeros.values())}. Load the sparse weights first, or give a sparsity."
            )

    def _take_up_state(self) -> None:
        expected = {name: shape for name, (_, shape) in self._restored_masks.items()}
        found = {name: tuple(weight.parameter.shape) for name, weight in self._weights.items()}
        if expected != found:
            differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise MisconfigurationException(
                f"the checkpoint's masks do not fit the module: {differ[0]} is {expected.get(differ[0], 'absent')} in "
                f"the checkpoint and {found.get(differ[0], 'absent')} in the selection. Resume with the model and the "
                "selection that wrote the file."
            )
        self._keeps = {
            name: keep_bits(self._part(name, unpack_mask(packed, shape)), self._weights[name].parameter.dtype)
            for name, (packed, shape) in self._restored_masks.items()
        }
        self._restored_masks = {}

    def _say_the_order(self) -> None:
        kernels = [name for name, weight in self._weights.items() if weight.parameter.ndim > 2]
        if self._in_force != self.granularity and self.sparsity != "hold" and kernels:
            rank_zero_warn(
                f"{self.label}: the file was written by 0.1, which grouped {self.granularity} along input channel x "
                f"kernel. The run keeps its masks and goes on as {str(self._in_force)!r}, which sparse tensor cores do "
                f"not take for kernels ({', '.join(kernels[:3])}). For {self.granularity} along input channels prune "
                "the dense model anew."
            )

    def _make_goals(self, prefix: str) -> list[_Goal]:
        if self.sparsity == "hold":
            return []
        groups: list[tuple[list[str], float]] = []
        if isinstance(self.sparsity, dict):
            first = {name: self._first_pattern(weight, prefix) for name, weight in self._weights.items()}
            for pattern, sparsity in self.sparsity.items():
                names = [name for name in self._weights if first[name] == pattern]
                if not names:
                    raise MisconfigurationException(
                        f"sparsity: {shown(pattern)} matches no selected layer that an earlier pattern does not match. "
                        f"Selected: {', '.join(self._weights)}."
                    )
                groups.append((names, sparsity))
        else:
            groups.append((list(self._weights), float(self.sparsity)))
        if self.scope == "layer":
            groups = [([name], sparsity) for names, sparsity in groups for name in names]
        return [_Goal(names, self._initial_of(names), sparsity) for names, sparsity in groups if names]

    def _first_pattern(self, weight: Weight, prefix: str) -> Pattern | None:
        patterns = self.sparsity if isinstance(self.sparsity, dict) else {}
        return first_match(patterns, weight.name, weight.layer, prefix)

    def _initial_of(self, names: Sequence[str]) -> float:
        return sum(self._initial.get(name, 0.0) * self._numel([name]) for name in names) / self._numel(names)

    def _check_goals(self) -> None:
        for goal in self._goals:
            if goal.initial > goal.final + max(CHANCE_ZEROS, self._largest_unit(goal) / self._numel(goal.names)):
                raise MisconfigurationException(
                    f"the module already has {goal.initial:.2%} zeros in {', '.join(goal.names[:3])}"
                    f"{' and more' if len(goal.names) > 3 else ''}, more than the {goal.final:.2%} asked. What is "
                    "removed stays removed: ask for more, or pass 'hold'."
                )

    def _largest_unit(self, goal: _Goal) -> float:
        """Return how many weights one unit may hold: what was reached may be as far from what was asked."""
        if str(self._in_force) == "weight":
            return 1.0
        shapes = [self._weights[name].parameter.shape for name in goal.names]
        return max(shape.numel() / min(shape[:2]) for shape in shapes)

    def _numel(self, names: Sequence[str] | Mapping[str, Any]) -> int:
        return sum(self._weights[name].parameter.numel() for name in names)

    # Events.

    def _divide(self, trainer: pl.Trainer) -> Division:
        """Say who ranks which weights: where a strategy divides them, all ranks together."""
        return divide(
            self.target_parameters(),
            trainer.strategy,
            by_element=getattr(self.criterion, "elementwise", False)
            and self._statistics.elementwise
            and "generator" not in self._needs,
            by_row=str(self._in_force) == "weight" or self._in_force.final_sparsity is not None,
        )

    def _new_masks(self, trainer: pl.Trainer, division: Division, goal: _Goal, due: float) -> dict[str, Tensor]:
        """Return the masks of the parts that this rank holds."""
        if self.window.progress() == 0.0:  # the schedule begins with what is there: nothing to rank
            return {name: self._mask(name) for name in goal.names}
        scores = {name: division.take(name, self._scores(trainer, division, name)) for name in goal.names}
        masks = global_masks(
            scores, due, self._in_force, previous=self._previous(division, goal), shards=division.shards
        )
        return {name: division.give(name, mask) for name, mask in masks.items()}

    def _previous(self, division: Division, goal: _Goal) -> dict[str, Tensor] | None:
        """Return the masks in force, of what this rank ranks."""
        held = {name: self._keeps[name] for name in goal.names if name in self._keeps}
        return {name: division.mask_of(name, keep != 0) for name, keep in held.items()} or None

    def _mask(self, name: str) -> Tensor:
        if name in self._keeps:
            return self._keeps[name] != 0
        return torch.ones_like(local(self._weights[name].parameter.detach()), dtype=torch.bool)

    def _scores(self, trainer: pl.Trainer, division: Division, name: str) -> Scores:
        parameter = self._weights[name].parameter.detach()
        weight = division.read(parameter)
        values = self._statistics.values(trainer, name, ranks_per_batch(trainer))
        for statistic in values:
            if STATISTICS[statistic].elementwise:
                values[statistic] = division.read(wrap_like(values[statistic], parameter))
        generator = parameter_generator(name) if "generator" in self._needs else None
        stats = Statistics(generator=generator, **values)
        return scores_of(self.criterion, weight, stats)

    def _selected_by(self, optimizer: Optimizer) -> list[str]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [name for name, weight in self._weights.items() if id(weight.parameter) in held]

    def _held_by(self, optimizer: Optimizer) -> list[str]:
        names = list(self._keeps) if len(self._holders) == 1 else self._selected_by(optimizer)
        return [name for name in names if name in self._keeps]

    def _apply(self, trainer: pl.Trainer, keeps: Mapping[str, Tensor]) -> None:
        """Mask the model and the averaged copies of it: an average of zeros stays zero from then on."""
        apply_masks(self._held_parts(keeps), keeps.values())
        reshard(trainer.lightning_module)
        self._removed = self._count_removed(trainer)
        for copy in averaged_copies(trainer):
            averaged = dict(copy.named_parameters())
            apply_masks((averaged[name] for name in keeps), (keeps[name].to(averaged[name].device) for name in keeps))

    def _held_parts(self, names: Iterable[str]) -> Iterator[Tensor]:
        return (local(self._weights[name].parameter.detach()) for name in names)

    def _count_removed(self, trainer: pl.Trainer) -> int:
        """Return how many weights the masks remove, of all ranks together."""
        removed = {name: keep.numel() - int(torch.count_nonzero(keep)) for name, keep in self._keeps.items()}
        if not any(is_dtensor(weight.parameter) for weight in self._weights.values()):
            return sum(removed.values())
        once = torch.tensor([removed[name] for name in self._keeps], device=trainer.strategy.root_device)
        everywhere = trainer.strategy.reduce(once, reduce_op="sum").tolist()
        shared = [copies(self._weights[name].parameter, trainer.world_size) for name in self._keeps]
        return sum(count // number for count, number in zip(everywhere, shared, strict=True))

    def _check_ranks_agree(self, trainer: pl.Trainer, keeps: Mapping[str, Tensor]) -> None:
        if trainer.world_size == 1 or any(is_dtensor(self._weights[name].parameter) for name in keeps):
            return  # parts differ, and are of masks that were made together
        checksum = 0
        for keep in keeps.values():
            checksum = zlib.crc32(pack_mask(keep != 0).cpu().numpy().tobytes(), checksum)
        ours = torch.tensor(float(checksum), dtype=torch.float64, device=trainer.strategy.root_device)
        low = trainer.strategy.reduce(ours.clone(), reduce_op="min")
        high = trainer.strategy.reduce(ours.clone(), reduce_op="max")
        if float(low) != float(high):
            raise RuntimeError(
                f"rank {trainer.global_rank} computed other masks than another rank (checksum {checksum:#x}): the "
                "weights or statistics differ between ranks. Does every rank train the same model?"
            )

    def _reached(self) -> float:
        return self._removed / self._numel(self._keeps) if self._keeps else 0.0

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, asked: float) -> None:
        reached = self._reached()
        rank_zero_info(
            f"{self.label}: step {self.window.step}, asked {asked:.2%} zeros, achieved {reached:.2%} "
            f"in {len(self._weights)} tensors."
        )
        if trainer.barebones:
            return
        end = self._suffix(trainer)
        metrics = {f"pruning/sparsity{end}": reached, f"pruning/asked{end}": asked}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log_dict(metrics, logger=False)

    def _suffix(self, trainer: pl.Trainer) -> str:
        """Return what tells several instances' metrics apart: the module, else the included names, else a number."""
        peers = [peer for peer in compressions(trainer) if isinstance(peer, WeightPruning)]
        if len(peers) == 1:
            return ""
        names = [peer.module or "+".join(map(str, peer.include or ["all"])) for peer in peers]
        place = peers.index(self)
        return f"/{names[place]}" if names.count(names[place]) == 1 else f"/{names[place]}.{place}"

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


def _checked_sparsity(
    sparsity: float | dict[Pattern, float] | str | None, final: float | None
) -> float | dict[Pattern, float] | Literal["hold"]:
    if sparsity is None:
        return 0.8 if final is None else final
    if sparsity == "hold":
        return "hold"
    if isinstance(sparsity, dict):
        if not sparsity:
            raise ValueError("`sparsity` as a dict maps patterns to fractions, got an empty one.")
        for pattern in sparsity:
            check_pattern("sparsity", pattern)
        return {pattern: _checked_fraction(value, final) for pattern, value in sparsity.items()}
    return _checked_fraction(sparsity, final)


def _checked_fraction(value: Any, final: float | None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`sparsity` must be a fraction in [0, 1), a dict of them, 'hold' or None, got {value!r}.")
    if not 0.0 <= value < 1.0:
        hint = f" For {value:g} % zeros pass {value / 100:g}." if 1 < value < 100 else ""
        raise ValueError(f"`sparsity` must be a fraction in [0, 1), got {value!r}.{hint}")
    if final is not None and abs(value - final) > 1e-9:
        raise ValueError(
            f"n:m granularity ends at the sparsity 1 - n/m = {final:g}, got sparsity={value:g}. Leave `sparsity` out, "
            "or take another granularity."
        )
    return float(value)


def _problem(parameter: Tensor) -> str | None:
    if isinstance(parameter, UninitializedTensorMixin):
        return "lazy (not initialised); run one forward pass before fit"
    if parameter.layout != torch.strided:
        return f"a sparse tensor ({parameter.layout})"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}, not floating point"
    return None


def _zeros(parameter: Tensor) -> int:
    return parameter.numel() - int(torch.count_nonzero(full(parameter.detach())))
