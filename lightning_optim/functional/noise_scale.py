"""The gradient noise scale: how large a batch may be before it wastes samples."""

import math

from lightning_optim.checks import check_choice

__all__ = ["gradient_moments", "sample_efficiency", "scale_learning_rate", "speedup"]

RULES = ("sqrt", "linear", "none")


def gradient_moments(small: float, big: float, *, small_batch: float, big_batch: float) -> tuple[float, float]:
    """Return unbiased estimates of ``|G|²`` and ``tr(Σ)`` from the gradients of two batch sizes.

    The gradient of a batch of B samples has ``E|G_B|² = |G|² + tr(Σ)/B``, whether or not the batches share samples.

    Args:
        small: ``|G_small|²``: squared norm of the mean gradient over ``small_batch`` samples; may be a mean over
            several such batches.
        big: ``|G_big|²``, over ``big_batch`` samples.
        small_batch: Samples.
        big_batch: Samples, more than ``small_batch``.

    Returns:
        Squared norm of the true gradient, and trace of the covariance of one sample's gradient. Either may be negative:
        the estimates have no bias, and noise. Average each of them before dividing.

    Raises:
        ValueError: If ``big_batch`` is not larger.

    Examples:
        >>> gradient_moments(3.0, 1.5, small_batch=4, big_batch=16)  # |G|² = 1, tr(Σ) = 8
        (1.0, 8.0)

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"`big_batch` must be larger than `small_batch`, got {big_batch} and {small_batch}.")
    squared = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    trace = (small - big) / (1.0 / small_batch - 1.0 / big_batch)
    return squared, trace


def sample_efficiency(batch_size: float, noise_scale: float) -> float:
    """Return which fraction of the samples of a batch small batches would have needed: ``1 / (1 + B / B_noise)``.

    Examples:
        >>> sample_efficiency(100, 100)
        0.5
    """
    return 1.0 / (1.0 + batch_size / noise_scale) if noise_scale > 0 else 0.0


def speedup(batch_size: float, times: float, noise_scale: float) -> float:
    """Return how many times fewer steps a batch that is ``times`` as large needs for the same loss.

    Examples:
        >>> speedup(100, 4, 100)
        1.6
    """
    return (1.0 + noise_scale / batch_size) / (1.0 + noise_scale / (times * batch_size))


def scale_learning_rate(lr: float, *, batch_size: int, base_batch_size: int, rule: str = "sqrt") -> float:
    """Return the learning rate for a batch size, from one that was tuned for another.

    Args:
        lr: Tuned for ``base_batch_size``.
        batch_size: The global batch: samples per device, times devices, times accumulated batches.
        base_batch_size: The global batch that ``lr`` was tuned for.
        rule: ``"linear"`` for SGD: a step of k batches replaces k steps. ``"sqrt"`` for Adam and its kin, whose step
            does not grow with the gradient. ``"none"`` returns ``lr``.

    Raises:
        ValueError: If a number is not positive, or the rule is unknown.

    Examples:
        >>> scale_learning_rate(1e-3, batch_size=256, base_batch_size=64)
        0.002
        >>> scale_learning_rate(0.1, batch_size=256, base_batch_size=64, rule="linear")
        0.4

    References:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD" (linear, with warm-up); Krizhevsky 2014, "One weird trick for
        parallelizing convolutional neural networks", and Malladi et al. 2022, "On the SDEs and Scaling Rules for
        Adaptive Gradient Algorithms" (square root).
    """
    check_choice("rule", rule, RULES)
    for name, value in (("lr", lr), ("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
    ratio = batch_size / base_batch_size
    return lr * {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[rule]
