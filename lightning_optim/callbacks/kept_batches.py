"""A few training batches that a callback keeps to call the model with, and their form in a checkpoint."""

import copy
from collections import deque, namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_optim.distillation.indexed import Indexed
from lightning_optim.target import ForwardInputs, catch_forward_inputs, map_inputs

__all__ = ["BATCHES", "KeptBatches", "as_forward", "as_stored", "from_stored"]

BATCHES = 4
ROWS = 16
"""Rows that are kept of a batch whose tensors all have as many."""

_PLAIN = (bool, int, float, str, type(None))


class KeptBatches:
    """The last batches before an event: as the training step gets them, or what the model's forward gets.

    They are copies on the CPU.

    Args:
        inputs: Whether to keep the arguments of the forward, caught from the training step, instead of the batch.
        user: Who uses them for what, as a warning says it.
    """

    def __init__(self, *, inputs: bool, user: str = "DepthPruning judges blocks") -> None:
        self.inputs = inputs
        self._user = user
        self.items: deque[tuple[Any, Any]] = deque(maxlen=BATCHES)
        """Batches with their index; with ``inputs`` arguments of a call with the name of the module that got them."""
        self._catcher: catch_forward_inputs | None = None
        self._warned = False

    def __bool__(self) -> bool:
        return bool(self.items)

    def clear(self) -> None:
        """Forget them: an event has used them."""
        self.release()
        self.items.clear()

    def begin_batch(self, target: nn.Module, batch: Any, batch_idx: int) -> None:
        """Keep the batch that begins, or watch what the forward receives."""
        self.release()
        if self.inputs:
            self._catcher = catch_forward_inputs(target).__enter__()
        else:
            self.items.append((_kept(batch), batch_idx))

    def end_batch(self, root: nn.Module) -> None:
        """Keep what was caught.

        Args:
            root: The whole model.

        Raises:
            ValueError: If several modules were called, or none.
        """
        if self._catcher is None:
            return
        catcher, self._catcher = self._catcher, None
        catcher.close()
        layer, inputs = catcher.result()
        called = next(name for name, child in root.named_modules() if child is layer)
        self.items.append((_kept((inputs.args, inputs.kwargs or {})), called))

    def release(self) -> None:
        """Stop watching."""
        if self._catcher is not None:
            self._catcher.close()
            self._catcher = None

    # State.

    def state_dict(self) -> list[tuple[Any, Any]]:
        """Return the batches as plain types and tensors; none if they cannot be."""
        try:
            return [(as_stored(batch), index) for batch, index in self.items]
        except TypeError as error:
            if not self._warned:
                rank_zero_warn(
                    f"{self._user} on batches that hold {error}, which no checkpoint can hold: a run "
                    "that is resumed shortly before does so on other batches. Let the loader return tensors, "
                    "numbers and strings, in tuples, lists and dicts."
                )
                self._warned = True
            return []

    def load_state_dict(self, state: Sequence[tuple[Any, Any]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.items = deque(((from_stored(batch), index) for batch, index in state), maxlen=BATCHES)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_catcher": None}


def as_forward(kept: tuple[Any, dict[str, Any]], device: torch.device) -> ForwardInputs:
    """Return kept arguments of a forward as inputs on a device."""
    args, kwargs = kept
    return map_inputs(lambda tensor: tensor.to(device), ForwardInputs(tuple(args), dict(kwargs)))


def _kept(batch: Any) -> Any:
    """Return a copy of a batch, of at most :data:`ROWS` rows where it consists of tensors with as many."""
    leaves: list[Any] = []
    try:
        _visit(batch, leaves.append)
    except TypeError:  # an object of the user's
        return copy.deepcopy(batch)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    aligned = len(sizes) == 1 and not any(isinstance(leaf, str) for leaf in leaves)

    def kept(tensor: Tensor) -> Tensor:
        part = tensor[:ROWS] if aligned and tensor.ndim else tensor
        return part.detach().to("cpu", copy=True)

    return apply_to_collection(batch, Tensor, kept)


def _visit(value: Any, leaf: Callable[[Any], object]) -> None:
    if isinstance(value, Mapping):
        for item in value.values():
            _visit(item, leaf)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _visit(item, leaf)
    elif isinstance(value, (*_PLAIN, Tensor)):
        leaf(value)
    else:
        raise TypeError(f"a {type(value).__name__}")


class _Fields(dict[Any, Any]):
    """A mapping whose items are attributes too, as those of a tokenizer's BatchEncoding."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def as_stored(batch: Any) -> Any:
    """Return a batch as a checkpoint holds it: tensors and plain types only.

    Raises:
        TypeError: If it holds anything else; the message is "a ..." with the name of its class.
    """
    if type(batch) in _PLAIN or isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        items = [(as_stored(key), as_stored(value)) for key, value in batch.items()]
        return {"kind": "dict" if type(batch) is dict else "mapping", "items": items}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        kind = "indexed" if isinstance(batch, Indexed) else "fields"
        return {"kind": kind, "names": list(batch._fields), "items": [as_stored(item) for item in batch]}
    if type(batch) in (list, tuple):
        return {"kind": type(batch).__name__, "items": [as_stored(item) for item in batch]}
    raise TypeError(f"a {type(batch).__name__}")


def from_stored(stored: Any) -> Any:
    """Return the batch that :func:`as_stored` stored. Mappings and named tuples keep the names of their items."""
    if not isinstance(stored, dict):
        return stored
    kind, items = stored["kind"], stored["items"]
    if kind in ("dict", "mapping"):
        pairs = {from_stored(key): from_stored(value) for key, value in items}
        return pairs if kind == "dict" else _Fields(pairs)
    values = [from_stored(item) for item in items]
    if kind == "indexed":
        return Indexed(*values)
    if kind == "fields":
        return namedtuple("Batch", stored["names"])(*values)
    return values if kind == "list" else tuple(values)
