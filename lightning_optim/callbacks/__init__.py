"""Callbacks that compress the model of a running ``fit``, and that measure what it gained."""

from lightning_optim.callbacks.channel_pruning import ChannelPruning
from lightning_optim.callbacks.compressed_checkpoint import CompressedCheckpoint
from lightning_optim.callbacks.depth_pruning import DepthPruning
from lightning_optim.callbacks.low_rank import LowRankFactorization
from lightning_optim.callbacks.noise_scale import GradientNoiseScale
from lightning_optim.callbacks.performance_score import PerformanceScore
from lightning_optim.callbacks.quantization import QuantizationAwareTraining
from lightning_optim.callbacks.report import ReportCallback
from lightning_optim.callbacks.weight_pruning import WeightPruning

__all__ = [
    "ChannelPruning",
    "CompressedCheckpoint",
    "DepthPruning",
    "GradientNoiseScale",
    "LowRankFactorization",
    "PerformanceScore",
    "QuantizationAwareTraining",
    "ReportCallback",
    "WeightPruning",
]
