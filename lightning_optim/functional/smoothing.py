"""Scales that move the range of activations into the weights that read them."""

import torch
from torch import Tensor

__all__ = ["smoothing_scales"]


def smoothing_scales(inputs: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """Return by what each input channel is divided, and the weights that read it multiplied.

    ``s = max|x|^alpha / max|w|^(1 - alpha)``, rounded to a power of two: dividing and multiplying by it are exact, so
    the product stays the same bit for bit.

    Args:
        inputs: Largest magnitude of each channel, ``[channels]``.
        weights: Largest magnitude of the weights that read it, ``[channels]``.
        alpha: Part of the range that moves, in (0, 1): 0.5 leaves both equally large.

    Returns:
        ``[channels]`` float32; 1 where a channel or its weights are all zero.

    References:
        Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        equation 4. Without the rounding to powers of two.

    Examples:
        >>> smoothing_scales(torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([8., 1., 1.])
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must be a number between 0 and 1, got {alpha!r}.")
    x, w = inputs.detach().double(), weights.detach().double()
    exponents = alpha * x.log2() - (1.0 - alpha) * w.log2()
    scales = torch.exp2(exponents.round().clamp(-_MOST, _MOST))
    return torch.where((x > 0) & (w > 0), scales, 1.0).float()


_MOST = 12.0
"""Largest exponent of two: weights of half precision leave room for it."""
