"""The masks of a running fit: made, applied, sliced, and saved at one bit per weight."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optim.change import Changed, keep_channels
from lightning_optim.functional.masks import apply_masks, keep_bits, pack_mask, unpack_mask
from lightning_optim.sharding import copies, full, is_dtensor, local, reshard, shard_like, wrap_like
from lightning_optim.sparsity.goals import CHANCE_ZEROS, number_of
from lightning_optim.target import Weight, averaged_copies

__all__ = ["HeldMasks", "zeros_of"]


class HeldMasks:
    """The selected weights, and which of their entries stay zero.

    Attributes:
        weights: The selected weights by name.
        keeps: Name -> what ``keep_bits`` makes of the mask; empty before any zero. Where weights are sharded, each
            process holds the mask of its part.
        initial: Sparsity that each weight had before the run.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.keeps: dict[str, Tensor] = {}
        self.initial: dict[str, float] = {}
        self._removed = 0
        self._restored: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def __bool__(self) -> bool:
        return bool(self.keeps)

    @property
    def restored(self) -> bool:
        """Whether masks of a file wait for the fit to start."""
        return bool(self._restored)

    @property
    def reached(self) -> float:
        """Fraction of zeros in the weights that have masks."""
        return self._removed / number_of(self.weights, self.keeps) if self.keeps else 0.0

    def of(self, name: str) -> Tensor:
        """Return the bool mask (True keeps) of the part of a weight that this process holds."""
        if name in self.keeps:
            return self.keeps[name] != 0
        return torch.ones_like(local(self.weights[name].parameter.detach()), dtype=torch.bool)

    def whole_masks(self) -> dict[str, Tensor]:
        """Return the whole bool masks; where weights are sharded every process must ask."""
        return {name: self.whole(name, keep != 0) for name, keep in self.keeps.items()}

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole of a tensor of which this process holds the part that belongs to its part of a weight."""
        weight = self.weights[name].parameter if name in self.weights else part
        if not is_dtensor(weight):
            return part
        bits = part.to(torch.uint8) if part.dtype == torch.bool else part
        return full(wrap_like(bits, weight)).to(part.dtype)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return the part that this process holds of a tensor that has the shape of a weight."""
        return local(shard_like(whole, self.weights[name].parameter))

    # Where masks come from.

    def put(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new bool masks as :attr:`keeps`, without applying them."""
        return {name: keep_bits(mask, self.weights[name].parameter.dtype) for name, mask in masks.items()}

    def clear(self) -> None:
        """Drop the masks, also those of a file."""
        self.keeps, self._restored = {}, {}

    def take_zeros(self, *, hold: bool) -> None:
        """Keep the zeros that the module has: what was once removed stays removed.

        Args:
            hold: Take every zero; else only those that cannot be by chance.

        Raises:
            MisconfigurationException: If all weights are zero, or with ``hold`` none is.
        """
        zeros = {name: zeros_of(weight) for name, weight in self.weights.items()}
        number = number_of(self.weights)
        if sum(zeros.values()) == number:
            raise MisconfigurationException(
                f"all {number} weights that WeightPruning selected are zero, so there is nothing "
                "to rank. Was the model initialised (or loaded)?"
            )
        # A layer that is zero as a whole was initialized so (a residual branch, an adapter), not pruned.
        held = {name for name, count in zeros.items() if 0 < count < self.weights[name].parameter.numel()}
        if sum(zeros[name] for name in held) <= CHANCE_ZEROS * number:
            held = set()
        if hold:
            held = {name for name, count in zeros.items() if count}
        self.initial = {
            name: zeros[name] / number_of(self.weights, [name]) if name in held else 0.0 for name in self.weights
        }
        if held:
            parts = {name: local(weight.parameter.detach()) for name, weight in self.weights.items()}
            dense = {name: torch.ones_like(part, dtype=torch.bool) for name, part in parts.items() if name not in held}
            self.keeps = self.put({name: dense[name] if name in dense else parts[name] != 0 for name in parts})
        elif hold:
            raise MisconfigurationException(
                f"WeightPruning('hold') keeps the zeros a module has, and the {len(self.weights)} selected weights "
                f"have {sum(zeros.values())}. Load the sparse weights first, or give a sparsity."
            )

    def take_restored(self) -> None:
        """Match the masks of a file with the selected weights.

        Raises:
            MisconfigurationException: If names or shapes differ.
        """
        expected = {name: shape for name, (_, shape) in self._restored.items()}
        found = {name: tuple(weight.parameter.shape) for name, weight in self.weights.items()}
        if expected != found:
            differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise MisconfigurationException(
                f"the checkpoint's masks do not fit the module: {differ[0]} is {expected.get(differ[0], 'absent')} in "
                f"the checkpoint and {found.get(differ[0], 'absent')} in the selection. Resume with the model and the "
                "selection that wrote the file."
            )
        whole = {name: unpack_mask(packed, shape) for name, (packed, shape) in self._restored.items()}
        self.keeps = self.put({name: self.part(name, mask) for name, mask in whole.items()})
        self._restored = {}

    def follow(self, changed: Changed) -> dict[str, str]:
        """Slice masks with their weights; returns the present name of each weight that was not removed."""
        successors = {name: now for name in self.weights if (now := changed.successor(name)) is not None}
        for name, (_, parameter) in successors.items():
            kept = changed.surviving(name)
            if name in self.keeps and kept is not None:
                self.keeps[name] = keep_channels(self.keeps[name], kept, tuple(parameter.shape))
        self.weights = {
            now: replace(self.weights[name], name=now, parameter=parameter)
            for name, (now, parameter) in successors.items()
        }
        names = {name: now for name, (now, _) in successors.items()}
        self.keeps = {now: self.keeps[name] for name, now in names.items() if name in self.keeps}
        self.initial = {now: self.initial[name] for name, now in names.items() if name in self.initial}
        self._removed = sum(keep.numel() - int(torch.count_nonzero(keep)) for keep in self.keeps.values())
        return names

    def take_in(self, weights: Mapping[str, Weight]) -> None:
        """Hold more weights, dense so far; ``weights`` are those that are held and the new ones, in their order."""
        new = {name: weight for name, weight in weights.items() if name not in self.weights}
        self.weights = dict(weights)
        self.initial |= dict.fromkeys(new, 0.0)
        if self.keeps:
            dense = self.put({name: self.of(name) for name in new})
            self.keeps = {name: dense[name] if name in new else self.keeps[name] for name in weights}

    # Applying them.

    def after_step(self, names: Iterable[str]) -> None:
        """Zero what an optimizer revived in some weights."""
        held = [name for name in names if name in self.keeps]
        apply_masks(self._parts(held), (self.keeps[name] for name in held))

    def apply(self, trainer: pl.Trainer) -> None:
        """Mask the model and its averaged copies: an average of zeros stays zero from then on."""
        apply_masks(self._parts(self.keeps), self.keeps.values())
        reshard(trainer.lightning_module)
        self._removed = self._count_removed(trainer)
        for copy in averaged_copies(trainer):
            averaged = dict(copy.named_parameters())
            apply_masks(
                (averaged[name] for name in self.keeps),
                (keep.to(averaged[name].device) for name, keep in self.keeps.items()),
            )

    def _parts(self, names: Iterable[str]) -> Iterable[Tensor]:
        return (local(self.weights[name].parameter.detach()) for name in names)

    def _count_removed(self, trainer: pl.Trainer) -> int:
        """Return how many weights the masks remove, on all processes together."""
        removed = {name: keep.numel() - int(torch.count_nonzero(keep)) for name, keep in self.keeps.items()}
        if not any(is_dtensor(weight.parameter) for weight in self.weights.values()):
            return sum(removed.values())
        once = torch.tensor([removed[name] for name in self.keeps], device=trainer.strategy.root_device)
        everywhere = trainer.strategy.reduce(once, reduce_op="sum").tolist()
        shared = [copies(self.weights[name].parameter, trainer.world_size) for name in self.keeps]
        return sum(count // number for count, number in zip(everywhere, shared, strict=True))

    def check_ranks_agree(self, trainer: pl.Trainer, keeps: Mapping[str, Tensor]) -> None:
        """Raise where another process made other masks.

        Raises:
            RuntimeError: If checksums differ.
        """
        if trainer.world_size == 1 or any(is_dtensor(self.weights[name].parameter) for name in keeps):
            return  # parts differ, and belong to masks that were made together
        checksum = 0
        for keep in keeps.values():
            checksum = zlib.crc32(pack_mask(keep != 0).cpu().numpy().tobytes(), checksum)
        ours = torch.tensor(float(checksum), dtype=torch.float64, device=trainer.strategy.root_device)
        low = trainer.strategy.reduce(ours.clone(), reduce_op="min")
        high = trainer.strategy.reduce(ours.clone(), reduce_op="max")
        if float(low) != float(high):
            raise RuntimeError(
                f"rank {trainer.global_rank} computed other masks than another rank (checksum {checksum:#x}): the "
                "weights or statistics differ between ranks. Does every rank train the same model?"
            )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return packed masks (those of a file as they came until a fit takes them), shapes and initial sparsity."""
        packed = self._restored or {
            name: (pack_mask(mask), tuple(mask.shape)) for name, mask in self.whole_masks().items()
        }
        return {
            "masks": {name: mask for name, (mask, _) in packed.items()},
            "shapes": {name: shape for name, (_, shape) in packed.items()},
            "initial": dict(self.initial),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; masks are matched with the module at fit start."""
        self._restored = {name: (packed, tuple(state["shapes"][name])) for name, packed in state["masks"].items()}
        self.keeps, self.initial = {}, dict(state["initial"])


def zeros_of(weight: Weight) -> int:
    """Return how many entries of a weight are zero, on all processes together."""
    return weight.parameter.numel() - int(torch.count_nonzero(full(weight.parameter.detach())))
