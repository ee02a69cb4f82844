"""Losses of features: ``loss(student_feature, teacher_feature, *, mask=None) -> scalar``.

A loss with ``needs=("projector",)`` gets the student's feature projected to the teacher's width. ``mask`` says which
positions of sequences count, ``[rows, positions]``, bool; None: all. The others do not change the result, and rows
without any position that counts are left out; if no row is left (of losses that compare rows: fewer than two), it is 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.functional.losses.shapes import same_shape
from lightning_optim.registry import Registry

__all__ = ["FEATURE_LOSSES", "FeatureLoss", "attention_transfer", "hint", "rkd", "similarity_preserving"]

FeatureLoss = Callable[..., Tensor]
FEATURE_LOSSES: Registry[FeatureLoss] = Registry("feature loss")


@FEATURE_LOSSES.register("hint", needs=("projector",))
def hint(student_feature: Tensor, teacher_feature: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of a feature and the teacher's, after a learned projection to the teacher's width.

    Reduction: mean over all entries of the positions that count. Images of different resolutions are averaged to the
    smaller one.

    Args:
        student_feature: ``[rows, ...]``, in the teacher's width.
        teacher_feature: The same shape, except for the resolution of images ``[rows, channels, height, width]``.
        mask: The positions that count, ``[rows, positions]``; None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the shapes differ in anything else.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
    """
    student, teacher = same_shape(*_same_resolution(student_feature, teacher_feature))
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
        if not len(student):
            return student.sum()
    return F.mse_loss(student, teacher)


@FEATURE_LOSSES.register("attention_transfer")
def attention_transfer(student_feature: Tensor, teacher_feature: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the attention maps ``mean over channels of f**2``, each normalized to length 1.

    Widths may differ, so it needs no projector. Reduction: mean over rows and positions.

    Args:
        student_feature: ``[rows, channels, height, width]``.
        teacher_feature: The same with any number of channels and any resolution.
        mask: The entries of dimension 1 that count, ``[rows, channels]``: positions of sequences; None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If a feature has fewer than 3 dimensions, or the positions of features that are not images differ.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention".
    """
    if student_feature.ndim < 3 or teacher_feature.ndim < 3:
        raise ValueError(
            "feature loss 'attention_transfer' needs [rows, channels, positions...], got "
            f"{tuple(student_feature.shape)} and {tuple(teacher_feature.shape)}. Use 'similarity_preserving' or 'rkd'."
        )
    student_feature, teacher_feature = _counted(student_feature, teacher_feature, mask)
    if not len(student_feature):
        return student_feature.float().sum()
    student, teacher = _same_resolution(student_feature, teacher_feature)
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher)]
    return F.mse_loss(*same_shape(*maps))


@FEATURE_LOSSES.register("similarity_preserving")
def similarity_preserving(student_feature: Tensor, teacher_feature: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the similarities between the rows of a batch, the row-normalized ``G G^T``.

    Widths may differ. Reduction: mean over the pairs of rows, which is the paper's ``1 / rows**2``.

    Args:
        student_feature: ``[rows, ...]``.
        teacher_feature: ``[rows, ...]``.
        mask: The positions that count, ``[rows, positions]``; the others are taken for zeros. None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the numbers of rows differ.

    References:
        Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation".
    """
    student, teacher = _same_rows(*_counted(student_feature, teacher_feature, mask))
    if not len(student):
        return student.sum()
    return F.mse_loss(F.normalize(student @ student.t(), dim=1), F.normalize(teacher @ teacher.t(), dim=1))


@FEATURE_LOSSES.register("rkd")
def rkd(student_feature: Tensor, teacher_feature: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Smooth L1 of the distances between the rows of a batch, divided by their mean (RKD-D).

    Widths may differ. Reduction: mean over the pairs of different rows. The distance of two equal rows has no
    gradient.

    Args:
        student_feature: ``[rows, ...]``, at least 2 rows.
        teacher_feature: ``[rows, ...]``.
        mask: The positions that count, ``[rows, positions]``; the others are taken for zeros. None: all.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: If the numbers of rows differ, or there is only one.

    References:
        Park et al. 2019, "Relational Knowledge Distillation", equations 5 and 6.
    """
    student, teacher = _same_rows(*_counted(student_feature, teacher_feature, mask))
    if mask is not None and len(student) < 2:
        return 0.0 * student.sum()
    if student.shape[0] < 2:
        raise ValueError(
            "feature loss 'rkd' compares rows and needs at least 2, got 1. Pass drop_last=True to the loader."
        )
    ours, theirs = F.pdist(student), F.pdist(teacher)
    return F.smooth_l1_loss(ours / ours.mean().clamp_min(1e-8), theirs / theirs.mean().clamp_min(1e-8))


def _counted(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows that have positions that count, with zeros at their other positions."""
    if mask is None:
        return student, teacher
    rows = mask.any(1)
    student, teacher = (torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))[rows] for x in (student, teacher))
    return student, teacher


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
