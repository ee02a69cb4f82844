"""BatchNorm under fully sharded training, where nothing else keeps its running statistics equal on all ranks."""

from typing import TypeGuard

import torch
from torch import nn

from lightning_optim._upstream import BatchNorm
from lightning_optim.sharding import local

__all__ = ["OwnStatistics", "is_batchnorm"]


class OwnStatistics:
    """The BatchNorms of a module whose running statistics no collective keeps equal.

    DDP broadcasts buffers from rank 0 before each forward pass; ``fully_shard`` leaves buffers alone (torch 2.13).

    Args:
        module: The module; None has none.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._norms = [] if module is None else [part for part in module.modules() if _has_own_statistics(part)]

    def average(self) -> None:
        """Average the statistics over the ranks.

        After the backward pass, which wants them as the forward pass left them.
        """
        buffers = [b for norm in self._norms if norm.training for b in norm.buffers() if b.is_floating_point()]
        if not buffers or torch.distributed.get_world_size() == 1:
            return
        together = torch.cat([local(buffer).flatten() for buffer in buffers])
        torch.distributed.all_reduce(together)
        together /= torch.distributed.get_world_size()
        parts = torch.split(together, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_([local(buffer).view(-1) for buffer in buffers], list(parts))


def is_batchnorm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a BatchNorm of any dimension, synchronized or not."""
    return isinstance(module, BatchNorm)


def _has_own_statistics(module: nn.Module) -> bool:
    own = is_batchnorm(module) and not isinstance(module, nn.SyncBatchNorm)
    return own and module.running_mean is not None
