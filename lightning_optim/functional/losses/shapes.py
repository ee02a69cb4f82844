"""The check that all losses share."""

from torch import Tensor

__all__ = ["same_shape"]


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in float32.

    Raises:
        ValueError: If their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    return student.float(), teacher.float()
