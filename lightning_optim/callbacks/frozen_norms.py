"""BatchNorm that trains on with its running statistics."""

from typing import Any

from torch import nn

from lightning_optim._upstream import BatchNorm

__all__ = ["FrozenNorms", "share_statistics"]


class FrozenNorms:
    """Keeps the BatchNorms of a model in eval mode, and gives them their mode back."""

    def __init__(self) -> None:
        self._held: list[nn.Module] = []

    def hold(self, target: nn.Module) -> None:
        """Put those that are in training mode into eval mode.

        In every batch: Lightning puts the module back into training mode after validation.
        """
        for layer in _batch_norms(target):
            if layer.training:
                layer.eval()
                self._held.append(layer)

    def release(self) -> None:
        """Put those that were held back into training mode."""
        for layer in self._held:
            layer.train()
        self._held = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": []}


def share_statistics(target: nn.Module, strategy: Any) -> None:
    """Give every rank the BatchNorm statistics of rank 0.

    Without synchronized BatchNorm each rank has its own. Frozen, they enter the training forward pass.
    """
    for layer in _batch_norms(target):
        for buffer in layer.buffers():
            buffer.copy_(strategy.broadcast(buffer, src=0))


def _batch_norms(target: nn.Module) -> list[nn.Module]:
    return [layer for layer in target.modules() if isinstance(layer, BatchNorm)]
