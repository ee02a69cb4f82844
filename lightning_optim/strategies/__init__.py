"""Strategy presets: names for ``Trainer(strategy=...)``, their classes, and advice on which to take."""

from lightning_optim.strategies.consolidate import consolidate
from lightning_optim.strategies.ddp import OptimDDP
from lightning_optim.strategies.fsdp2 import OptimFSDP2
from lightning_optim.strategies.presets import PRESETS, Preset, build, register
from lightning_optim.strategies.recommend import Recommendation, recommend
from lightning_optim.strategies.single import OptimSingle

__all__ = [
    "PRESETS",
    "OptimDDP",
    "OptimFSDP2",
    "OptimSingle",
    "Preset",
    "Recommendation",
    "build",
    "consolidate",
    "recommend",
]

register()
