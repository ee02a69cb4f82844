"""What losses over classes share: log probabilities, their divergence, and checks of shapes, labels and temperature."""

import math

import torch
from torch import Tensor

from lightning_optim.functional.losses.shapes import same_shape
from lightning_optim.functional.rows import IGNORED

__all__ = ["check_classes", "check_targets", "check_temperature", "divergence", "log_probabilities"]


def log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of both, float32, after the checks that all losses over classes need."""
    check_temperature(temperature)
    student, teacher = same_shape(student, teacher)
    check_classes(student)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of log probabilities, summed over the classes; excluded classes count as 0."""
    difference = (teacher - student).masked_fill_(teacher == -torch.inf, 0.0)
    return (teacher.exp() * difference).sum(-1)


def check_classes(logits: Tensor) -> None:
    """Reject one logit per row: its softmax is always 1, so the teacher would have no effect."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"the loss compares the classes of a row and needs at least 2, got logits {tuple(logits.shape)}. One logit "
            "per row is a binary answer: use loss='bce' (loss='mse' for a number)."
        )


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Reject labels that are not classes of the rows; values are checked on the CPU only, to wait for no device."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"`targets` must be one class per row, {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}."
        )
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = (int(end) for end in targets.masked_fill(targets == IGNORED, 0).aminmax())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"`targets` must be classes from 0 to {logits.shape[-1] - 1}, got {low if low < 0 else high}. Label "
            f"unlabeled rows {IGNORED}."
        )


def check_temperature(temperature: float) -> None:
    """Reject a temperature that is not a finite number > 0."""
    if not temperature > 0.0 or math.isinf(temperature):
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}. 4.0 is usual.")
