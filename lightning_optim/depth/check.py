"""The check of a removal: it must be the same as letting the blocks pass on what they receive."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_optim.depth.hidden import skipping
from lightning_optim.depth.removal import without
from lightning_optim.errors import FAILURES, first_line
from lightning_optim.modules import without_fast_path
from lightning_optim.outputs import output_fields, output_tensors
from lightning_optim.structure import children_of

__all__ = ["call_repeatably", "differing", "same_as_skipping"]

TOLERANCE = 1e-5
"""Largest difference, as a fraction of the largest value; both compute the same sums in the same order."""


def same_as_skipping(
    root: nn.Module, call: Callable[[nn.Module], list[Any]], places: Mapping[str, Sequence[int]]
) -> str | None:
    """Compare the removal of blocks with skipping them, for the same inputs.

    Other blocks may use more of a block than the hidden state that it passes on (the position biases of T5's first),
    depend on their number, or be paired with layers of another list.

    Args:
        root: A copy of the model in eval mode; it is restored.
        call: Calls it once or more, and returns each output.
        places: Stack -> places of the blocks.

    Returns:
        What differs; None if both are the same.
    """
    blocks = [
        block
        for stack, gone in places.items()
        for place, block in enumerate(children_of(root.get_submodule(stack)).values())
        if place in gone
    ]
    try:
        with skipping(blocks):
            skipped = call_repeatably(root, call)
        with without(root, places):
            removed = call_repeatably(root, call)
    except FAILURES as error:
        return f"without it the forward pass fails: {first_line(error)}"
    problems = (differing(*pair) for pair in zip(skipped, removed, strict=True))
    return next((problem for problem in problems if problem is not None), None)


def call_repeatably(root: nn.Module, call: Callable[[nn.Module], list[Any]]) -> list[Any]:
    """Call a model so that the next call computes the same: random numbers too, and without fused attention."""
    with isolate_rng(), torch.no_grad(), without_fast_path():
        torch.manual_seed(0)
        return call(root)


def differing(skipped: Any, removed: Any) -> str | None:
    """Return how two outputs differ, None if they are the same.

    Parts of an output that hold an entry for each block (``hidden_states``, a cache) are longer where blocks are only
    skipped, and are not compared.
    """
    ours, theirs = _parts(skipped), _parts(removed)
    if ours.keys() != theirs.keys():
        return "the output has an entry for each block"
    compared = {name: (ours[name], theirs[name]) for name in ours if len(ours[name]) == len(theirs[name])}
    pairs = [pair for left, right in compared.values() for pair in zip(left, right, strict=True)]
    if not pairs:
        return "the output has an entry for each block"
    for left, right in pairs:
        if left.shape != right.shape:
            return f"the output changes its shape from {tuple(left.shape)} to {tuple(right.shape)}"
        if not _equal(left, right):
            return "other blocks use more of it than the hidden state that it passes on, or depend on their number"
    return None


def _parts(output: Any) -> dict[str, list[Tensor]]:
    if isinstance(output, Tensor):
        return {"": [output]}
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        named: dict[str, Any] = {str(place): item for place, item in enumerate(output)}
    else:
        named = output_fields(output) or {}
    return {name: output_tensors(item) for name, item in named.items()}


def _equal(left: Tensor, right: Tensor) -> bool:
    if torch.equal(left, right):
        return True
    if not left.is_floating_point() and not left.is_complex():
        return False
    left, right = (
        left.double() if left.is_floating_point() else left,
        right.double() if right.is_floating_point() else right,
    )
    largest = float(left.abs().max()) if left.numel() else 0.0
    return torch.allclose(left, right, rtol=0.0, atol=TOLERANCE * max(largest, 1e-12), equal_nan=True)
