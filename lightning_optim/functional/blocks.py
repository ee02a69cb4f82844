"""Importance of the blocks of a stack, and which of them are removed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.registry import Registry

__all__ = ["BLOCK_CRITERIA", "BlockCriterion", "BlockFacts", "influence", "last", "loss", "lowest", "random"]


@dataclass(frozen=True)
class BlockFacts:
    """What a criterion may ask of one block; what it does not ask for (``needs``) is None.

    Attributes:
        place: Its present place in the stack, from 0.
        blocks: Blocks in the stack now.
        loss: Loss of the judged batch without the block (``needs=("loss",)``).
        baseline: Loss of the same batch with it.
        hidden_in: Hidden state that the block receives, any shape (``needs=("hidden",)``).
        hidden_out: Hidden state that it returns, of the same shape.
        dim: Dimension of the hidden state that holds the features: -1, of images 1.
        generator: A CPU generator that depends on the block's name alone (``needs=("generator",)``).
    """

    place: int
    blocks: int
    loss: float | None = None
    baseline: float | None = None
    hidden_in: Tensor | None = None
    hidden_out: Tensor | None = None
    dim: int = -1
    generator: torch.Generator | None = None


BlockCriterion = Callable[[BlockFacts], float]
BLOCK_CRITERIA: Registry[BlockCriterion] = Registry("criterion")
"""``criterion(facts) -> importance`` of one block in one batch, higher is kept; batches are averaged.

With ``needs=("loss",)`` blocks are removed one after the other, each judged without those that are gone; other criteria
rank all blocks of an event together.
"""


@BLOCK_CRITERIA.register("loss", needs=("loss",))
def loss(facts: BlockFacts) -> float:
    """How much the loss rises without the block: ``loss - baseline``.

    Judged anew after each removal it sees that two blocks do the same, which a ranking of all blocks does not.

    Args:
        facts: With ``loss`` and ``baseline``.

    Returns:
        The rise, in units of the loss; negative where the model is better without the block.

    Raises:
        ValueError: If ``facts`` has no losses.

    Examples:
        >>> loss(BlockFacts(0, 4, loss=2.5, baseline=2.0))
        0.5

    References:
        Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
        Blocks" (section 3, with perplexity); Kim et al. 2024, "Shortened LLaMA".
    """
    if facts.loss is None or facts.baseline is None:
        raise ValueError("the criterion loss needs the loss.")
    return facts.loss - facts.baseline


@BLOCK_CRITERIA.register("influence", needs=("hidden",))
def influence(facts: BlockFacts) -> float:
    """Mean of 1 - cosine between the hidden states before and after the block.

    One forward pass ranks all blocks. It does not see what follows from the small difference.

    Args:
        facts: With ``hidden_in`` and ``hidden_out``, any float dtype; features in ``dim``.

    Returns:
        A number in [0, 2], averaged over rows and positions.

    Raises:
        ValueError: If ``facts`` has no hidden states.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> influence(BlockFacts(0, 4, hidden_in=x, hidden_out=torch.tensor([[0.0, 3.0], [0.0, 1.0]])))
        0.5

    References:
        Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
    """
    if facts.hidden_in is None or facts.hidden_out is None:
        raise ValueError("the criterion influence needs the hidden states.")
    similar = F.cosine_similarity(facts.hidden_in.float(), facts.hidden_out.float(), dim=facts.dim)
    return float((1.0 - similar).mean())


@BLOCK_CRITERIA.register("last")
def last(facts: BlockFacts) -> float:
    """The last blocks are removed first: minus the relative place of the block.

    Examples:
        >>> last(BlockFacts(3, 4)), last(BlockFacts(0, 4))
        (-1.0, -0.25)
    """
    return -(facts.place + 1) / facts.blocks


@BLOCK_CRITERIA.register("random", needs=("generator",))
def random(facts: BlockFacts, *, seed: int = 0) -> float:
    """A uniform score in [0, 1): the control. ``criterion={"random": {"seed": 1}}`` draws others.

    Raises:
        ValueError: If ``facts`` has no generator.
    """
    if facts.generator is None:
        raise ValueError("the criterion random needs the generator.")
    drawn = torch.rand(seed + 1, generator=facts.generator)
    return float(drawn[-1])


def lowest(
    scores: Mapping[str, float], stacks: Mapping[str, Sequence[str]], quota: Mapping[str, int], number: int
) -> list[str]:
    """Return the blocks with the lowest scores, of each stack at most its quota.

    Args:
        scores: Block -> importance.
        stacks: Stack -> its blocks that may be removed.
        quota: Stack -> how many of them may be removed at most.
        number: How many are wanted, of all stacks together; fewer where the quotas add up to less.

    Returns:
        Names, the lowest score first; equal scores in the order of ``stacks``. A block whose score is infinite stays.

    Raises:
        ValueError: If a score is NaN.

    Examples:
        >>> lowest({"a": 1.0, "b": 0.0, "c": 0.5}, {"s": ["a", "b"], "t": ["c"]}, {"s": 1, "t": 1}, 2)
        ['b', 'c']
    """
    wrong = [block for block, score in scores.items() if math.isnan(score)]
    if wrong:
        raise ValueError(f"the score of {wrong[0]} is nan; a criterion must return a number.")
    stack_of = {block: stack for stack, blocks in stacks.items() for block in blocks}
    left = dict(quota)
    found: list[str] = []
    for block in sorted(stack_of, key=scores.__getitem__):
        if len(found) < number and left[stack_of[block]] > 0 and scores[block] < math.inf:
            left[stack_of[block]] -= 1
            found.append(block)
    return found
