"""OptimSingle: one device, under a name of this family."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_optim import _upstream

__all__ = ["OptimSingle"]


class OptimSingle(SingleDeviceStrategy):
    """Train on the one device that the Trainer chose: nothing is sent, and nothing is divided.

    Raises:
        MisconfigurationException: In the Trainer's constructor, for several devices.

    Examples:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, strategy="optim_single", logger=False)
    """

    strategy_name = "optim_single"

    def __init__(self) -> None:
        super().__init__()
        self._parallel_devices: list[torch.device] | None = None
        _upstream.check(self)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer's devices, which it sets once it knows them."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise MisconfigurationException(
                f"'optim_single' trains on one device, and the Trainer has {len(devices)}. Pass devices=1, or take "
                "'optim_ddp' (lightning_optim.strategies.recommend says which)."
            )
        self._parallel_devices = devices
        if devices:
            self._root_device = devices[0]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register nothing: the table of presets does."""
