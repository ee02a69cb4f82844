"""Bits that are chosen for each layer in a running fit, on the training batches before rounding begins."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optim.callbacks.kept_batches import BATCHES, KeptBatches, as_forward
from lightning_optim.patterns import Pattern
from lightning_optim.quantization.auto_bits import ChosenBits, choose_bits, note_bits
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.phases import rounds
from lightning_optim.quantization.prepare import quantized_layers
from lightning_optim.quantization.scheme import QuantizationScheme
from lightning_optim.sharding import is_sharded, whole_state

__all__ = ["AutoBits"]


class AutoBits:
    """Keeps a few batches, and chooses the bits with them when rounding begins; rank 0 does, for all.

    Args:
        effective_bits: The budget, in bits a weight; None: nothing is chosen.
        label: Of the callback, for messages.
    """

    def __init__(self, effective_bits: float | None, label: str) -> None:
        self.budget = effective_bits
        self.chosen: ChosenBits | None = None
        self._label = label
        self._batches = KeptBatches(inputs=True, user='bits="auto" chooses bits')
        self._whole: pl.LightningModule | None = None

    @property
    def waits(self) -> bool:
        """Whether bits are still to be chosen."""
        return self.budget is not None and self.chosen is None

    def can_choose(self, trainer: pl.Trainer) -> bool:
        """Whether bits are to be chosen now; a ``fast_dev_run`` may have no step before rounding begins."""
        return self.waits and bool(self._batches or not getattr(trainer, "fast_dev_run", False))

    def scheme(self, scheme: QuantizationScheme, root: nn.Module) -> QuantizationScheme:
        """Return the scheme with the bits that were chosen; before that, layers that round keep the bits they have."""
        if self.budget is None:
            return scheme
        if self.chosen is not None:
            names = dict(root.named_modules())
            return _with_bits(scheme, {name: bits for name, bits in self.chosen.bits.items() if name in names})
        layers = quantized_layers(root).items()
        present = {name: layer.weight_bits for name, layer in layers if rounds(layer.quantization_phase)}
        return _with_bits(scheme, {name: bits for name, bits in present.items() if bits is not None})

    def forget(self) -> None:
        """Start over for a fresh fit."""
        self.chosen = None
        self._batches.clear()

    def keep_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a whole copy on rank 0: bits are chosen when the model is divided."""
        if self.waits and trainer.is_global_zero:
            self._whole = deepcopy(pl_module)

    def begin_batch(self, target: nn.Module, batch: Any, batch_idx: int, steps_left: int) -> None:
        """Catch what the model receives in the last batches before rounding begins."""
        if self.waits and 0 < steps_left <= BATCHES:
            self._batches.begin_batch(target, batch, batch_idx)

    def end_batch(self, pl_module: pl.LightningModule) -> None:
        """Keep what was caught.

        Raises:
            MisconfigurationException: If it cannot be told which module is deployed.
        """
        try:
            self._batches.end_batch(pl_module)
        except ValueError as error:
            raise MisconfigurationException(
                f'{self._label}: bits="auto" reads how the outputs of the model depend on its weights, and {error} Or '
                "name the part with `module`, or pass bits={pattern: bits}."
            ) from error

    def choose(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Mapping[str, QuantizedLayer],
        scheme: QuantizationScheme,
    ) -> ChosenBits:
        """Choose the bits; the same on all ranks.

        Raises:
            MisconfigurationException: If no batch was seen.
        """
        if not self._batches:
            raise MisconfigurationException(
                f'{self._label}: bits="auto" is chosen on training batches, and none was trained before rounding '
                "begins. Begin later: raise `start`."
            )
        root: nn.Module | None = pl_module
        if is_sharded(pl_module):
            state, root = whole_state(pl_module, keep=trainer.is_global_zero), self._whole
            if root is not None:
                root.load_state_dict(state)
        plain = None
        if trainer.is_global_zero and root is not None:
            plain = self._choose(root, [n for n, x in layers.items() if x.weight_bits is not None], scheme).as_plain()
        if trainer.world_size > 1:
            plain = trainer.strategy.broadcast(plain, src=0)
        self.restore(plain)
        self._batches.clear()
        self._whole = None
        assert self.chosen is not None  # noqa: S101 - rank 0 chose
        note_bits(pl_module, self.chosen)
        return self.chosen

    def _choose(self, root: nn.Module, names: list[str], scheme: QuantizationScheme) -> ChosenBits:
        device = next(root.parameters()).device
        called = self._batches.items[-1][1]
        calls = [as_forward(kept, device) for kept, name in self._batches.items if name == called]
        return choose_bits(
            root.get_submodule(called),
            {name: root.get_submodule(name) for name in names},
            calls,
            scheme.weight_granularity,
            self.budget or 0.0,
            scheme.weight_bits,
            shown=False,
        )

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Follow layers that got another name, and drop those that got none."""
        if self.chosen is not None:
            self.chosen = self.chosen.renamed(names)

    def release(self) -> None:
        """Remove hooks, and drop the copy."""
        self._batches.release()
        self._whole = None

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the choice and the kept batches as plain types and tensors."""
        return {
            "chosen": None if self.chosen is None else self.chosen.as_plain(),
            "batches": self._batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.restore(state["chosen"])
        self._batches.load_state_dict(state["batches"])

    def restore(self, plain: Mapping[str, Any] | None) -> None:
        """Take a choice as plain types."""
        self.chosen = None if plain is None or self.budget is None else ChosenBits.of_plain(plain)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_whole": None}


def _with_bits(scheme: QuantizationScheme, bits: Mapping[str, int]) -> QuantizationScheme:
    by_name: dict[Pattern, int] = {str(name): number for name, number in bits.items()}
    return replace(scheme, bits=by_name)
