"""Teachers divided among the devices, as a strategy divides the student: each device holds its shard of every block."""

from collections.abc import Sequence
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optim.distillation.hooks import builds_layers_in
from lightning_optim.errors import FAILURES, first_line
from lightning_optim.sharding import is_sharded, own_class

__all__ = ["check_teacher", "divide_teacher", "is_divided"]

_DIVIDED: WeakSet[nn.Module] = WeakSet()
"""Networks that a fit has divided; they stay so."""


def is_divided(network: nn.Module) -> bool:
    """Whether a fit has divided this teacher: calling it is a collective then."""
    return network in _DIVIDED


def check_teacher(network: nn.Module) -> None:
    """Reject a teacher without weights, or one that somebody else has divided.

    Raises:
        ValueError: With what to do.
    """
    name = own_class(network).__name__
    tensors: list[tuple[str, Tensor]] = [*network.named_parameters(), *network.named_buffers()]
    empty = next((leaf for leaf, tensor in tensors if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"the teacher {name} has no weights yet: {empty} is on the meta device. Load its weights first "
            "(to_empty and load_state_dict, or build it outside of `torch.device('meta')`)."
        )
    if not tensors and builds_layers_in(network, "configure_model"):
        raise ValueError(
            f"the teacher {name} has no layers yet: it creates them in `configure_model`. Call that, and load its "
            "weights, before you pass it."
        )
    if is_sharded(network) and not is_divided(network):
        raise ValueError(
            f"the teacher {name} is divided already: its parameters are DTensors. Pass it whole; under 'optim_fsdp' "
            "the fit divides it as the student."
        )


def divide_teacher(trainer: pl.Trainer, networks: Sequence[nn.Module], *, wanted: bool) -> None:
    """Divide a teacher's networks, in place and once, if the strategy divides the student and frees its units.

    Args:
        trainer: The Trainer, whose strategy is set up.
        networks: The teacher's; equal on all ranks.
        wanted: Whether they are divided at all.

    Raises:
        MisconfigurationException: If one cannot be divided, or an earlier fit divided it and this strategy does not.
    """
    from lightning_optim.strategies.divide import divide_frozen, frozen_mesh  # torch's sharding, where it is used

    mesh = frozen_mesh(trainer.strategy)
    before = [network for network in networks if is_divided(network)]
    if before and mesh is None:
        raise MisconfigurationException(
            f"the teacher {own_class(before[0]).__name__} was divided by an earlier fit, and "
            f"{type(trainer.strategy).__name__} keeps teachers whole. Load it again for this fit."
        )
    whole = [network for network in dict.fromkeys(networks) if not is_divided(network)]
    if mesh is None or not wanted or not whole:
        return
    _check_apart(list(dict.fromkeys(networks)))
    for network in whole:
        if not any(True for _ in network.parameters()):
            continue
        try:
            units = divide_frozen(network, mesh)
        except FAILURES as error:
            raise MisconfigurationException(
                f"the teacher {own_class(network).__name__} cannot be divided ({first_line(error)}). Keep it whole on "
                "every device: DistillationModule(..., divide_teacher=False)."
            ) from error
        _DIVIDED.add(network)
        rank_zero_info(f"Teacher {own_class(network).__name__} divided: {units}.")


def _check_apart(networks: Sequence[nn.Module]) -> None:
    """Reject several teachers that share layers: a layer belongs to one gathered whole."""
    owners: dict[int, int] = {}
    for number, network in enumerate(networks):
        for name, parameter in network.named_parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise MisconfigurationException(
                    f"two teachers share {name}, so they cannot be divided apart. Keep them whole on every device: "
                    "DistillationModule(..., divide_teacher=False)."
                )
