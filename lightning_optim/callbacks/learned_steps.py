"""Trained steps in a running fit: in which optimizer they are, when they are trained, and how they follow changes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optim.callbacks.commit import commit, without_ddp
from lightning_optim.change import Changed, Kept, keep_channels
from lightning_optim.optimizers import held_ids
from lightning_optim.quantization.layers import QuantizedConv1D, QuantizedLayer
from lightning_optim.quantization.learned import FIRST, WEIGHT_STEP, begin_steps, set_trained, steps_of
from lightning_optim.sharding import is_dtensor
from lightning_optim.structured.optimizers import check_optimizer, follow_change

__all__ = ["LearnedSteps"]

_HOOK = "configure_optimizers"


class LearnedSteps:
    """The parameters of trained steps of one callback's layers.

    They exist before the optimizers are made, so that ``configure_optimizers`` finds them among the module's
    parameters and checkpoints hold optimizer states in one order; they have no gradient until rounding begins. Where
    it selects parameters itself and leaves them out, they join the group of their layer's weight: no group is added,
    which a learning-rate scheduler would not know.

    Args:
        label: Of the callback, for messages.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._hooked: pl.LightningModule | None = None

    # Before the optimizers are made.

    def before_optimizers(self, pl_module: pl.LightningModule, prepare: Callable[[], object]) -> None:
        """Prepare layers that are built after ``setup`` right before ``configure_optimizers`` is called."""
        if self._hooked is None:
            original = getattr(pl_module, _HOOK)
            vars(pl_module)[_HOOK] = partial(_prepared, prepare, original)  # Lightning sees through a partial
            self._hooked = pl_module

    def release(self) -> None:
        """Give ``configure_optimizers`` back."""
        if self._hooked is not None:
            vars(self._hooked).pop(_HOOK, None)
            self._hooked = None

    # In the fit.

    def join(self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, QuantizedLayer]) -> None:
        """Put steps that no optimizer holds into the group of their layer's weight.

        Raises:
            MisconfigurationException: If the model is divided by features, or an optimizer keeps parameters elsewhere.
        """
        steps = steps_of(layers)
        if not steps:
            return
        _check_undivided(layers)
        held = {key for optimizer in trainer.optimizers for key in held_ids(optimizer)}
        missing = {id(step) for name, step in steps.items() if id(step) not in held and _weight(layers, name) in held}
        if missing:
            after = dict(pl_module.named_parameters(remove_duplicate=False))
            changed = Changed({}, {name: p for name, p in after.items() if id(p) not in missing}, after)
            for optimizer in trainer.optimizers:
                try:
                    check_optimizer(optimizer)
                except ValueError as error:
                    raise MisconfigurationException(f"{self._label} cannot train steps: {error}") from error
                follow_change(optimizer, changed)
        self.train(trainer, layers)

    def train(self, trainer: pl.Trainer, layers: Mapping[str, QuantizedLayer]) -> None:
        """Let those be trained that are due; those of weights that no optimizer holds never are."""
        held = {key for optimizer in trainer.optimizers for key in held_ids(optimizer)}
        changes = [
            set_trained(layer, layer.quantization_phase, trainable=_is_trained(layer, held))
            for layer in layers.values()
        ]
        if any(changes):
            with without_ddp(trainer):  # it knows the parameters that were trained when it was made
                pass

    def begin(self, trainer: pl.Trainer, layers: Mapping[str, QuantizedLayer]) -> None:
        """Let steps begin where weights are now: their layers will round next."""
        begin_steps(layers.values(), _rows)
        held = {key for optimizer in trainer.optimizers for key in held_ids(optimizer)}
        fixed = [name for name, layer in layers.items() if steps_of({"": layer}) and not _is_trained(layer, held)]
        if fixed:
            named = f"{', '.join(fixed[:5])}{f' and {len(fixed) - 5} more' if len(fixed) > 5 else ''}"
            rank_zero_info(
                f"{self._label}: the weights of {named} are not trained, so their steps stay as they were observed."
            )

    def follow(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        changed: Changed,
        layers: Mapping[str, QuantizedLayer],
    ) -> None:
        """Drop the steps of channels that were removed."""
        rows: dict[str, Tensor] = {}
        for old, new in changed.layers.items():
            layer = layers.get(new or "")
            if layer is None or f"{old}.weight" not in changed.before or WEIGHT_STEP not in layer._parameters:
                continue
            surviving, shape = changed.surviving(f"{old}.weight"), changed.shape_before(f"{old}.weight")
            step: Any = layer._parameters[WEIGHT_STEP]
            if surviving is None or step.numel() == 1 or step.numel() == layer._rows().shape[0]:
                continue
            places = surviving % shape[1] if isinstance(layer, QuantizedConv1D) else surviving // shape[1:].numel()
            rows[str(new)] = torch.unique(places)
        if rows:
            commit(trainer, pl_module, partial(_drop_rows, rows), who=self._label)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooked": None}


def _prepared(prepare: Callable[[], object], original: Callable[[], Any]) -> Any:
    prepare()
    return original()


def _weight(layers: Mapping[str, QuantizedLayer], step: str) -> int:
    """Return the identity of the weight of a step's layer."""
    return id(layers[step.rpartition(".")[0]]._parameters.get("weight"))


def _is_trained(layer: QuantizedLayer, held: set[int]) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and id(weight) in held and weight.requires_grad


def _rows(layer: nn.Module) -> tuple[Tensor, int, str]:
    assert isinstance(layer, QuantizedLayer)  # noqa: S101 - the callers pass no others
    return layer._rows().detach(), layer.weight_bits or 8, layer.weight_granularity


def _check_undivided(layers: Mapping[str, QuantizedLayer]) -> None:
    for name, layer in layers.items():
        weight: Any = layer._parameters.get("weight")
        if is_dtensor(weight) and "tensor_parallel" in (weight.device_mesh.mesh_dim_names or ()):
            raise MisconfigurationException(
                f"observer='learned' trains whole layers, and {name} is divided by its features (tensor parallelism). "
                "Take 'optim_fsdp', 'optim_zero2' or 'optim_ddp', or another observer."
            )


def _drop_rows(rows: Mapping[str, Tensor], root: nn.Module) -> Kept:
    kept: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
    for name, places in rows.items():
        layer = root.get_submodule(name)
        old: Any = layer._parameters[WEIGHT_STEP]
        first: Any = layer._buffers[FIRST]
        new = nn.Parameter(keep_channels(old, places, (len(places),)), requires_grad=old.requires_grad)
        layer._parameters[WEIGHT_STEP] = new
        layer._buffers[FIRST] = first[places.to(first.device)]
        kept[old] = (new, places)
    return kept
