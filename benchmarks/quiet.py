"""Shared by the benchmarks: a fixed number of threads, and no log lines of the Trainer."""

import logging

import torch

__all__ = ["prepare"]


def prepare(*, threads: int) -> None:
    """Fix the number of threads, so that runs repeat, and hide the log lines of the Trainer and the callbacks."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
