"""Strategy presets: names for ``Trainer(strategy=...)``, their classes, and advice on which to take.

The names are registered on import; the strategy classes are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

from lightning_optim.strategies.consolidate import consolidate
from lightning_optim.strategies.presets import PRESETS, Preset, build, register
from lightning_optim.strategies.recommend import Recommendation, recommend

if TYPE_CHECKING:
    from lightning_optim.strategies.ddp import OptimDDP
    from lightning_optim.strategies.fsdp2 import OptimFSDP2
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


def __getattr__(name: str) -> Any:
    for preset in PRESETS.values():
        if preset.path.rpartition(".")[2] == name:
            return preset.strategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
