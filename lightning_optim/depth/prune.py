"""Depth pruning in one call, without a Trainer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_optim.calls import try_forward
from lightning_optim.checkpoint import plain_plan
from lightning_optim.checks import check_flags
from lightning_optim.depth.check import same_as_skipping
from lightning_optim.depth.judge import Judge, Run, block_needs
from lightning_optim.depth.removal import BlockRemoval
from lightning_optim.depth.stacks import find_stacks, number_of_blocks
from lightning_optim.functional.blocks import BLOCK_CRITERIA, BlockCriterion
from lightning_optim.measure.size import SIZES
from lightning_optim.modules import copy_module
from lightning_optim.progress import progress_bar
from lightning_optim.structure import children_of
from lightning_optim.structured.prune import PruningReport
from lightning_optim.tables import Listing, by_reason
from lightning_optim.target import ForwardInputs, Pattern, as_forward_calls, find_target

__all__ = ["DepthReport", "check_block_ratio", "prune_depth"]

_ADVICE = "they must be what the forward receives: a tensor, a tuple of arguments or a dict of keyword arguments."


@dataclass(frozen=True)
class DepthReport(PruningReport):
    """What :func:`prune_depth` removed.

    Attributes:
        blocks: (before, after) of each stack.
        removed: Names of the removed blocks, as they were before, in the order in which they were chosen.
        scores: The importance of each when it was chosen.
    """

    blocks: dict[str, tuple[int, int]]
    removed: list[str]
    scores: dict[str, float]

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the stacks' blocks that were removed."""
        before, after = (sum(pair[i] for pair in self.blocks.values()) for i in (0, 1))
        return 1 - after / before

    def listing(self) -> Listing:
        """Return what left each stack, and why other blocks were left alone."""
        rows = [
            (
                name,
                str(before),
                str(after),
                ", ".join(block.removeprefix(f"{name}.") for block in self.removed if block.startswith(f"{name}.")),
            )
            for name, (before, after) in self.blocks.items()
        ]
        rows += [(names, "", "", reason) for names, reason in by_reason(self.left_out)]
        before, after = self.parameters
        sentence = f"{len(self.removed)} blocks removed; parameters {before:,} -> {after:,}"
        return Listing(("stack", "before", "after", "removed, or why not"), rows, before=[sentence])

    def _counts(self) -> tuple[str, dict[str, tuple[int, int]]]:
        return "blocks", self.blocks


def check_block_ratio(ratio: Any) -> float | int:
    """Return a ratio of blocks: a fraction in (0, 1), or their number.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(
            f"`pruning_ratio` must be a float (a fraction of each stack's blocks) or an int (their number), got "
            f"{ratio!r}."
        )
    if isinstance(ratio, float) and not 0.0 < ratio < 1.0:
        raise ValueError(
            f"`pruning_ratio` as a float is a fraction in (0, 1) of each stack's blocks, got {ratio}. For a number of "
            "blocks pass an int."
        )
    if ratio < 1 and isinstance(ratio, int):
        raise ValueError(f"`pruning_ratio` as an int is a number of blocks >= 1, got {ratio}.")
    return ratio


def prune_depth(
    model: nn.Module,
    /,
    example_inputs: Any,
    *,
    pruning_ratio: float | int = 0.25,
    criterion: str | BlockCriterion = "influence",
    loss: Callable[[nn.Module], Any] | None = None,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> DepthReport:
    """Remove whole blocks from a model in place, once; the arguments are those of ``DepthPruning``.

    The pruned model is an ordinary model of its class with fewer blocks: train it, save it, export it. Build its
    optimizer afterwards. Attributes that number or count the blocks follow, and so does a configuration such as those
    of transformers (on a copy, since other models may hold the same one).
    Files that a Trainer saves from a LightningModule pruned here are loaded by
    :func:`lightning_optim.load_from_checkpoint`; for a plain module, ``conform(fresh, report.plan)`` makes a fresh one
    the same shape, so that ``load_state_dict`` takes its weights.

    Args:
        model: Any module. It is unchanged when an error is raised.
        example_inputs: What the forward of ``module`` (default: of the model) receives: a tensor, a tuple, or a dict of
            keywords; a list of these where one call does not reach all blocks. "influence" is measured on them, so
            pass a few dozen typical rows.
        pruning_ratio: Fraction of each stack's blocks to remove, in (0, 1), rounded half up; or their number (int).
        criterion: Name in ``functional.blocks.BLOCK_CRITERIA`` or a callable ``(facts) -> importance``.
        loss: For ``criterion="loss"``: ``loss(model) -> number``, lower is better, such as the mean loss over a few
            batches. It is called in eval mode and without gradients, once per candidate and removal, on a copy that
            shares the weights.
        module: Dotted name of the module whose stacks are pruned; default the whole model.
        include: Exactly the stacks or blocks that may be removed: names, glob patterns, classes of blocks.
        exclude: Stacks or blocks that stay.
        progress: Show a progress bar on rank zero where it takes longer than two seconds.

    Returns:
        What was removed, and why other blocks were left alone.

    Raises:
        ValueError: If nothing can be removed, more is asked for than can be removed, or ``loss`` is missing.
        RuntimeError: If the check finds that the removal as a whole is not the same as skipping the blocks.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))))
        >>> report = prune_depth(net, torch.randn(4, 8), pruning_ratio=0.5)
        >>> report.blocks, len(net[1])
        ({'1': (6, 3)}, 3)
    """
    ratio = check_block_ratio(pruning_ratio)
    judged_by = BLOCK_CRITERIA.resolve(criterion)
    check_flags(progress=progress)
    needs = block_needs(judged_by)
    if "loss" in needs and not callable(loss):
        raise ValueError(
            f"criterion={criterion!r} judges blocks by the loss without them: pass loss=callable(model) -> number, or "
            "take criterion='influence'."
        )
    prefix, target = find_target(model, module)
    copied = copy_module(model, share_weights=True)
    call = _caller(as_forward_calls(example_inputs), prefix.rstrip("."))
    found = find_stacks(copied, call, module, include, exclude)
    quota = {name: number_of_blocks(ratio, stack) for name, stack in found.stacks.items()}
    number = sum(quota.values())
    if not number:
        few = f"pruning_ratio={ratio!r} is less than half a block of {', '.join(quota)}"
        raise ValueError(f"prune_depth can remove nothing: {few if quota else found.reasons()}.")
    removable = {name: stack.removable for name, stack in found.stacks.items()}
    judge = Judge(copied, judged_by, [_run(call, loss if "loss" in needs else None)])
    with progress_bar("judging blocks", judge.passes(removable, number), shown=progress) as judge.advance:
        chosen = judge.choose(removable, quota, number)
    places: dict[str, list[int]] = {}
    for choice in chosen:
        places.setdefault(choice.stack, []).append(choice.place)
    problem = same_as_skipping(copied, call, places)
    if problem is not None:
        raise RuntimeError(f"prune_depth changed nothing: {problem}.")
    names = [f"{choice.stack}.{_key(model, choice.stack, choice.place)}" for choice in chosen]
    before = SIZES["parameters"](target)
    BlockRemoval(places)(model)
    return DepthReport(
        {},
        (int(before), int(SIZES["parameters"](target))),
        found.left_out,
        plain_plan(model),
        {name: (stack.blocks, stack.blocks - len(places.get(name, ()))) for name, stack in found.stacks.items()},
        names,
        {name: choice.score for name, choice in zip(names, chosen, strict=True)},
    )


def _caller(inputs: ForwardInputs, layer: str) -> Callable[[nn.Module], list[Any]]:
    """Return what calls a model, or a module below it, with each of the inputs."""

    def call(root: nn.Module) -> list[Any]:
        called = root.get_submodule(layer)
        return [
            try_forward(called, each, argument="`example_inputs`", advice=_ADVICE) for each in (inputs, *inputs.further)
        ]

    return call


def _run(call: Callable[[nn.Module], Any], loss: Callable[[nn.Module], Any] | None) -> Run:
    def run(root: nn.Module) -> float:
        if loss is not None:
            return float(loss(root))
        call(root)
        return math.nan

    return run


def _key(model: nn.Module, stack: str, place: int) -> str:
    return list(children_of(model.get_submodule(stack)))[place]
