"""Losses of logits: ``loss(student_logits, teacher_logits, *, temperature=..., **options) -> scalar``.

Both tensors are ``[rows, classes]``. A loss with ``needs=("targets",)`` gets the labels too. Attributes say more about
it: ``by_rows`` (a mean of one value per row, so rows may be compared some at a time), ``elementwise`` (entry by entry,
so the dimension of the classes does not matter), ``binary`` (each logit is an answer of its own), ``teacher_free`` (it
uses no teacher) and ``top_k`` (it compares a row's classes as a distribution, in any order, so that it can be computed
on k words and the rest, see ``top_k.py``).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.functional.losses.probabilities import (
    check_classes,
    check_targets,
    check_temperature,
    divergence,
    log_probabilities,
)
from lightning_optim.functional.losses.shapes import same_shape
from lightning_optim.registry import Registry

__all__ = [
    "LOSSES",
    "Loss",
    "bce",
    "cosine",
    "dist",
    "dkd",
    "jsd",
    "kd",
    "label_smoothing",
    "listwise",
    "logit_std",
    "mse",
    "reverse_kd",
]

Loss = Callable[..., Tensor]
LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("kd")
def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))``.

    Reduction: mean over the rows, sum over the classes, times T², so that the gradient keeps its size when T changes.

    Args:
        student_logits: ``[rows, classes]``, any float dtype.
        teacher_logits: The same shape.
        temperature: > 0; the higher, the more small probabilities count.

    Returns:
        A float32 scalar >= 0; 0 for equal probabilities.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or a row has fewer than 2 classes.

    Examples:
        >>> round(kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0).item(), 4)
        0.3278

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return divergence(student, teacher).mean() * temperature**2


@LOSSES.register("reverse_kd")
def reverse_kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T**2 * KL(softmax(student / T) || softmax(teacher / T))``: :func:`kd` with the two exchanged.

    :func:`kd` asks the student to cover everything that the teacher finds likely; this loss asks it to avoid what the
    teacher finds unlikely. A student too small for all of the teacher's answers then keeps the main ones. Reduction,
    arguments and errors as for :func:`kd`; the papers use T = 1.

    Returns:
        A float32 scalar >= 0; 0 for equal probabilities. Infinite if the teacher's logit of a class is ``-inf`` and the
        student's is not: use :func:`kd` or :func:`jsd` with teachers that exclude classes.

    Examples:
        >>> round(reverse_kd(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=1.0).item(), 4)
        0.3278

    References:
        Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models"; Agarwal et al. 2024, "On-Policy
        Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD).
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return divergence(teacher, student).mean() * temperature**2


@LOSSES.register("jsd")
def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence: both compared with their mixture.

    ``T**2 * (beta * KL(teacher || m) + (1 - beta) * KL(student || m))`` with ``m = beta * teacher + (1 - beta) *
    student``, all probabilities at temperature T. It is bounded, by ``T**2 * ln 2`` at 0.5. Near 0 it behaves like
    :func:`kd` (``jsd / beta`` tends to it), near 1 like :func:`reverse_kd` (``jsd / (1 - beta)`` tends to it).
    Reduction: mean over the rows, sum over the classes, times T².

    Args:
        student_logits: ``[rows, classes]``, any float dtype.
        teacher_logits: The same shape; ``-inf`` for a class that is excluded.
        temperature: > 0; the paper uses 1.
        beta: The teacher's share of the mixture, between 0 and 1 (both excluded). It also sets the size of the loss,
            which vanishes at both ends; to move from :func:`kd` to :func:`reverse_kd` use one of them.

    Returns:
        A float32 scalar >= 0; 0 for equal probabilities.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, ``beta`` is not between 0 and 1, or a row has
            fewer than 2 classes.

    Examples:
        >>> round(jsd(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])).item(), 4)  # ln 2
        0.6931

    References:
        Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        equation 1 (arXiv 2306.13649, 2023).
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"`beta` must be between 0 and 1, got {beta}. At both ends the divergence is 0: use loss='kd' (0) or "
            "loss='reverse_kd' (1)."
        )
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    finite = student.clamp_min(torch.finfo(torch.float32).min)  # the gradient of logaddexp(-inf, -inf) is NaN
    mixture = torch.logaddexp(teacher + math.log(beta), finite + math.log1p(-beta))
    divergences = beta * divergence(mixture, teacher) + (1.0 - beta) * divergence(mixture, student)
    return divergences.mean() * temperature**2


@LOSSES.register("logit_std")
def logit_std(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """:func:`kd` of logits standardized in each row, so the student need not match their size.

    ``(x - mean) / (std + 1e-7)`` with the standard deviation over ``classes - 1``. Reduction, arguments and errors as
    for :func:`kd`; the paper uses T = 2 and weight 9.

    References:
        Sun et al. 2024, "Logit Standardization in Knowledge Distillation".
    """
    check_classes(student_logits)
    return kd(_standardized(student_logits), _standardized(teacher_logits), temperature=temperature)


@LOSSES.register("dkd", needs=("targets",))
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    targets: Tensor,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """:func:`kd` split into the true class against all others (TCKD), and the others among themselves (NCKD).

    ``T**2 * (target_weight * TCKD + other_weight * NCKD)``; while :func:`kd` weights NCKD by the teacher's
    probability of the other classes, here it has its own weight. Reduction: mean over the rows, sum over the classes.

    Args:
        student_logits: ``[rows, classes]``.
        teacher_logits: The same shape.
        targets: True classes ``[rows]``, integers.
        temperature: > 0.
        target_weight: Weight of TCKD, the paper's alpha.
        other_weight: Weight of NCKD, the paper's beta: 8 on CIFAR-100, 0.5 on ImageNet.

    Returns:
        A float32 scalar >= 0, finite even if the softmax of a logit underflows.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, a row has fewer than 2 classes, or
            ``targets`` are not one class per row.

    References:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    check_targets(targets, student)
    index = targets.long().unsqueeze(-1)
    binary = divergence(_target_and_rest(student, index), _target_and_rest(teacher, index))
    others = divergence(_without(student, index), _without(teacher, index))
    return (target_weight * binary.mean() + other_weight * others.mean()) * temperature**2


def _target_and_rest(log_probabilities: Tensor, index: Tensor) -> Tensor:
    """Return log probabilities of the true class and of all others combined, ``[rows, 2]``."""
    true = log_probabilities.gather(-1, index)
    return torch.cat([true, _others(log_probabilities, index).logsumexp(-1, keepdim=True)], -1)


def _without(log_probabilities: Tensor, index: Tensor) -> Tensor:
    return _others(log_probabilities, index).log_softmax(-1)


def _others(tensor: Tensor, index: Tensor) -> Tensor:
    """Drop the true class of each row, ``[rows, classes - 1]``; masking it with -inf would give NaN gradients."""
    classes = tensor.shape[-1]
    position = torch.arange(classes - 1, device=tensor.device).expand(*tensor.shape[:-1], -1)
    return tensor.gather(-1, position + (position >= index))


@LOSSES.register("dist")
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    row_weight: float = 1.0,
    column_weight: float = 1.0,
) -> Tensor:
    """One minus the correlation of the probabilities, within each row and within each class over the batch.

    ``T**2 * (row_weight * (1 - mean row correlation) + column_weight * (1 - mean column correlation))``. The student
    must rank classes like the teacher, not match its numbers. The paper uses T = 1 and both weights 2; T = 4 was
    clearly worse on 77 classes (85.0 against 88.7 %).

    Args:
        student_logits: ``[rows, classes]``, at least 2 rows and 2 classes.
        teacher_logits: The same shape.
        temperature: > 0.
        row_weight: Weight of the correlation over classes, the paper's beta.
        column_weight: Weight of the correlation over rows, the paper's gamma.

    Returns:
        A float32 scalar in ``[0, 2 * T**2 * (row_weight + column_weight)]``.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or there is only one row.

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher".
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    if student.shape[0] < 2:
        raise ValueError(
            "loss 'dist' compares each class over the batch and needs at least 2 rows, got 1. Pass drop_last=True to "
            "the loader, or another batch size."
        )
    student, teacher = student.exp(), teacher.exp()
    rows = 1.0 - _correlation(student, teacher).mean()
    columns = 1.0 - _correlation(student.t(), teacher.t()).mean()
    return temperature**2 * (row_weight * rows + column_weight * columns)


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    left, right = left - left.mean(-1, keepdim=True), right - right.mean(-1, keepdim=True)
    return F.cosine_similarity(left, right, dim=-1, eps=1e-8)


@LOSSES.register("mse")
def mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits themselves. Reduction: mean over rows and classes.

    Args:
        student_logits: ``[rows, classes]``.
        teacher_logits: The same shape.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the shapes differ.

    References:
        Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation".
    """
    student, teacher = same_shape(student_logits, teacher_logits)
    return F.mse_loss(student, teacher)


mse.elementwise = True  # type: ignore[attr-defined]


@LOSSES.register("bce")
def bce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """For several labels per row, or one logit: ``T**2`` times the KL divergence of each label's yes and no.

    It is the binary cross-entropy with the teacher's probabilities minus the teacher's entropy, so the gradient is the
    same and equal logits give 0. Reduction: mean over rows and labels, times T².

    Arguments, result and errors as for :func:`kd`.
    """
    check_temperature(temperature)
    student, teacher = (x / temperature for x in same_shape(student_logits, teacher_logits))
    yes = F.logsigmoid(teacher).exp() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = F.logsigmoid(-teacher).exp() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).mean() * temperature**2


bce.binary = True  # type: ignore[attr-defined]
bce.elementwise = True  # type: ignore[attr-defined]


@LOSSES.register("cosine")
def cosine(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """One minus the cosine similarity of two rows, whose lengths do not matter. For embeddings.

    Reduction: mean over the rows.

    Args:
        student_logits: ``[rows, entries]``.
        teacher_logits: The same shape.

    Returns:
        A float32 scalar in [0, 2].

    Raises:
        ValueError: If the shapes differ or a row has one entry.
    """
    student, teacher = same_shape(student_logits, teacher_logits)
    check_classes(student)
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1).mean()


@LOSSES.register("listwise")
def listwise(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """For rankers that score a whole catalogue: the teacher's list as a distribution over all items.

    Without ``top_k`` this is :func:`kd` over the catalogue. With it, only the teacher's ``top_k`` best items have
    probability; all others stay in the student's softmax as negatives. A truncated list lost accuracy where this was
    measured (NDCG@20 .0347 against .0384), so truncate only to save memory.
    Reduction: mean over the rows, sum over the items, times T².

    Args:
        student_logits: Scores ``[rows, items]``.
        teacher_logits: The same shape; ``-inf`` for an item that is excluded.
        temperature: > 0.
        top_k: Number of the teacher's items that count; None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or ``top_k`` is not in [1, items].

    References:
        Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach" (top-one probabilities);
        Tang and Wang 2018, "Ranking Distillation".
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    if top_k is not None:
        if not 1 <= top_k <= teacher.shape[-1]:
            raise ValueError(f"`top_k` must be in [1, {teacher.shape[-1]}] (the items), got {top_k}.")
        teacher, items = teacher.topk(top_k, -1)
        teacher, student = teacher.log_softmax(-1), student.gather(-1, items)
    return divergence(student, teacher).mean() * temperature**2


@LOSSES.register("label_smoothing", needs=("targets",))
def label_smoothing(
    student_logits: Tensor, teacher_logits: Tensor | None = None, *, targets: Tensor, smoothing: float = 0.1
) -> Tensor:
    """The control: cross-entropy with smoothed labels, and no teacher.

    A teacher that does not beat it transfers nothing but smoothness. Reduction: mean over the rows.

    Args:
        student_logits: ``[rows, classes]``.
        teacher_logits: Not used.
        targets: True classes ``[rows]``, integers; -100 leaves a row out.
        smoothing: Probability spread evenly over all classes, in [0, 1].

    Returns:
        A float32 scalar >= 0; unlike the other losses, not 0 for equal logits.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1], a row has one class, or ``targets`` are not one class per row.

    References:
        Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization".
    """
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"`smoothing` must be a fraction in [0, 1], got {smoothing}.")
    check_classes(student_logits)
    check_targets(targets, student_logits)
    return F.cross_entropy(student_logits.float(), targets.long(), label_smoothing=smoothing)


label_smoothing.teacher_free = True  # type: ignore[attr-defined]

for _loss in (kd, reverse_kd, jsd, logit_std, dkd, mse, bce, cosine, listwise, label_smoothing):
    _loss.by_rows = True  # type: ignore[attr-defined]
for _loss in (kd, reverse_kd, jsd, listwise):
    _loss.top_k = True  # type: ignore[attr-defined]


def _standardized(logits: Tensor) -> Tensor:
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)
