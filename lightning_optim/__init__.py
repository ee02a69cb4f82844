"""PyTorch Lightning plugins that make a model smaller, faster and cheaper inside the Trainer you have."""

from lightning_optim._version import __version__
from lightning_optim.callbacks import ChannelPruning, CompressedCheckpoint, PerformanceScore, WeightPruning
from lightning_optim.checkpoint import conform, load_from_checkpoint
from lightning_optim.measure import LatencyResult, measure_latency

__all__ = [
    "ChannelPruning",
    "CompressedCheckpoint",
    "LatencyResult",
    "PerformanceScore",
    "WeightPruning",
    "__version__",
    "conform",
    "load_from_checkpoint",
    "measure_latency",
]
