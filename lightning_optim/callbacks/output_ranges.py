"""Which outputs of a training model need a range: read once from its graph, by rank 0."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks.example_inputs import InputSource
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.outputs import find_ranges, has_convolutions
from lightning_optim.sharding import is_sharded
from lightning_optim.target import move_inputs

__all__ = ["OutputRanges"]


class OutputRanges:
    """Finds the outputs that need a range, with inputs that are given or caught from a batch.

    Args:
        example_inputs: As the callback takes them.
        module: Dotted name of the target, as the callback has it.
    """

    def __init__(self, example_inputs: Any, module: str | None) -> None:
        self.names: list[str] = []
        """The layers found, by name."""
        self.known = False
        """Whether the graph was read, or need not be."""
        self._inputs = InputSource(example_inputs, 2, module)
        self._whole: pl.LightningModule | None = None

    def forget(self) -> None:
        """Start over for a fresh fit."""
        self.names, self.known = [], False

    def keep_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a whole copy on rank 0: the graph is read when the model is divided."""
        if trainer.is_global_zero:
            self._whole = deepcopy(pl_module)

    def prepare(self, pl_module: pl.LightningModule, layers: Mapping[str, QuantizedLayer], user: str) -> None:
        """Take the inputs that are known at fit start, if any are needed."""
        if self.known:
            return
        if has_convolutions(layers):
            self._inputs.prepare(pl_module, user)
        else:
            self.known = True

    def begin_batch(self, pl_module: pl.LightningModule) -> None:
        """Catch inputs from the batch that begins, if none are known."""
        if not self.known:
            self._inputs.begin_batch(pl_module)

    def can_be_read(self, window_is_open: bool) -> bool:
        """Whether the graph is to be read at the end of this batch."""
        found = self._inputs.inputs is not None and window_is_open
        return not self.known and (found or self._inputs.catching)

    def read(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, QuantizedLayer], label: str
    ) -> GraphFacts:
        """Return the outputs and functions that need ranges; the same on all ranks."""
        facts = GraphFacts()
        try:
            self._inputs.end_batch(pl_module)
            if trainer.is_global_zero or not is_sharded(pl_module):
                facts = self._read(pl_module, layers)
        except ValueError as error:
            rank_zero_warn(
                f"{label}: no output of a convolution gets a range, so those before an addition stay float in "
                f"the exported file: {error}"
            )
        if trainer.world_size > 1:
            facts = trainer.strategy.broadcast(facts, src=0)
        self.known = True
        self.names = [*facts.outputs, *(name for name in facts.functions if name not in facts.outputs)]
        self.release()
        return facts

    def _read(self, pl_module: pl.LightningModule, layers: Mapping[str, QuantizedLayer]) -> GraphFacts:
        """Read the graph of the module, or of its whole copy if the module itself is divided."""
        inputs = self._inputs.inputs
        if inputs is None:
            return GraphFacts()
        whole = pl_module if self._whole is None else self._whole
        device = next(whole.parameters()).device
        return find_ranges(self._inputs.called(whole), move_inputs(inputs, device), layers, self._inputs.layer)

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Follow layers that got another name, and drop those that got none."""
        self.names = [new for old in self.names if (new := names.get(old)) is not None]

    def release(self) -> None:
        """Remove hooks, and drop inputs and the copy."""
        self._inputs.release()
        self._whole = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": None}
