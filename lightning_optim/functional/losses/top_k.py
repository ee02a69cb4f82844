"""Distributions over a vocabulary as k words and the rest: what a cache of a large teacher keeps of each position."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_optim.functional.losses.probabilities import check_classes

__all__ = ["TopK", "over_top_k", "top_k_of"]

_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 26
"""Logits that are worked on at a time: what fits a CPU's cache, and few launches of kernels elsewhere."""


class TopK(NamedTuple):
    """The k likeliest classes of each row and the probability of all others together.

    Attributes:
        log_probabilities: ``[rows, k]``, float32, natural logarithm, at temperature 1.
        words: The classes they belong to, ``[rows, k]``, integers.
        rest: Log probability of the classes that are not among them, ``[rows]``; -inf if there are none.
    """

    log_probabilities: Tensor
    words: Tensor
    rest: Tensor

    def rows(self, which: Any) -> "TopK":
        """Return some rows: a slice, indices or a mask."""
        return TopK(*(tensor[which] for tensor in self))


def top_k_of(logits: Tensor, k: int) -> TopK:
    """Return the k likeliest classes of each row with their log probabilities, and that of the rest.

    Args:
        logits: ``[rows, classes]``, any float dtype.
        k: From 1 to the number of classes.

    Returns:
        The classes in the order of their probability; without gradient. Beside ``logits`` no other tensor of their
        size is made.

    Raises:
        ValueError: If ``k`` is not from 1 to the number of classes.

    Examples:
        >>> kept = top_k_of(torch.tensor([[0.5, 0.25, 0.25]]).log(), 1)
        >>> kept.log_probabilities.exp(), kept.words, kept.rest.exp()
        (tensor([[0.5000]]), tensor([[0]]), tensor([0.5000]))
    """
    check_classes(logits)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"`k` must be from 1 to the {logits.shape[-1]} classes, got {k}.")
    with torch.no_grad():
        words = logits.topk(k, -1).indices
        coarse = _coarse_logits(logits, None, words).log_softmax(-1)
    return TopK(coarse[:, :-1], words, coarse[:, -1])


def over_top_k(student_logits: Tensor, teacher: TopK, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return student and teacher as distributions over the teacher's k words and one more class, the rest.

    A loss that compares the classes of a row as a distribution (:func:`kd`, for example) takes the two as its logits:
    ``kd(*over_top_k(student_logits, teacher), temperature=2.0)``. The student's logit of the rest is the log of the
    sum of the exponentials of its logits, so its softmax is the student's probability of all those words.

    With k = classes (or one less) nothing is lost: the loss is that of all classes. With fewer, at temperature 1, the
    KL divergence is at most that of all classes, and grows with k. **A temperature acts on the k + 1 probabilities**:
    the probability of the rest at another temperature is not known from the k words, so with few words and a
    temperature far from 1 the loss is another one than that of all classes. It is still 0 if and only if the student
    gives the k words, and the rest together, the teacher's probabilities.

    Leaving the rest out (the k words alone, with probabilities that sum to 1) gives a biased teacher: it tells the
    student that no other word is possible.

    Args:
        student_logits: ``[rows, classes]``, any float dtype. Its gradient is computed in blocks; beside that gradient
            and the logits themselves, neither pass makes a tensor of their size.
        teacher: Of as many rows.
        rows: Which rows of ``student_logits`` are the teacher's, ``[rows]``, each once; None: all. Their copy, which
            indexing would make, and the slow gradient of that are spared.

    Returns:
        Logits ``[rows, k + 1]`` of the student and of the teacher, float32, the rest last; ``[rows, k]`` if k is the
        number of classes.

    Raises:
        ValueError: If the numbers of rows differ, or there are more words than classes.

    References:
        Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", on the bias of the
        k words alone.

    Examples:
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
        >>> [x.softmax(-1) for x in over_top_k(student, top_k_of(teacher, 1))]
        [tensor([[0.2500, 0.7500]]), tensor([[0.5000, 0.5000]])]
    """
    check_classes(student_logits)
    count, k = teacher.words.shape
    given = len(student_logits) if rows is None else len(rows)
    if given != count or k > student_logits.shape[-1]:
        raise ValueError(
            f"student logits are {(given, student_logits.shape[-1])}, and the teacher has {count} rows of {k} words: "
            "the rows must be the same, and the words among the student's classes."
        )
    ours: Tensor = _Coarse.apply(student_logits, rows, teacher.words.long())  # type: ignore[no-untyped-call]
    theirs = torch.cat([teacher.log_probabilities, teacher.rest.unsqueeze(-1)], -1).float()
    if k == student_logits.shape[-1]:
        return ours[:, :-1], theirs[:, :-1]
    return ours, theirs


class _Coarse(torch.autograd.Function):
    """The logits of k words, and the log of the sum of the exponentials of all others: ``[rows, k + 1]``, float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor | None, words: Tensor) -> Tensor:
        coarse = _coarse_logits(logits, rows, words)
        ctx.save_for_backward(logits, rows, words, coarse[:, -1:].clone())
        return coarse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, words, rest = ctx.saved_tensors
        result = torch.empty_like(logits)
        if rows is not None:
            absent = torch.ones(len(logits), dtype=torch.bool, device=logits.device).index_fill_(0, rows, False)
            result.index_fill_(0, absent.nonzero().squeeze(-1), 0.0)
        rest = rest.nan_to_num(neginf=torch.inf)  # no other word: exp(-inf), a gradient of 0
        size = _rows_at_a_time(logits)
        for start in range(0, len(words), size):
            block = slice(start, start + size)
            part = _taken(logits, rows, block).sub_(rest[block]).exp_().mul_(gradient[block, -1:])
            part.scatter_(-1, words[block], gradient[block, :-1])
            if rows is None:
                result[block] = part
            else:
                result.index_copy_(0, rows[block], part.to(result.dtype))
        return result, None, None


def _coarse_logits(logits: Tensor, rows: Tensor | None, words: Tensor) -> Tensor:
    """Return the logits of the words and ``logsumexp`` over all others (-inf without any), ``[rows, k + 1]``.

    That is not the difference of two sums: where the k words have almost all of the probability, nothing of the rest is
    left of it in float32.
    """
    result = logits.new_empty((len(words), words.shape[-1] + 1), dtype=torch.float32)
    size = _rows_at_a_time(logits)
    for start in range(0, len(words), size):
        block = slice(start, start + size)
        part = _taken(logits, rows, block)
        result[block, :-1] = part.gather(-1, words[block])
        part.scatter_(-1, words[block], -torch.inf)
        highest = part.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        result[block, -1] = part.sub_(highest).exp_().sum(-1).log_().add_(highest.squeeze(-1))
    return result


def _taken(logits: Tensor, rows: Tensor | None, block: slice) -> Tensor:
    """Return some rows as a float32 copy."""
    if rows is not None:
        return logits.index_select(0, rows[block]).float()
    return torch.empty_like(logits[block], dtype=torch.float32).copy_(logits[block])


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, _BLOCK.get(logits.device.type, _BLOCK_ELSEWHERE) // max(1, logits.shape[-1]))
