"""The mathematics: tensors and numbers in, tensors and numbers out. Nothing here knows Lightning."""

from lightning_optim.functional.criteria import CRITERIA, LazyScores, Statistics, parameter_generator, scores_of
from lightning_optim.functional.losses import FEATURE_LOSSES, LOSSES
from lightning_optim.functional.masks import (
    Granularity,
    apply_masks,
    global_masks,
    keep_bits,
    pack_mask,
    parse_granularity,
    sparsity_of,
    unpack_mask,
)
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.functional.schedules import SCHEDULES
from lightning_optim.functional.thresholds import Cut, ScoreReader, Scores, Shards, keep_largest, smallest

__all__ = [
    "CRITERIA",
    "FEATURE_LOSSES",
    "LOSSES",
    "OBSERVERS",
    "SCHEDULES",
    "Cut",
    "Granularity",
    "LazyScores",
    "ScoreReader",
    "Scores",
    "Shards",
    "Statistics",
    "apply_masks",
    "global_masks",
    "keep_bits",
    "keep_largest",
    "pack_mask",
    "parameter_generator",
    "parse_granularity",
    "scores_of",
    "smallest",
    "sparsity_of",
    "unpack_mask",
]
