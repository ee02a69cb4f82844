"""Layers of low rank: which layers can be factorized, what they become, and the change of a model."""

from lightning_optim.low_rank.factorize import FactorizationReport, factorize
from lightning_optim.low_rank.layers import LowRank

__all__ = ["FactorizationReport", "LowRank", "factorize"]
