"""DepthPruning: whole blocks leave the model while it trains, and the run goes on."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_optim.callbacks.base import CompressionCallback
from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.callbacks.judging import judging_copy, run_of_step
from lightning_optim.callbacks.kept_batches import BATCHES, KeptBatches, as_forward
from lightning_optim.change import Changed
from lightning_optim.checks import check_count
from lightning_optim.depth.check import same_as_skipping
from lightning_optim.depth.judge import Choice, Judge, Run, block_needs
from lightning_optim.depth.prune import check_block_ratio
from lightning_optim.depth.removal import BlockRemoval
from lightning_optim.depth.stacks import Stack, check_left, check_readers, find_stacks, number_of_blocks
from lightning_optim.functional.blocks import BLOCK_CRITERIA, BlockCriterion
from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.measure.size import SIZES
from lightning_optim.progress import progress_bar
from lightning_optim.sharding import is_sharded
from lightning_optim.target import ForwardInputs, Pattern, find_target
from lightning_optim.window import Window

__all__ = ["DepthPruning"]


@dataclass
class _Shrinking:
    """How far a stack is.

    Attributes:
        left: For each block that it has, its place at the start of the run.
        blocks: How many it had.
        number: How many of them are gone at the end.
        stay: Place at the start of a block that must stay -> why.
    """

    left: list[int]
    blocks: int
    number: int
    stay: dict[int, str]

    @property
    def quota(self) -> int:
        """How many are still to be removed."""
        return self.number - (self.blocks - len(self.left))

    @property
    def removable(self) -> list[int]:
        """Present places of the blocks that may be removed."""
        return [now for now, place in enumerate(self.left) if place not in self.stay]


@dataclass
class _Progress:
    """What the state holds of the stacks."""

    parameters: float
    stacks: dict[str, _Shrinking]
    removed: list[str] = field(default_factory=list)
    """Names of the removed blocks as they were at the start, in order."""

    @property
    def number(self) -> int:
        return sum(stack.number for stack in self.stacks.values())

    @property
    def blocks(self) -> int:
        return sum(stack.blocks for stack in self.stacks.values())

    @property
    def gone(self) -> int:
        return sum(stack.blocks - len(stack.left) for stack in self.stacks.values())

    def due(self, schedule: Schedule, progress: float) -> int:
        """Return how many blocks are to be gone at a point of the window."""
        if not self.blocks:  # another technique removed the stacks
            return 0
        return int(schedule(progress, 0.0, self.number / self.blocks) * self.blocks + 0.5)

    def note(self, chosen: Sequence[Choice]) -> None:
        """Note that blocks are gone."""
        self.removed += [f"{choice.stack}.{self.stacks[choice.stack].left[choice.place]}" for choice in chosen]
        for name, places in _by_stack(chosen).items():
            stack = self.stacks[name]
            stack.left = [place for now, place in enumerate(stack.left) if now not in places]


class DepthPruning(CompressionCallback):
    """Remove whole blocks from stacks while the model trains: it gets smaller and faster in proportion.

    At each event the blocks that matter least leave: their parameters, gradients, optimizer state and averaged copies.
    The others move up, and what numbers or counts them follows (``layer_idx``, a Hugging Face config). The optimizer,
    schedulers and the run stay; the checkpoint says what changed, and :func:`lightning_optim.load_from_checkpoint`
    rebuilds it in the user's class.

    A stack is a ``ModuleList`` or ``Sequential`` of three or more modules of one class whose hidden state (the output,
    or the first item of a tuple) keeps its shape. Each is tried once on a copy: removing a block must be the same as
    letting it pass on what it receives. A block of which others use more (the position biases of T5's first block), a
    list with layers for each block beside it, a stack that holds one block several times (ALBERT) and outputs with an
    entry per block are left alone, with the reason in the table at fit start. Attributes named ``hidden_states`` or a
    cache in the output may have an entry per block.

    Args:
        pruning_ratio: Fraction of each stack's blocks that is gone at the end (float in (0, 1), rounded half up), or
            their number (int).
        criterion: Name in ``functional.blocks.BLOCK_CRITERIA`` or a callable ``(facts) -> importance``. ``"loss"``: how
            much the loss of the module's own training step rises without the block, one block after the other, given
            those gone; ``"influence"``: 1 - cosine between the hidden states before and after it; ``"last"``;
            ``"random"``.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable.
        start: Where the window opens: a step (int) or a fraction of the planned steps (float).
        end: The last event.
        events: How many events, spread evenly over the window; None: one for each block.
        example_inputs: What the target's forward receives, for the trial of each block and for ``"influence"``.
            Default: the module's ``example_input_array`` for the trial, else both caught from training batches. A
            list holds the inputs of several calls, where one does not reach every block.
        module: Dotted name of the module whose stacks are pruned; default the whole model.
        include: Exactly the stacks or blocks that may leave: names, glob patterns, classes of blocks.
        exclude: Stacks or blocks that stay.

    How blocks are judged: on at most 16 rows of each of the last 4 training batches before an event (whole batches,
    where their tensors differ in rows), without gradients, in eval mode, on a copy that shares the weights and logs
    nothing: random state, metrics and BatchNorm statistics of the model are not touched. ``"loss"`` calls the training
    step once per candidate and removal; outputs of blocks before the candidate are reused. The others call the model
    at most once. Under DDP all ranks judge the batches of rank 0. ``"loss"`` cannot run a training step that optimizes
    manually, and refuses it.

    Logged at every event: ``depth/parameters`` (fraction of those at the start), ``depth/blocks`` (number of blocks),
    ``depth/seconds`` (what the event took; PerformanceScore does not count it as training time).

    State: the window, the stacks, and before an event the kept batches. A resumed run continues bit for bit, unless
    batches hold objects that no checkpoint can hold, which is a warning. Strategies: a single device and DDP (the model
    is wrapped anew after each event). Those that divide the model go on with one whose window is over, and refuse any
    other before the first step.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, a name is unknown, or, at fit start, the model has no stack of blocks.
        RuntimeError: If an event cannot remove what it has to.

    References:
        Song et al. 2024, "SLEB"; Men et al. 2024, "ShortGPT"; Kim et al. 2024, "Shortened LLaMA".

    Examples:
        >>> pruning = DepthPruning(0.33, criterion="influence", start=0.1, end=0.4)
        >>> pruning = DepthPruning(2, include=["model.layers"], exclude=["model.layers.0"])  # two blocks of one stack
    """

    instead = (
        "Take Trainer(strategy='optim_ddp') or a single device, or prune before the model is sharded: "
        "prune_depth(...), or load_from_checkpoint(...) of a pruned file, and train that."
    )

    def __init__(
        self,
        pruning_ratio: float | int = 0.25,
        *,
        criterion: BlockCriterion | str | dict[str, Any] = "loss",
        schedule: Schedule | str | dict[str, Any] = "linear",
        start: int | float = 0.1,
        end: int | float = 0.4,
        events: int | None = None,
        example_inputs: Any = None,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        super().__init__(Window(start, end, events=events), module=module, include=include, exclude=exclude)
        self.pruning_ratio = check_block_ratio(pruning_ratio)
        self.criterion = BLOCK_CRITERIA.resolve(criterion)
        self._needs = block_needs(self.criterion)
        self.schedule = SCHEDULES.resolve(schedule)
        if events is not None:
            check_count("events", events)
        self.events = events
        self._inputs = InputSource(example_inputs, 2, module, several=True)
        self._batches = KeptBatches(inputs="loss" not in self._needs)
        self._progress: _Progress | None = None

    # What the base asks for.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the target."""
        return dict(self._target.named_parameters())

    def selected(self) -> dict[str, nn.Module]:
        """Return the stacks, once they are known."""
        stacks = [] if self._progress is None else self._progress.stacks
        return {name: self._pl_module.get_submodule(name) for name in stacks}

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Take up the state, and find the stacks where the inputs are known already."""
        if is_sharded(pl_module) and not self.window.closed:
            raise MisconfigurationException(
                f"DepthPruning cannot remove blocks under {type(trainer.strategy).__name__}: their parameters are "
                "divided among the devices. Prune under 'optim_ddp' or on one device, and go on here from its file "
                "(ckpt_path) once the window is over, or load it with lightning_optim.load_from_checkpoint and leave "
                "DepthPruning out."
            )
        if "loss" in self._needs and not pl_module.automatic_optimization and not self.window.closed:
            raise MisconfigurationException(
                "DepthPruning(criterion='loss') runs the training step once more for each candidate, and that of "
                f"{type(pl_module).__name__} steps its optimizers itself (manual optimization). Take "
                "criterion='influence', which only calls the model, or 'last'."
            )
        self._pl_module, self._target = pl_module, find_target(pl_module, self.module)[1]
        if fresh:
            self._progress = None
            self._batches.clear()
        if self.events is None:
            self.window.events = None if self._progress is None else max(self._progress.number, 1)
        self._check_readers()
        self._inputs.prepare(pl_module, "DepthPruning")
        if self._progress is None and self._inputs.inputs is not None and not is_sharded(pl_module):
            self._find(trainer)
        self.check_peers(trainer)

    def _check_readers(self) -> None:
        """Refuse features of a distillation that name a block that may be removed."""
        if self.window.closed:
            return
        try:
            check_readers(self._pl_module, self._readers(), self.module, self.include, self.exclude)
        except ValueError as error:
            raise MisconfigurationException(f"DepthPruning: {error}") from error

    def _readers(self) -> Mapping[str, str]:
        ask: Any = getattr(type(self._pl_module), "read_layers", None)
        readers: Mapping[str, str] = {} if ask is None else ask(self._pl_module)
        return readers

    def register_hooks(self, trainer: pl.Trainer) -> None:
        """Watch the optimizers, and refuse those that cannot follow a removal."""
        super().register_hooks(trainer)
        self.check_holders("remove blocks")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches that lead to an event, and catch what forward receives where no example was given."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.window.closed:
            return
        if self._progress is None or self._event_follows():
            self._inputs.begin_batch(pl_module)
        if self._keeps and self._event_follows():
            self._batches.begin_batch(self._target, batch, batch_idx)

    @property
    def _keeps(self) -> bool:
        """Whether blocks are judged on training batches."""
        return "loss" in self._needs or ("hidden" in self._needs and self._inputs.given is None)

    def _event_follows(self) -> bool:
        """Whether the batch that begins is one of the last before an event."""
        return any(self.window.due(self.window.step + steps) for steps in range(1, BATCHES + 1))

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what was caught, and run the event that is due."""
        if not self.window.closed:
            self._read_caught(trainer, pl_module)
        super().finish_batch(trainer, pl_module)

    def _read_caught(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        caught = self._inputs.catching
        try:
            self._batches.end_batch(pl_module)
            self._inputs.end_batch(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"DepthPruning: {error}") from error
        if caught and self._inputs.inputs is not None:
            self._inputs.inputs = trainer.strategy.broadcast(self._inputs.inputs, src=0)
        if self._progress is None and self._inputs.inputs is not None:
            self._find(trainer)
            self.check_peers(trainer)

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Follow stacks that moved, and forget those that another technique removed."""
        if self._progress is None:
            return
        names = {name: changed.layer(name) for name in self._progress.stacks}
        self._progress.stacks = {new: self._progress.stacks[old] for old, new in names.items() if new is not None}

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what the schedule asks now. A failed event leaves the model as it was."""
        progress = self.window.progress()
        if self._progress is None and progress > 0.0:
            raise MisconfigurationException(
                "DepthPruning has an event before the first batch, and does not know the stacks yet. Pass "
                "`example_inputs`, or start at step 1 or later."
            )
        if self._progress is None:
            return
        began = time.perf_counter()
        due = self._progress.due(self.schedule, progress) - self._progress.gone
        chosen = self._choose(trainer, pl_module, due) if due > 0 else []
        if chosen:
            self.commit(trainer, pl_module, BlockRemoval(_by_stack(chosen)))
            self._progress.note(chosen)
        self._batches.clear()
        self._say(trainer, pl_module, chosen, time.perf_counter() - began)

    def _known(self) -> _Progress:
        if self._progress is None:
            raise RuntimeError("the stacks are not known yet.")
        return self._progress

    # Judging.

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, number: int) -> list[Choice]:
        """Return the blocks to remove; all ranks judge the same batches, and rank 0 decides."""
        stacks = {name: stack for name, stack in self._known().stacks.items() if stack.quota > 0}
        root = judging_copy(trainer, pl_module)
        judge = Judge(root, self.criterion, self._runs(trainer))
        removable = {name: stack.removable for name, stack in stacks.items()}
        quota = {name: stack.quota for name, stack in stacks.items()}
        shown = bool(getattr(trainer, "progress_bar_callback", None))
        with progress_bar(f"{self.label}: judging blocks", judge.passes(removable, number), shown=shown) as advance:
            judge.advance = advance
            chosen: list[Choice] = trainer.strategy.broadcast(judge.choose(removable, quota, number), src=0)
        inputs = self._inputs.inputs
        problem = (
            None if inputs is None else same_as_skipping(root, _caller(self._inputs.layer, inputs), _by_stack(chosen))
        )
        if problem is not None:
            raise RuntimeError(f"{self.label} at step {self.window.step} changed nothing: {problem}.")
        return chosen

    def _runs(self, trainer: pl.Trainer) -> list[Run]:
        if not self._keeps:
            inputs = self._inputs.inputs
            return [] if inputs is None else [_run_of_call(_caller(self._inputs.layer, inputs))]
        items = trainer.strategy.broadcast(list(self._batches.items), src=0)
        if not items:
            raise MisconfigurationException(
                f"{self.label} has an event at step {self.window.step}, and no training batch to judge blocks on. "
                "Start at step 1 or later; if the run was resumed, go on from a file that was saved earlier."
            )
        if not self._batches.inputs:
            return [run_of_step(trainer, batch, index) for batch, index in items]
        device = trainer.strategy.root_device
        return [_run_of_call(_caller(layer, as_forward(kept, device))) for kept, layer in items]

    # Stacks.

    def _find(self, trainer: pl.Trainer) -> None:
        inputs = self._inputs.inputs
        if inputs is None:
            raise RuntimeError("no example inputs.")
        root = judging_copy(trainer, self._pl_module)
        try:
            found = find_stacks(root, _caller(self._inputs.layer, inputs), self.module, self.include, self.exclude)
            found = trainer.strategy.broadcast(found, src=0)
            numbers = {name: number_of_blocks(self.pruning_ratio, stack) for name, stack in found.stacks.items()}
            check_left(self._readers(), {name: stack.blocks - numbers[name] for name, stack in found.stacks.items()})
        except ValueError as error:
            raise MisconfigurationException(f"DepthPruning: {error}") from error
        if not sum(numbers.values()):
            few = f"pruning_ratio={self.pruning_ratio!r} is less than half a block of {', '.join(numbers)}"
            raise MisconfigurationException(f"DepthPruning can remove nothing: {few if numbers else found.reasons()}.")
        stacks = {name: _shrinking(stack, numbers[name]) for name, stack in found.stacks.items()}
        self._progress = _Progress(SIZES["parameters"](self._target), stacks)
        if self.events is None:
            self.window.events = self._progress.number
        title = f"{self.label}: steps {self.window.start_step} to {self.window.end_step}"
        rank_zero_info(found.table(title, numbers))

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return window, stacks and kept batches as plain types and tensors."""
        return {
            **super().state_dict(),
            "stacks": None if self._progress is None else asdict(self._progress),
            "batches": self._batches.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        stacks = state_dict["stacks"]
        self._progress = None
        if stacks is not None:
            shrinking = {name: _Shrinking(**stack) for name, stack in stacks["stacks"].items()}
            self._progress = _Progress(stacks["parameters"], shrinking, list(stacks["removed"]))
        self._batches.load_state_dict(state_dict["batches"])

    def plan_entry(self) -> dict[str, Any]:
        """Return what was asked, and what is gone."""
        entry: dict[str, Any] = {"technique": "DepthPruning", "asked": self.pruning_ratio}
        if self._progress is None:
            return entry
        blocks = {name: (stack.blocks, len(stack.left)) for name, stack in self._progress.stacks.items()}
        return {**entry, "blocks": blocks, "removed": list(self._progress.removed)}

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what is left."""
        if self._progress is None:
            return f"{self.label}: the run ended before a batch was seen."
        known = self._progress
        ended = "" if self.reached_end else f"the run ended at step {self.window.step}, before the window's end; "
        named = f" ({', '.join(known.removed)})" if known.removed else ""
        return (
            f"{self.label}: {ended}asked {known.number} of {known.blocks} blocks gone; {known.gone} are{named}; "
            f"{self._fraction_left():.2%} of the parameters are left."
        )

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove what the fit installed."""
        self._inputs.release()
        self._batches.release()
        super().release(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_target": None, "_pl_module": None}

    # Messages.

    def _fraction_left(self) -> float:
        return SIZES["parameters"](self._target) / self._known().parameters

    def _say(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Sequence[Choice], seconds: float
    ) -> None:
        known = self._known()
        left = self._fraction_left()
        named = [
            f"{name} ({choice.score:.4g})"
            for name, choice in zip(known.removed[len(known.removed) - len(chosen) :], chosen, strict=True)
        ]
        rank_zero_info(
            f"{self.label}: step {self.window.step}, removed {', '.join(named) or 'none'} in {seconds:.1f} s; "
            f"{known.gone} of {known.blocks} blocks gone; {left:.2%} of the parameters are left."
        )
        metrics = {
            "depth/parameters": left,
            "depth/blocks": float(known.blocks - known.gone),
            "depth/seconds": seconds,
        }
        self.log_event(trainer, pl_module, metrics)


def _shrinking(stack: Stack, number: int) -> _Shrinking:
    return _Shrinking(list(range(stack.blocks)), stack.blocks, number, dict(stack.stay))


def _by_stack(chosen: Sequence[Choice]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for choice in chosen:
        places.setdefault(choice.stack, []).append(choice.place)
    return places


def _caller(layer: str, inputs: ForwardInputs) -> Callable[[nn.Module], list[Any]]:
    return lambda root: inputs.call_each(root.get_submodule(layer))


def _run_of_call(call: Callable[[nn.Module], Any]) -> Run:
    def run(root: nn.Module) -> float:
        call(root)
        return math.nan

    return run
