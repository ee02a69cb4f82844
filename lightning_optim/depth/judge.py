"""Candidates are judged: each block's importance, and the blocks that are removed one after the other."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_optim.depth.hidden import Call, feature_dim, watching
from lightning_optim.depth.removal import without
from lightning_optim.errors import FAILURES
from lightning_optim.functional.blocks import BlockCriterion, BlockFacts, lowest
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.modules import without_fast_path
from lightning_optim.structure import children_of

__all__ = ["Choice", "Judge", "Run", "block_needs"]

Run = Callable[[nn.Module], float]
"""Calls a model with one batch, and returns the loss; NaN where only the hidden states matter."""

_NEEDS = ("loss", "hidden", "generator")

REUSED_BYTES = 2**30
"""Outputs of blocks that are kept to skip what precedes a candidate."""


@dataclass(frozen=True)
class Choice:
    """A block that is to be removed.

    Attributes:
        stack: Name of its stack.
        place: Its place there, before any removal.
        score: Its importance when it was chosen.
    """

    stack: str
    place: int
    score: float

    @property
    def name(self) -> str:
        """Stack and place, for messages."""
        return f"{self.stack}.{self.place}"


def block_needs(criterion: Any) -> tuple[str, ...]:
    """Return what a block criterion asks for by its attribute ``needs``.

    Raises:
        ValueError: If it asks for anything but ``"loss"``, ``"hidden"`` and ``"generator"``.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    needs = tuple(getattr(criterion, "needs", ()))
    unknown = [need for need in needs if need not in _NEEDS]
    if unknown:
        raise ValueError(f"a block criterion can need {', '.join(map(repr, _NEEDS))}, got {unknown[0]!r}.")
    return needs


class Judge:
    """Scores the blocks of a model, which is restored after each score.

    Args:
        root: A copy of the model in eval mode.
        criterion: Scores one block in one batch.
        runs: One per batch; empty where the criterion looks at no batch.
        reuse: Whether blocks before a candidate may return what they returned with it.
        advance: Called after each pass through the model.
    """

    def __init__(
        self,
        root: nn.Module,
        criterion: BlockCriterion,
        runs: Sequence[Run],
        *,
        reuse: bool = True,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = root
        self.criterion = criterion
        self.needs = block_needs(criterion)
        self.runs = list(runs)
        self.reuse = reuse
        self.advance = advance

    @property
    def one_after_the_other(self) -> bool:
        """Whether blocks are judged anew after each removal."""
        return "loss" in self.needs

    def passes(self, removable: Mapping[str, Collection[int]], number: int) -> int:
        """Return how many passes through the model :meth:`choose` makes."""
        if not {"loss", "hidden"} & set(self.needs):
            return 0
        candidates = sum(map(len, removable.values()))
        if not self.one_after_the_other:
            return len(self.runs)
        return len(self.runs) * sum(1 + candidates - gone for gone in range(number))

    def choose(self, removable: Mapping[str, Sequence[int]], quota: Mapping[str, int], number: int) -> list[Choice]:
        """Return the blocks to remove.

        Args:
            removable: Stack -> places of its blocks that may be removed.
            quota: Stack -> how many of them may be removed at most.
            number: How many are removed, of all stacks together.

        Returns:
            ``number`` blocks at most, in the order in which they were chosen.

        Raises:
            ValueError: If a score is NaN, or no block can be removed without the loss becoming infinite.
        """
        chosen: list[Choice] = []
        left = dict(quota)
        while len(chosen) < number:
            gone: dict[str, list[int]] = {}
            for choice in chosen:
                gone.setdefault(choice.stack, []).append(choice.place)
            now = {
                stack: [place for place in places if place not in gone.get(stack, ())]
                for stack, places in removable.items()
                if left[stack] > 0
            }
            with without(self.root, gone):
                scores = self.scores(now, gone)
            named = {f"{stack}.{place}": Choice(stack, place, score) for (stack, place), score in scores.items()}
            stacks = {stack: [f"{stack}.{place}" for place in places] for stack, places in now.items()}
            wanted = 1 if self.one_after_the_other else number
            found = lowest({name: choice.score for name, choice in named.items()}, stacks, left, wanted)
            if not found:
                raise ValueError("without any further block the loss is infinite or NaN, so that none is removed.")
            for name in found:
                left[named[name].stack] -= 1
                chosen.append(named[name])
        return chosen

    def scores(
        self, removable: Mapping[str, Sequence[int]], gone: Mapping[str, Sequence[int]] | None = None
    ) -> dict[tuple[str, int], float]:
        """Return the importance of blocks.

        Args:
            removable: Stack -> places of the blocks to score.
            gone: Stack -> places of blocks that are removed now; places count with them.
        """
        gone = gone or {}
        blocks = {
            (stack, place): list(children_of(self.root.get_submodule(stack)).values())[_now(place, gone.get(stack, ()))]
            for stack, places in removable.items()
            for place in places
        }
        runs: Sequence[Run | None] = self.runs if {"loss", "hidden"} & set(self.needs) else [None]
        totals = dict.fromkeys(blocks, 0.0)
        for run in runs:
            for key, score in self._in_batch(run, blocks, gone).items():
                totals[key] += score / len(runs)
        return totals

    def _in_batch(
        self, run: Run | None, blocks: Mapping[tuple[str, int], nn.Module], gone: Mapping[str, Sequence[int]]
    ) -> dict[tuple[str, int], float]:
        baseline, calls = math.nan, dict[tuple[str, int], list[Call]]()
        recorded = _Recorded.nothing()
        if run is not None:
            recorded, baseline = self._baseline(run, {stack for stack, _ in blocks})
            calls = {key: recorded.calls[block] for key, block in blocks.items()}
        scores = {}
        for (stack, place), block in blocks.items():
            key = (stack, place)
            now = _now(place, gone.get(stack, ()))
            loss = None
            if run is not None and "loss" in self.needs:
                with without(self.root, {stack: [now]}, recorded.before(block)):
                    loss = self._run(run)
                self.advance()
            facts = BlockFacts(
                place=now,
                blocks=len(children_of(self.root.get_submodule(stack))),
                loss=loss,
                baseline=baseline if "loss" in self.needs else None,
                generator=parameter_generator(f"{stack}.{place}") if "generator" in self.needs else None,
            )
            blown_up = loss is not None and not math.isfinite(loss)
            scores[key] = math.inf if blown_up else self._score(facts, block, calls.get(key, []))
        return scores

    def _baseline(self, run: Run, stacks: Collection[str]) -> "tuple[_Recorded, float]":
        """Run the model as it is, and find out whether what precedes a candidate can be reused."""
        reuse = self.reuse and "loss" in self.needs
        watched = {
            f"{name}.{key}": block
            for name, layer in self.root.named_modules()
            if _is_container(layer) and any(f"{stack}.".startswith(f"{name}.") for stack in stacks)
            for key, block in children_of(layer).items()
        }
        kept = REUSED_BYTES if reuse else 0
        with watching(watched, hidden="hidden" in self.needs, keep_bytes=kept) as calls:
            baseline = self._run(run)
        self.advance()
        if "loss" in self.needs and not math.isfinite(baseline):
            raise ValueError(f"the loss of a judged batch is {baseline}, so that no block can be judged by it.")
        recorded = _Recorded({watched[name]: own for name, own in calls.items()})
        if reuse:
            recorded.keep_if(lambda: self._same(run, baseline, recorded))
        return recorded, baseline

    def _run(self, run: Run) -> float:
        """Run the model; every pass begins with the same random state."""
        with isolate_rng(), torch.no_grad(), without_fast_path():
            return run(self.root)

    def _same(self, run: Run, baseline: float, recorded: "_Recorded") -> bool:
        """Whether the loss stays what it is when all blocks return what they returned before."""
        try:
            with without(self.root, {}, recorded.all()):
                return self._run(run) == baseline
        except FAILURES:  # something reads a layer inside of a block
            return False

    def _score(self, facts: BlockFacts, block: nn.Module, calls: Sequence[Call]) -> float:
        if "hidden" not in self.needs:
            return float(self.criterion(facts))
        pairs = [(call.hidden_in, call.hidden_out) for call in calls]
        scores = [
            float(self.criterion(_with(facts, hidden_in=before, hidden_out=after, dim=feature_dim(block, before))))
            for before, after in pairs
            if before is not None and after is not None
        ]
        return sum(scores) / len(scores) if scores else math.inf  # it is not called: nothing is known of it


def _with(facts: BlockFacts, **more: Any) -> BlockFacts:
    return BlockFacts(**{**vars(facts), **more})


def _now(place: int, gone: Sequence[int]) -> int:
    """Return the present place of a block, where those at ``gone`` are removed."""
    return place - sum(other < place for other in gone)


def _is_container(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.ModuleList, nn.Sequential))


class _StandIn(nn.Module):
    """Returns what a block returned before, call by call; its attributes are the block's."""

    def __init__(self, block: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        vars(self)["_block"], vars(self)["_outputs"], vars(self)["_next"] = block, outputs, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place = vars(self)["_next"] % len(vars(self)["_outputs"])
        vars(self)["_next"] = place + 1
        return vars(self)["_outputs"][place]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)


class _Recorded:
    """The calls of all blocks in one pass."""

    def __init__(self, calls: Mapping[nn.Module, list[Call]]) -> None:
        self.calls = calls
        self._usable = False

    @classmethod
    def nothing(cls) -> "_Recorded":
        return cls({})

    def keep_if(self, same: Callable[[], bool]) -> None:
        """Allow reuse if the outputs were kept and give the same loss; else forget them."""
        called = [call for calls in self.calls.values() for call in calls]
        self._usable = bool(called) and all(call.output is not None for call in called) and same()
        if not self._usable:
            for call in called:
                call.output = None

    def all(self) -> dict[nn.Module, nn.Module]:
        """Return a stand-in for each block that was called."""
        return {block: _StandIn(block, [call.output for call in calls]) for block, calls in self.calls.items() if calls}

    def before(self, candidate: nn.Module) -> dict[nn.Module, nn.Module]:
        """Return stand-ins for the blocks whose calls ended before the candidate was called."""
        own = self.calls.get(candidate)
        if not self._usable or not own:
            return {}
        return {
            block: _StandIn(block, [call.output for call in calls])
            for block, calls in self.calls.items()
            if calls and calls[-1].number < own[0].number and block is not candidate
        }
