"""What a measured gradient noise scale says about the global batch, and about more devices."""

from lightning_optim.functional.noise_scale import sample_efficiency, speedup

__all__ = ["batch_notes"]

TIMES = (2, 4, 8)
"""How many times as many devices are considered."""


def batch_notes(noise_scale: float, batch_size: int, devices: int) -> list[str]:
    """Return sentences on the global batch, and on what more devices with the same batch each would gain.

    Args:
        noise_scale: In samples.
        batch_size: Samples per device and step.
        devices: In all.
    """
    batch = batch_size * devices
    largest = max(1, round(noise_scale))
    per_device = max(1, round(noise_scale / devices))
    notes = [
        f"Batch: {batch:,} samples a step ({devices} x {batch_size}) at a noise scale of {noise_scale:,.4g} use "
        f"{sample_efficiency(batch, noise_scale):.0%} of the samples well; at {largest:,} ({devices} x {per_device}) "
        f"it is half, and twice the fewest steps are needed. {_advice(batch, noise_scale)}"
    ]
    gains = ", ".join(
        f"{times}x devices: {speedup(batch, times, noise_scale):.2f}x fewer steps for "
        f"{times / speedup(batch, times, noise_scale):.2f}x the samples"
        for times in TIMES
    )
    return [*notes, f"More devices with the same batch each, for the same loss: {gains}."]


def _advice(batch: int, noise_scale: float) -> str:
    if batch < noise_scale / 2:
        return "A larger batch saves steps at little cost in samples: scale the learning rate with it."
    if batch > 2 * noise_scale:
        return "The batch wastes samples: make it smaller, or use fewer devices."
    return "The batch is a fair trade between steps and samples."
