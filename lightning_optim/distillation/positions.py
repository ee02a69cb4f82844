"""Which rows of a batch are distilled: logits and labels of all kinds of models, masks, and causal shifts."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.rows import IGNORED, class_dims, labels_at, labels_of_next, rows_of, tells_shift
from lightning_optim.outputs import output_tensors
from lightning_optim.target import ForwardInputs

__all__ = [
    "Positions",
    "Rows",
    "answered_positions",
    "find_labels",
    "find_logits",
    "find_loss",
    "find_mask",
    "fitting_mask",
    "has_decoder",
    "named_inputs",
    "one_a_row",
]

_LABELS = ("labels", "label", "targets", "target", "y")
_SPAN = ("start", "end")
_ENCODER_DECODER = "is_encoder_decoder"
_IGNORED_BY_MODEL = "semantic_loss_ignore_index"
_CAUSAL = ("ForCausalLM", "LMHeadModel")

Shape = Sequence[int]


def find_logits(output: Any) -> Tensor | None:
    """Return the logits in an output of student or teacher, or None.

    A tensor itself, ``.logits``, the entry ``"logits"``, both ends of a span (``start_logits`` and ``end_logits``, as
    ``[rows, 2, positions]``), or the first tensor of a tuple, dict, dataclass or other object that is neither a scalar
    (a loss) nor integers.
    """
    if isinstance(output, Tensor):
        return output
    named = _entry(output, "logits")
    if isinstance(named, Tensor):
        return named
    ends = [_entry(output, f"{end}_logits") for end in _SPAN]
    if all(isinstance(end, Tensor) for end in ends):
        return torch.stack(ends, 1)
    return next((tensor for tensor in output_tensors(output) if tensor.ndim > 0 and tensor.is_floating_point()), None)


def find_loss(output: Any) -> Tensor | None:
    """Return the loss in a model's output, or None."""
    loss = _entry(output, "loss")
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def named_inputs(called: nn.Module, inputs: ForwardInputs) -> dict[str, Any]:
    """Return the arguments of a module's forward by their names."""
    keywords = inputs.kwargs or {}
    try:
        bound = inspect.signature(called.forward).bind_partial(*inputs.args, **keywords)
    except (TypeError, ValueError):
        return dict(keywords)
    return {**bound.arguments, **keywords}


def find_labels(batch: Any, received: Mapping[str, Any]) -> Any:
    """Return the labels of a batch, or None.

    The labels passed to the forward; the entry ``labels``, ``label``, ``targets``, ``target`` or ``y`` of a dict, or
    its ends of a span; in a tuple, the first item after the first that is not an input of the forward.

    Args:
        batch: The batch.
        received: The arguments of the student's forward by their names.
    """
    named = batch if isinstance(batch, Mapping) else {}
    for source, names in ((received, _LABELS[:-1]), (named, _LABELS)):
        labels = next((source[name] for name in names if source.get(name) is not None), None)
        if labels is not None:
            return labels
    ends = [named.get(f"{end}_positions") for end in _SPAN]
    if all(isinstance(end, Tensor) for end in ends):
        return torch.stack(ends, 1)  # type: ignore[arg-type]
    if isinstance(batch, (tuple, list)) and batch:
        inputs = [value for value in received.values() if value is not batch[0]]  # (tokens, tokens): input and labels
        return next((item for item in batch[1:] if not any(item is value for value in inputs)), None)
    return None


def find_mask(batch: Any, received: Mapping[str, Any], student: nn.Module) -> Tensor | None:
    """Return the mask of the positions of the student's output: a decoder's own, never its encoder's; None: all.

    Args:
        batch: The batch.
        received: The arguments of the student's forward by their names.
        student: The student, whose config may say that it has an encoder and a decoder.
    """
    named = batch if isinstance(batch, Mapping) else {}
    name = "decoder_attention_mask" if has_decoder(received, student) else "attention_mask"
    mask = received.get(name)
    mask = named.get(name) if mask is None else mask
    return mask if isinstance(mask, Tensor) else None


def has_decoder(received: Mapping[str, Any], student: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder, whose output is the model's.

    Args:
        received: The arguments of its forward by their names.
        student: The model, whose config may say so.
    """
    return any(name.startswith("decoder_") for name in received) or _says(student, _ENCODER_DECODER, True)


def _configs(student: nn.Module) -> list[Any]:
    """Return the configs of a Hugging Face model and its parts."""
    return [module.__dict__["config"] for module in student.modules() if "config" in module.__dict__]


def _says(student: nn.Module, name: str, value: Any) -> bool:
    return any(getattr(config, name, None) == value for config in _configs(student))


def _predicts_next(student: nn.Module) -> bool:
    """Whether a student is, or contains, a causal language model of Hugging Face."""
    names = [type(module).__name__ for module in student.modules() if "config" in module.__dict__]
    return any(name.endswith(_CAUSAL) for name in names) and not _says(student, _ENCODER_DECODER, True)


def one_a_row(logits: Tensor) -> Tensor:
    """Return one logit per row as ``[rows, 1]``, and other logits unchanged.

    Raises:
        ValueError: If it is a single number.
    """
    if logits.ndim == 0:
        raise ValueError(
            "the logits are a single number, as a loss is. Override `get_logits(output)`: [rows, ..., classes]."
        )
    return logits.unsqueeze(-1) if logits.ndim == 1 else logits


@dataclass(frozen=True)
class Rows:
    """The rows of one call to compare.

    Attributes:
        dim: The dimension of the logits that holds the classes.
        keep: The positions that count, ``[rows, positions...]``; None: all.
        targets: Labels of the rows that count; None if there are none.
    """

    dim: int
    keep: Tensor | None = None
    targets: Any = None

    def of(self, logits: Tensor) -> Tensor:
        """Return the rows of logits, ``[rows, classes]``."""
        return rows_of(logits, self.keep, self.dim)

    def count(self, logits: Tensor) -> int:
        """Return the number of rows of logits that count."""
        return logits.numel() // logits.shape[self.dim] if self.keep is None else int(self.keep.sum())


class Positions:
    """Finds the rows of each call, and remembers the layout of earlier batches.

    With as many positions as classes, both layouts fit the labels: an earlier batch decides. Without one, sequences
    have their classes last and images in dimension 1, as their losses take them.
    """

    def __init__(self) -> None:
        self._dim: int | None = None
        self._shifts: bool | None = None

    def dim_of(
        self,
        logits: Tensor,
        labels: Any,
        *,
        mask: Tensor | None = None,
        told: int | None = None,
        matters: bool = True,
    ) -> int:
        """Return the dimension of logits that holds the classes.

        Args:
            logits: At least two dimensions.
            labels: Labels of the batch; ignored unless they are a tensor.
            mask: The positions that count; its shape is used if the labels' is not.
            told: The user's setting, 1 or -1; None: find out.
            matters: Whether the losses depend on it; otherwise an unknown dimension is the last one.

        Raises:
            ValueError: If neither the shapes nor an earlier batch decide, and it matters.
        """
        last = logits.ndim - 1
        if told is not None or last == 1:
            return last if told == -1 else 1
        shapes = [tuple(tensor.shape) for tensor in (labels, mask) if isinstance(tensor, Tensor)]
        fitting = next((dims for shape in shapes if (dims := class_dims(logits.shape, shape))), [])
        if len(fitting) == 1:
            self._dim = 1 if fitting == [1] else -1
            return fitting[0]
        known = last if self._dim == -1 else self._dim
        if known is not None and (known in fitting or not isinstance(labels, Tensor)):
            return known
        if not fitting and not isinstance(labels, Tensor):
            fitting = class_dims(logits.shape, None)
        if not fitting and not matters:
            return last
        if not fitting:
            raise ValueError(_unknown(tuple(logits.shape), labels, mask))
        return fitting[-1] if logits.ndim == 3 else fitting[0]

    def read(
        self,
        logits: Tensor,
        labels: Any,
        mask: Tensor | None,
        *,
        student: nn.Module,
        dim: int,
        loss: Tensor | None = None,
        shifts: bool | None = None,
    ) -> Rows:
        """Return the rows of one call that count, with their labels.

        Args:
            logits: At least two dimensions.
            labels: Labels of the batch; None: unknown.
            mask: The positions that count, ``[rows, positions...]``.
            student: The student.
            dim: The dimension that holds the classes.
            loss: The loss that the model or its step computed from both, which tells whether it shifts the labels.
            shifts: The user's setting for that; None: find out.

        Raises:
            ValueError: If the mask does not fit.
        """
        if logits.ndim == 2:
            return _of_samples(logits, labels)
        if mask is not None and not _is_of_positions(mask, logits.shape, dim):
            raise ValueError(_unfit(mask, logits.shape))
        keep = None if mask is None else mask.bool()
        if not isinstance(labels, Tensor) or dim not in class_dims(logits.shape, labels.shape):
            return Rows(dim, keep, labels)
        labels = _ignoring(labels_at(labels, logits.shape, dim), student)
        if self._shifted(logits, labels, dim, student, loss, shifts):
            labels = labels_of_next(labels)
        labeled = labels != IGNORED
        keep = labeled if keep is None else keep & labeled
        return Rows(dim, keep, labels[keep])

    def _shifted(
        self, logits: Tensor, labels: Tensor, dim: int, student: nn.Module, loss: Tensor | None, told: bool | None
    ) -> bool:
        """Whether each position predicts the next label: as the loss tells, or else the name of the model's class."""
        if told is not None:
            return told
        if labels.ndim != 2 or dim != 2 or labels.is_floating_point() or labels.shape[1] < 2:
            return False
        if self._shifts is None and bool((labels != IGNORED).any()):
            seen = None if loss is None else tells_shift(logits, labels, loss.detach())
            self._shifts = _predicts_next(student) if seen is None else seen
        return bool(self._shifts)


def answered_positions(
    shape: Shape, labels: Any, mask: Tensor | None, *, student: nn.Module, dim: int
) -> Tensor | None:
    """Return the positions whose logits a cache of the teacher holds: all that :meth:`Positions.read` can ever count.

    Whether the student predicts its own label or the next is not known where the cache is written. So a position counts
    here if either is labeled: one more at the end of each text.

    Args:
        shape: Shape of the logits.
        labels: Labels of the batch; ignored unless they are a tensor that fits.
        mask: The positions that count, ``[rows, positions...]``.
        student: The student.
        dim: The dimension that holds the classes.

    Returns:
        ``[rows, positions...]``, or ``[rows]`` of logits ``[rows, classes]``; None: all.

    Raises:
        ValueError: If the mask does not fit.
    """
    if len(shape) == 2:
        if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.numel() != shape[0] or len(labels) == shape[0]:
            return None
        flattened: Tensor = labels.reshape(-1)
        return flattened != IGNORED
    if mask is not None and not _is_of_positions(mask, shape, dim):
        raise ValueError(_unfit(mask, shape))
    keep = None if mask is None else mask.bool()
    if not isinstance(labels, Tensor) or dim not in class_dims(shape, labels.shape):
        return keep
    labels = _ignoring(labels_at(labels, shape, dim), student)
    labeled: Tensor = labels != IGNORED
    if labels.ndim == 2 and not labels.is_floating_point():
        labeled |= labels_of_next(labels) != IGNORED
    return labeled if keep is None else keep & labeled


def _of_samples(logits: Tensor, labels: Any) -> Rows:
    """Return the rows of ``[rows, classes]``: all samples, labeled or not; of flattened positions, the labeled ones."""
    if not isinstance(labels, Tensor) or labels.numel() != len(logits) or labels.ndim == 0:
        return Rows(1, None, labels)
    flat = labels.reshape(-1)
    if len(labels) == len(logits):
        return Rows(1, None, flat)
    keep = flat != IGNORED
    return Rows(1, keep, flat[keep])


def _ignoring(labels: Tensor, student: nn.Module) -> Tensor:
    """Replace the ignored label of a Hugging Face segmentation model by that of torch's losses."""
    for config in _configs(student):
        ignored = getattr(config, _IGNORED_BY_MODEL, None)
        if isinstance(ignored, int):
            return labels.masked_fill(labels == ignored, IGNORED)
    return labels


def fitting_mask(mask: Tensor | None, logits: Tensor, labels: Any, dim: int) -> Tensor | None:
    """Return a model's own mask if it is a mask of the output's positions, or has to be.

    Without labels, a mask that does not fit is kept, to be rejected later. The mask of a span's classes, which are its
    positions, is dropped.
    """
    if mask is None or _is_of_positions(mask, logits.shape, dim):
        return mask
    of_classes = tuple(mask.shape) == (logits.shape[0], logits.shape[dim])
    return None if isinstance(labels, Tensor) or of_classes else mask


def _is_of_positions(mask: Tensor, logits: Shape, dim: int) -> bool:
    return tuple(mask.shape) == (*logits[:dim], *logits[dim + 1 :])


def _unfit(mask: Tensor, logits: Shape) -> str:
    return (
        f"the padding mask {tuple(mask.shape)} does not fit logits {tuple(logits)}: it needs one entry per "
        "position. Override `padding_mask(batch, inputs)`."
    )


def _unknown(logits: tuple[int, ...], labels: Any, mask: Tensor | None) -> str:
    if mask is not None:
        return _unfit(mask, logits)
    told = f"labels {tuple(labels.shape)} do not tell" if isinstance(labels, Tensor) else "no labels tell"
    return (
        f"logits {logits}: {told} which dimension holds the classes. Expected logits [rows, ..., classes] or "
        "[rows, classes, ...], and labels of the same shape without the classes. Set `class_dim` of the "
        "DistillationModule to -1 or 1; if labels of another shape are not classes, let `targets(batch)` return None; "
        "if every position has one logit, let `get_logits(output)` return `logits.unsqueeze(1)`."
    )
