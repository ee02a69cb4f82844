"""Distillation losses: how far a student's outputs are from its teacher's.

A logit loss is a function ``loss(student_logits, teacher_logits, *, temperature=..., **options) -> scalar`` of two
tensors ``[rows, classes]`` (:data:`LOSSES`); one that ``needs=("targets",)`` gets the labels too. A feature loss is
``loss(student_feature, teacher_feature) -> scalar`` (:data:`FEATURE_LOSSES`); one that ``needs=("projector",)`` wants
the student's feature in the teacher's width. All compute in float32 and in log space where probabilities are involved;
the gradient goes to the student alone when the teacher's tensor has none.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.functional.rows import IGNORED
from lightning_optim.registry import Registry

__all__ = [
    "FEATURE_LOSSES",
    "LOSSES",
    "FeatureLoss",
    "Loss",
    "attention_transfer",
    "bce",
    "cosine",
    "dist",
    "dkd",
    "ensemble_logits",
    "hint",
    "kd",
    "label_smoothing",
    "listwise",
    "logit_std",
    "mse",
    "rkd",
    "similarity_preserving",
]

Loss = Callable[..., Tensor]
FeatureLoss = Callable[[Tensor, Tensor], Tensor]
LOSSES: Registry[Loss] = Registry("loss")
FEATURE_LOSSES: Registry[FeatureLoss] = Registry("feature loss")


@LOSSES.register("kd")
def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))``.

    Reduction: mean over the rows, sum over the classes, times T², which keeps the gradient's size when T changes.

    Args:
        student_logits: ``[rows, classes]``, any float dtype.
        teacher_logits: The same shape.
        temperature: > 0; the higher, the more the small probabilities count.

    Returns:
        A float32 scalar >= 0; 0 when both say the same.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or a row has fewer than 2 classes.

    Examples:
        >>> round(kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0).item(), 4)
        0.3278

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    return _divergence(student, teacher).mean() * temperature**2


@LOSSES.register("logit_std")
def logit_std(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """:func:`kd` of logits that are standardised in each row: the student need not match their size.

    ``(x - mean) / (std + 1e-7)`` with the standard deviation of the population divided by ``classes - 1``. Reduction,
    args and errors as for :func:`kd`; the paper takes T = 2 and weight 9.

    References:
        Sun et al. 2024, "Logit Standardization in Knowledge Distillation".
    """
    _check_classes(student_logits)
    return kd(_standardised(student_logits), _standardised(teacher_logits), temperature=temperature)


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

    ``T**2 * (target_weight * TCKD + other_weight * NCKD)``; where :func:`kd` weighs NCKD by what the teacher leaves
    to the other classes, here it has a weight of its own. Reduction: mean over the rows, sum over the classes.

    Args:
        student_logits: ``[rows, classes]``.
        teacher_logits: The same shape.
        targets: True classes ``[rows]``, integers.
        temperature: > 0.
        target_weight: Weight of TCKD, the paper's alpha.
        other_weight: Weight of NCKD, the paper's beta: 8 on CIFAR-100, 0.5 on ImageNet.

    Returns:
        A float32 scalar >= 0, finite also where the softmax of a logit underflows.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, a row has fewer than 2 classes, or
            ``targets`` are not one class a row.

    References:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7.
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    _check_targets(targets, student)
    index = targets.long().unsqueeze(-1)
    binary = _divergence(_target_and_rest(student, index), _target_and_rest(teacher, index))
    others = _divergence(_without(student, index), _without(teacher, index))
    return (target_weight * binary.mean() + other_weight * others.mean()) * temperature**2


def _target_and_rest(log_probabilities: Tensor, index: Tensor) -> Tensor:
    """Return log probabilities of the true class and of all others together, ``[rows, 2]``."""
    true = log_probabilities.gather(-1, index)
    return torch.cat([true, _others(log_probabilities, index).logsumexp(-1, keepdim=True)], -1)


def _without(log_probabilities: Tensor, index: Tensor) -> Tensor:
    return _others(log_probabilities, index).log_softmax(-1)


def _others(tensor: Tensor, index: Tensor) -> Tensor:
    """Drop the true class from each row, ``[rows, classes - 1]``: no masked infinity, no NaN gradient."""
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
    has to rank as the teacher does, not to give the same numbers. The paper takes T = 1 and both weights 2; at T = 4 it
    was clearly worse on 77 classes (85.0 against 88.7 %).

    Args:
        student_logits: ``[rows, classes]``, at least 2 rows and 2 classes.
        teacher_logits: The same shape.
        temperature: > 0.
        row_weight: Weight of the correlation over classes, the paper's beta.
        column_weight: Weight of the correlation over rows, the paper's gamma.

    Returns:
        A float32 scalar in ``[0, 2 * T**2 * (row_weight + column_weight)]``.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or there is one row only.

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher".
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
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
    student, teacher = _same_shape(student_logits, teacher_logits)
    return F.mse_loss(student, teacher)


mse.elementwise = True  # type: ignore[attr-defined]


@LOSSES.register("bce")
def bce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """For several labels a row, or one logit: ``T**2`` times the KL divergence of each label's yes and no.

    It differs from the binary cross-entropy with the teacher's probabilities by the teacher's entropy alone, so the
    gradient is the same and equal logits give 0. Reduction: mean over rows and labels, times T².

    Args, result and errors as for :func:`kd`.
    """
    _check_temperature(temperature)
    student, teacher = (x / temperature for x in _same_shape(student_logits, teacher_logits))
    yes = F.logsigmoid(teacher).exp() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = F.logsigmoid(-teacher).exp() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).mean() * temperature**2


bce.binary = True  # type: ignore[attr-defined]
bce.elementwise = True  # type: ignore[attr-defined]


@LOSSES.register("cosine")
def cosine(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """One minus the cosine of the angle between two rows: their length does not matter. For embeddings.

    Reduction: mean over the rows.

    Args:
        student_logits: ``[rows, entries]``.
        teacher_logits: The same shape.

    Returns:
        A float32 scalar in [0, 2].

    Raises:
        ValueError: If the shapes differ or a row has one entry.
    """
    student, teacher = _same_shape(student_logits, teacher_logits)
    _check_classes(student)
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1).mean()


@LOSSES.register("listwise")
def listwise(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """For rankers that score a whole catalogue: the teacher's list as a distribution over all items.

    Without ``top_k`` this is :func:`kd` over the catalogue. With it only the teacher's ``top_k`` best items carry
    probability; all others stay in the student's softmax as negatives. A list cut short lost accuracy where this was
    measured (NDCG@20 .0347 against .0384), so cut only where memory asks for it.
    Reduction: mean over the rows, sum over the items, times T².

    Args:
        student_logits: Scores ``[rows, items]``.
        teacher_logits: The same shape; ``-inf`` for an item that must not be shown.
        temperature: > 0.
        top_k: How many of the teacher's items count; None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive, or ``top_k`` is not in [1, items].

    References:
        Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach" (top-one probabilities);
        Tang and Wang 2018, "Ranking Distillation".
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    if top_k is not None:
        if not 1 <= top_k <= teacher.shape[-1]:
            raise ValueError(f"`top_k` must be in [1, {teacher.shape[-1]}] (the items), got {top_k}.")
        teacher, items = teacher.topk(top_k, -1)
        teacher, student = teacher.log_softmax(-1), student.gather(-1, items)
    return _divergence(student, teacher).mean() * temperature**2


@LOSSES.register("label_smoothing", needs=("targets",))
def label_smoothing(
    student_logits: Tensor, teacher_logits: Tensor | None = None, *, targets: Tensor, smoothing: float = 0.1
) -> Tensor:
    """The control: cross-entropy with smoothed labels, and no teacher.

    A teacher that does not beat it teaches nothing but smoothness. Reduction: mean over the rows.

    Args:
        student_logits: ``[rows, classes]``.
        teacher_logits: Not used.
        targets: True classes ``[rows]``, integers; -100 leaves a row out.
        smoothing: Probability that is spread evenly over all classes, in [0, 1].

    Returns:
        A float32 scalar >= 0; unlike the other losses not 0 for equal logits.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1], a row has one class, or ``targets`` are not one class a row.

    References:
        Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization".
    """
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"`smoothing` must be a fraction in [0, 1], got {smoothing}.")
    _check_classes(student_logits)
    _check_targets(targets, student_logits)
    return F.cross_entropy(student_logits.float(), targets.long(), label_smoothing=smoothing)


label_smoothing.teacher_free = True  # type: ignore[attr-defined]


@FEATURE_LOSSES.register("hint", needs=("projector",))
def hint(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Mean squared difference of a feature and the teacher's, after a learned projection to the teacher's width.

    Reduction: mean over all entries. Images of other resolutions are averaged to the smaller one.

    Args:
        student_feature: ``[rows, ...]``, in the teacher's width.
        teacher_feature: The same shape, but for the resolution of images ``[rows, channels, height, width]``.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the shapes differ otherwise.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
    """
    student, teacher = _same_resolution(student_feature, teacher_feature)
    return F.mse_loss(*_same_shape(student, teacher))


@FEATURE_LOSSES.register("attention_transfer")
def attention_transfer(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Where the activation is strong: squared difference of the maps ``mean over channels of f**2``, of length 1 each.

    Widths may differ, so it needs no projector. Reduction: mean over rows and positions.

    Args:
        student_feature: ``[rows, channels, height, width]``.
        teacher_feature: The same with any number of channels and any resolution.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If a feature has fewer than 3 dimensions, or positions differ where they are no image.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention".
    """
    if student_feature.ndim < 3 or teacher_feature.ndim < 3:
        raise ValueError(
            "feature loss 'attention_transfer' needs [rows, channels, positions...], got "
            f"{tuple(student_feature.shape)} and {tuple(teacher_feature.shape)}. Take 'similarity_preserving' or 'rkd'."
        )
    student, teacher = _same_resolution(student_feature, teacher_feature)
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher)]
    return F.mse_loss(*_same_shape(*maps))


@FEATURE_LOSSES.register("similarity_preserving")
def similarity_preserving(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Which rows of a batch resemble each other: squared difference of the row-normalised ``G G^T``.

    Widths may differ. Reduction: mean over the pairs of rows, which is the paper's ``1 / rows**2``.

    Args:
        student_feature: ``[rows, ...]``.
        teacher_feature: ``[rows, ...]``.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the rows differ.

    References:
        Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation".
    """
    student, teacher = _same_rows(student_feature, teacher_feature)
    return F.mse_loss(F.normalize(student @ student.t(), dim=1), F.normalize(teacher @ teacher.t(), dim=1))


@FEATURE_LOSSES.register("rkd")
def rkd(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """How far the rows of a batch are from each other: smooth L1 of the distances, each over its mean (RKD-D).

    Widths may differ. Reduction: mean over the pairs of different rows. The distance of two equal rows has no
    gradient.

    Args:
        student_feature: ``[rows, ...]``, at least 2 rows.
        teacher_feature: ``[rows, ...]``.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the rows differ, or there is one only.

    References:
        Park et al. 2019, "Relational Knowledge Distillation", equations 5 and 6.
    """
    student, teacher = _same_rows(student_feature, teacher_feature)
    if student.shape[0] < 2:
        raise ValueError(
            "feature loss 'rkd' compares rows and needs at least 2, got 1. Pass drop_last=True to the loader."
        )
    ours, theirs = F.pdist(student), F.pdist(teacher)
    return F.smooth_l1_loss(ours / ours.mean().clamp_min(1e-8), theirs / theirs.mean().clamp_min(1e-8))


def ensemble_logits(logits: list[Tensor], weights: list[float], *, dim: int = -1, binary: bool = False) -> Tensor:
    """Combine several teachers: the log of the weighted mean of their probabilities.

    Args:
        logits: ``[rows, ..., classes]`` each.
        weights: > 0, one a teacher; they are divided by their sum.
        dim: Which dimension holds the classes.
        binary: Each logit is an answer of its own, as of one logit a row, or of several labels.

    Returns:
        Log probabilities (binary: log odds), float32; the logits themselves for one teacher.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> ensemble_logits([torch.tensor([0.0, 0.0]), torch.tensor([99.0, 0.0])], [1.0, 1.0]).exp()
        tensor([0.7500, 0.2500])
        >>> ensemble_logits([torch.tensor([0.0]), torch.tensor([99.0])], [1.0, 1.0], binary=True).sigmoid()
        tensor([0.7500])
    """
    if len(logits) == 1:
        return logits[0].float()
    if len({tuple(each.shape) for each in logits}) > 1:
        raise ValueError(f"teachers must agree in shape, got {', '.join(str(tuple(x.shape)) for x in logits)}.")
    shares = [math.log(weight / sum(weights)) for weight in weights]

    def mean(log_probabilities: list[Tensor]) -> Tensor:
        shifted = [each + share for each, share in zip(log_probabilities, shares, strict=True)]
        return torch.stack(shifted).logsumexp(0)

    if binary:
        return mean([F.logsigmoid(x.float()) for x in logits]) - mean([F.logsigmoid(-x.float()) for x in logits])
    return mean([each.float().log_softmax(dim) for each in logits])


def _log_softmax(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _check_temperature(temperature)
    student, teacher = _same_shape(student, teacher)
    _check_classes(student)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of log probabilities, summed over the classes; what the teacher excludes is 0."""
    weighted = teacher.exp() * (teacher - student)
    return torch.where(teacher == -torch.inf, torch.zeros_like(weighted), weighted).sum(-1)


def _standardised(logits: Tensor) -> Tensor:
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def _check_classes(logits: Tensor) -> None:
    """Refuse one logit a row: its softmax is 1 whatever it is, so the teacher would not be heard."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"the loss compares the classes of a row and needs at least 2, got logits {tuple(logits.shape)}. One logit "
            "a row is a binary answer, which loss='bce' compares (loss='mse' for a number)."
        )


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    """Refuse labels that are no classes of the rows; values are looked at where that waits for no device."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"`targets` must be one class a row, {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}.")
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = (int(end) for end in targets.masked_fill(targets == IGNORED, 0).aminmax())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"`targets` must be classes from 0 to {logits.shape[-1] - 1}, got {low if low < 0 else high}. Mark rows "
            f"without a label by {IGNORED}."
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0 or math.isinf(temperature):
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}. 4.0 is usual.")


def _same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    return student.float(), teacher.float()


def _same_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student and teacher must have the same rows, got {student.shape[0]} and {teacher.shape[0]}.")
    return student.float().flatten(1), teacher.float().flatten(1)


def _same_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two images to the smaller height and width."""
    student, teacher = student.float(), teacher.float()
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
