"""The presets: one table from which names, documentation and tests are derived.

Classes are imported when a preset is built, not when its name is registered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

__all__ = ["PRESETS", "Preset", "build", "register"]


@dataclass(frozen=True)
class Preset:
    """A named configuration of a strategy.

    Attributes:
        name: Name for ``Trainer(strategy=...)``.
        path: Import path of the class.
        options: Its arguments.
        use_when: When to choose it, as a phrase.
    """

    name: str
    path: str
    options: Mapping[str, Any]
    use_when: str

    @property
    def strategy(self) -> type[Strategy]:
        """The class."""
        module, _, name = self.path.rpartition(".")
        cls: type[Strategy] = getattr(import_module(module), name)
        return cls

    @property
    def sharded(self) -> bool:
        """Whether it divides the parameters among devices."""
        return self.path == _FSDP2

    def build(self, **overrides: Any) -> Strategy:
        """Return a new strategy object; ``overrides`` are arguments of its class."""
        return self.strategy(**{**self.options, **overrides})


_SINGLE = "lightning_optim.strategies.single.OptimSingle"
_DDP = "lightning_optim.strategies.ddp.OptimDDP"
_FSDP2 = "lightning_optim.strategies.fsdp2.OptimFSDP2"

_TABLE = (
    Preset("optim_single", _SINGLE, {}, "weights, gradients, optimizer state and activations fit on one device"),
    Preset("optim_ddp", _DDP, {}, "all of it fits on one device, and communication takes less time than computation"),
    Preset(
        "optim_ddp_static", _DDP, {"static_graph": True}, "like optim_ddp, and every parameter is used in every step"
    ),
    Preset("optim_ddp_notebook", _DDP, {"start_method": "fork"}, "like optim_ddp, in a notebook"),
    Preset(
        "optim_ddp_bf16", _DDP, {"compress": "bf16"}, "like optim_ddp over a slow link: gradients take half the bytes"
    ),
    Preset("optim_ddp_fp16", _DDP, {"compress": "fp16"}, "like optim_ddp_bf16 with precision='16-mixed'"),
    Preset(
        "optim_zero2", _FSDP2, {"reshard": False}, "weights fit on one device, gradients and optimizer state do not"
    ),
    Preset("optim_fsdp", _FSDP2, {}, "the weights do not fit on one device"),
    Preset("optim_hsdp", _FSDP2, {"replicate": "nodes"}, "several nodes, and the sharded model fits on one node"),
    Preset(
        "optim_tp",
        _FSDP2,
        {"tensor": "node", "shard": False},
        "a single layer or its activations do not fit on one device",
    ),
    Preset("optim_2d", _FSDP2, {"tensor": 2}, "like optim_tp, with more devices than one layer needs"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}
"""Name -> preset, simplest first."""


def build(name: str, **overrides: Any) -> Strategy:
    """Return a new strategy object of a preset.

    Args:
        name: One of :data:`PRESETS`.
        overrides: Arguments of its class, over the preset's.

    Raises:
        ValueError: For an unknown name; the known ones are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}.")
    return PRESETS[name].build(**overrides)


def register() -> None:
    """Register the names for ``Trainer(strategy=...)``; registering twice is harmless."""
    for preset in PRESETS.values():
        StrategyRegistry.register(
            preset.name, preset.build, description=preset.use_when, override=True, **preset.options
        )
