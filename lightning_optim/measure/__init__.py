"""Measurements of a model: latency, size, multiply-accumulate operations."""

from lightning_optim.measure.latency import LatencyResult, measure_latency
from lightning_optim.measure.size import SIZES

__all__ = ["SIZES", "LatencyResult", "measure_latency"]
