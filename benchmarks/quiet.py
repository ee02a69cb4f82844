"""Shared by the benchmarks: a fixed number of threads, no log lines of the Trainer, and what the processor is."""

import logging
from pathlib import Path

import torch

__all__ = ["prepare", "vnni"]


def prepare(*, threads: int) -> None:
    """Fix the number of threads, so that runs repeat, and hide the log lines of the Trainer and the callbacks."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def vnni() -> str:
    """Return whether the processor has instructions for products of 8-bit integers, for a result file."""
    try:
        return "VNNI" if "vnni" in Path("/proc/cpuinfo").read_text() else "no VNNI"
    except OSError:
        return "VNNI or not (unknown)"
