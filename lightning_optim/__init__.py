"""PyTorch Lightning plugins that make a model smaller, faster and cheaper inside the Trainer you have."""

from lightning_optim import strategies
from lightning_optim._version import __version__
from lightning_optim.callbacks import (
    ChannelPruning,
    CompressedCheckpoint,
    DepthPruning,
    GradientNoiseScale,
    LowRankFactorization,
    PerformanceScore,
    QuantizationAwareTraining,
    ReportCallback,
    WeightPruning,
)
from lightning_optim.checkpoint import conform, load_from_checkpoint
from lightning_optim.depth.prune import prune_depth
from lightning_optim.distillation import DistillationModule, Feature, IndexedDataset, Ramp, student_only
from lightning_optim.export import ExportReport, PretrainedReport, export_onnx, export_pretrained
from lightning_optim.functional.noise_scale import scale_learning_rate
from lightning_optim.low_rank import FactorizationReport, factorize
from lightning_optim.measure import LatencyResult, measure_latency
from lightning_optim.quantization.calibrate import quantize_post_training
from lightning_optim.recipe import Recipe
from lightning_optim.report import ComparisonReport, compare
from lightning_optim.search import SearchReport, search
from lightning_optim.sparsity.prune import SparsityReport, prune_weights
from lightning_optim.structured.prune import prune_channels
from lightning_optim.structured.sensitivity import sensitivity

__all__ = [
    "ChannelPruning",
    "ComparisonReport",
    "CompressedCheckpoint",
    "DepthPruning",
    "DistillationModule",
    "ExportReport",
    "FactorizationReport",
    "Feature",
    "GradientNoiseScale",
    "IndexedDataset",
    "LatencyResult",
    "LowRankFactorization",
    "PerformanceScore",
    "PretrainedReport",
    "QuantizationAwareTraining",
    "Ramp",
    "Recipe",
    "ReportCallback",
    "SearchReport",
    "SparsityReport",
    "WeightPruning",
    "__version__",
    "compare",
    "conform",
    "export_onnx",
    "export_pretrained",
    "factorize",
    "load_from_checkpoint",
    "measure_latency",
    "prune_channels",
    "prune_depth",
    "prune_weights",
    "quantize_post_training",
    "scale_learning_rate",
    "search",
    "sensitivity",
    "strategies",
    "student_only",
]
