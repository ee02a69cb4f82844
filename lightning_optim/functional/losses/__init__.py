"""Distillation losses: how far a student's outputs are from its teacher's.

``LOSSES`` compare logits (``logits.py``; of a large vocabulary also k words and the rest, ``top_k.py``),
``FEATURE_LOSSES`` layers (``features.py``). All compute in float32, and in log space where probabilities are involved;
the gradient goes to the student alone if the teacher's tensor has none.
"""

from lightning_optim.functional.losses.ensemble import ensemble_logits
from lightning_optim.functional.losses.features import (
    FEATURE_LOSSES,
    FeatureLoss,
    attention_transfer,
    hint,
    rkd,
    similarity_preserving,
)
from lightning_optim.functional.losses.logits import (
    LOSSES,
    Loss,
    bce,
    cosine,
    dist,
    dkd,
    jsd,
    kd,
    label_smoothing,
    listwise,
    logit_std,
    mse,
    reverse_kd,
)
from lightning_optim.functional.losses.top_k import TopK, over_top_k, top_k_of

__all__ = [
    "FEATURE_LOSSES",
    "LOSSES",
    "FeatureLoss",
    "Loss",
    "TopK",
    "attention_transfer",
    "bce",
    "cosine",
    "dist",
    "dkd",
    "ensemble_logits",
    "hint",
    "jsd",
    "kd",
    "label_smoothing",
    "listwise",
    "logit_std",
    "mse",
    "over_top_k",
    "reverse_kd",
    "rkd",
    "similarity_preserving",
    "top_k_of",
]
