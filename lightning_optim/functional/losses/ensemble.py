"""Logits of several teachers as those of one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ensemble_logits"]


def ensemble_logits(logits: list[Tensor], weights: list[float], *, dim: int = -1, binary: bool = False) -> Tensor:
    """Combine several teachers: the log of the weighted mean of their probabilities.

    Args:
        logits: ``[rows, ..., classes]`` each.
        weights: > 0, one per teacher; they are divided by their sum.
        dim: The dimension that holds the classes.
        binary: Whether each logit is an answer of its own: one logit per row, or several labels.

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
    if len({tuple(x.shape) for x in logits}) > 1:
        raise ValueError(f"teachers must agree in shape, got {', '.join(str(tuple(x.shape)) for x in logits)}.")
    shares = [math.log(weight / sum(weights)) for weight in weights]

    def mean(log_probabilities: list[Tensor]) -> Tensor:
        shifted = [x + share for x, share in zip(log_probabilities, shares, strict=True)]
        return torch.stack(shifted).logsumexp(0)

    if binary:
        return mean([F.logsigmoid(x.float()) for x in logits]) - mean([F.logsigmoid(-x.float()) for x in logits])
    return mean([x.float().log_softmax(dim) for x in logits])
