"""Where the inputs come from with which a callback calls the model by itself."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.modules import is_compiled
from lightning_optim.target import (
    ForwardInputs,
    as_forward_calls,
    as_forward_inputs,
    catch_forward_inputs,
    find_target,
    first_rows,
    map_inputs,
    move_inputs,
)

__all__ = ["InputSource"]


class InputSource:
    """Example inputs: given, or the target's ``example_input_array``, or caught from the first training batch.

    Args:
        given: What the user passed: a tensor, a tuple of arguments or a dict of keywords, taken as it is; with
            ``several`` also a list of them.
        rows: Rows that other inputs are cut to.
        module: Dotted name of the target, as the callback has it.
        several: Whether a list is the inputs of several calls.
    """

    def __init__(self, given: Any, rows: int, module: str | None = None, *, several: bool = False) -> None:
        self.given = given
        self.several = several
        self.rows = rows
        self.module = module
        self.forget()

    def forget(self) -> None:
        """Drop what was found."""
        self.inputs: ForwardInputs | None = None
        self.layer = ""
        """Dotted name of the module that takes the inputs; empty for the LightningModule."""
        self._catcher: catch_forward_inputs | None = None

    def prepare(self, pl_module: pl.LightningModule, user: str) -> None:
        """Take what is there at fit start.

        Raises:
            MisconfigurationException: If inputs would have to be caught inside a compiled module.
        """
        prefix, target = find_target(pl_module, self.module)
        example = self.given if self.given is not None else getattr(target, "example_input_array", None)
        if example is not None:
            convert = pl_module.trainer.precision_plugin.convert_input
            read = as_forward_calls if self.several and self.given is not None else as_forward_inputs
            inputs = map_inputs(convert, move_inputs(read(example), pl_module.device))
            self.layer = prefix.rstrip(".")
            self.inputs = inputs if self.given is not None else _rows_or_all(inputs, self.rows)
        elif is_compiled(pl_module, parts=False):
            raise MisconfigurationException(
                f"{user} cannot catch inputs from a compiled LightningModule. Pass `example_inputs`."
            )

    def begin_batch(self, pl_module: pl.LightningModule) -> None:
        """Watch the batch that begins, where nothing is known yet."""
        if self.inputs is None and self._catcher is None:
            self._catcher = catch_forward_inputs(find_target(pl_module, self.module)[1]).__enter__()

    @property
    def catching(self) -> bool:
        """Whether a batch is watched now."""
        return self._catcher is not None

    def end_batch(self, pl_module: pl.LightningModule) -> None:
        """Read what was caught."""
        if self._catcher is None:
            return
        self._catcher.close()
        layer, inputs = self._catcher.result()
        self.layer = next(name for name, child in pl_module.named_modules() if child is layer)
        self.inputs = map_inputs(_as_stored(layer), first_rows(inputs, self.rows))
        self._catcher = None

    def release(self) -> None:
        """Remove hooks that are left, and drop what was found."""
        if self._catcher is not None:
            self._catcher.close()
        self.forget()

    def called(self, pl_module: nn.Module) -> nn.Module:
        """Return the module that takes the inputs."""
        return pl_module.get_submodule(self.layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_catcher": None}


def _rows_or_all(inputs: ForwardInputs, rows: int) -> ForwardInputs:
    """Cut an ``example_input_array`` to some rows; one whose rows cannot be told (ragged) is taken as it is."""
    try:
        return first_rows(inputs, rows)
    except ValueError:
        return inputs


def _as_stored(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what gives a half-precision tensor of autocast the dtype of the layer's weights: it is called without."""
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    halves = (torch.float16, torch.bfloat16)
    return lambda tensor: tensor.to(dtype) if dtype not in (None, *halves) and tensor.dtype in halves else tensor
