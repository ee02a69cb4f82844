"""Features: pairs of a student layer and a teacher layer, and proposals for them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.losses import FEATURE_LOSSES, FeatureLoss
from lightning_optim.modules import CONVOLUTIONS, LINEARS, TRANSPOSED

__all__ = ["Feature", "candidate_layers", "channel_axis", "feature_names", "pair_stacks", "propose_features"]


@dataclass(frozen=True)
class Feature:
    """A student layer trained to match the output of a teacher layer.

    Args:
        student: Dotted name of the student's layer; ``"layers.-1"`` is the last block of the stack ``layers``. A place
            from the end means the block that is there now, also after blocks were removed.
        teacher: The same for the (first) teacher.
        loss: Name in ``functional.losses.FEATURE_LOSSES`` or a callable ``(student_feature, teacher_feature)``. One
            with an argument ``mask`` gets the positions of sequences that count; the others get zeros where none do.
        weight: Weight in the total loss, >= 0.
        projector: Whether a learned projection maps the student's feature to the teacher's width; None: if the loss
            needs one.

    Raises:
        TypeError: If a layer is not given by its name.
        ValueError: If the loss is unknown or the weight negative.

    Examples:
        >>> feature = Feature("net.4", "encoder.9", "hint", weight=0.1)
        >>> feature.student, feature.teacher
        ('net.4', 'encoder.9')
    """

    student: str
    teacher: str
    loss: FeatureLoss | str = "hint"
    weight: float = 1.0
    projector: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.student, self.teacher):
            if not isinstance(name, str):
                raise TypeError(f"a feature names a layer of the student and one of the teacher, got {name!r}.")
        if not self.weight >= 0:
            raise ValueError(f"the weight of feature {self.student!r} must be a number >= 0, got {self.weight!r}.")
        FEATURE_LOSSES.resolve(self.loss)

    @classmethod
    def of(cls, feature: Any) -> "Feature":
        """Read ``(student layer, teacher layer[, loss[, weight]])``, or a mapping with these keys."""
        if isinstance(feature, Feature):
            return feature
        if isinstance(feature, Mapping):
            return cls(**feature)
        if isinstance(feature, str) or not 2 <= len(feature) <= 5:
            raise TypeError(f"a feature is (student layer, teacher layer[, loss[, weight]]), got {feature!r}.")
        return cls(*feature)

    @property
    def function(self) -> FeatureLoss:
        """The loss function."""
        return FEATURE_LOSSES.resolve(self.loss)

    def loss_of(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the loss of a feature, projected if it has to be.

        Args:
            ours: The student's.
            theirs: The teacher's.
            mask: The positions that count, ``[rows, positions]``; None: all.
        """
        function = self.function
        if mask is None:
            return function(ours, theirs)
        if "mask" in inspect.signature(function).parameters:
            return function(ours, theirs, mask=mask)
        return function(*(torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)) for x in (ours, theirs)))

    @property
    def projects(self) -> bool:
        """Whether it has a projector."""
        needs: tuple[str, ...] = getattr(self.function, "needs", ())
        return "projector" in needs if self.projector is None else self.projector


def feature_names(features: Sequence[Feature]) -> list[str]:
    """Return a metric name for each feature: the student's layer, with the loss where a layer is named twice."""
    layers = [feature.student for feature in features]
    return [
        layer if layers.count(layer) == 1 else f"{layer}.{getattr(feature.function, '__name__', 'loss')}"
        for layer, feature in zip(layers, features, strict=True)
    ]


def channel_axis(feature: Tensor) -> int:
    """Return the dimension of a feature's width: 1 for images, otherwise the last."""
    return 1 if feature.ndim >= 4 else feature.ndim - 1


def pair_stacks(
    student: Mapping[str, Mapping[str, Tensor]],
    teacher: Mapping[str, Mapping[str, Tensor]],
    loss: FeatureLoss | str = "hint",
    pairs: int | None = None,
) -> list[Feature]:
    """Pair the blocks of stacks of any depth evenly: the last with the last, the others at the same relative depth.

    Stacks are paired in call order. Where the widths are equal, hidden states are compared without a projector.

    Args:
        student: Stack -> block -> hidden state, in call order.
        teacher: The same for the teacher.
        loss: The loss of every pair.
        pairs: How many pairs a stack gives at most; None: as many as the shorter one has blocks.

    Returns:
        The pairs; none if the numbers of stacks differ, or their hidden states are of different kinds, or images.
    """
    if len(student) != len(teacher):
        return []
    found: list[Feature] = []
    for ours, theirs in zip(student.values(), teacher.values(), strict=True):
        kinds = {state.ndim for state in (*ours.values(), *theirs.values())}
        if len(kinds) != 1 or not kinds <= {2, 3}:
            return []
        for one, other in _evenly(list(ours), list(theirs), pairs):
            pair = Feature(one, other, loss)
            same = ours[one].shape[-1] == theirs[other].shape[-1]
            found.append(replace(pair, projector=False) if same and pair.projects else pair)
    return found


def _evenly(ours: Sequence[str], theirs: Sequence[str], pairs: int | None = None) -> list[tuple[str, str]]:
    count = min(len(ours), len(theirs), *([] if pairs is None else [pairs]))
    return [(ours[_at(i, count, len(ours))], theirs[_at(i, count, len(theirs))]) for i in range(count)]


def propose_features(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    loss: FeatureLoss | str = "hint",
    pairs: int | None = None,
) -> list[Feature]:
    """Propose pairs: images by resolution (the last layer of each), everything else by relative depth.

    Args:
        student: Features by layer name, in call order.
        teacher: The same for the teacher.
        loss: The loss of every pair.
        pairs: How many pairs at most of each kind of feature; None: as many as there are.
    """
    found: list[tuple[str, str]] = []
    theirs = _by_kind(teacher)
    for kind, names in _by_kind(student).items():
        others = theirs.get(kind)
        if not others:
            continue
        if kind[0] == 4:
            found.append((names[-1], others[-1]))
        else:
            found += _evenly(names, others, pairs)
    return [Feature(ours, other, loss) for ours, other in found]


def _at(position: int, count: int, length: int) -> int:
    """Return the last index of one of ``count`` equal parts of a list, so that the last pair is at the end."""
    return (position + 1) * length // count - 1


def _by_kind(features: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in features.items():
        kinds.setdefault((tensor.ndim, *(tensor.shape[2:] if tensor.ndim == 4 else ())), []).append(name)
    return kinds


def candidate_layers(root: nn.Module) -> list[str]:
    """Return layers whose features are worth matching: repeated blocks, or else layers that hold a matrix or kernel.

    The last layer of a model without blocks returns its logits and is left out.
    """
    blocks = [
        f"{name}.{child}" if name else child
        for name, module in root.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child, block in module.named_children()
        if any(True for _ in block.children())
    ]
    if len(blocks) > 1:
        return [block for block in blocks if not any(block.startswith(f"{other}.") for other in blocks)]
    kinds = (*LINEARS, *CONVOLUTIONS, *TRANSPOSED)
    return [name for name, module in root.named_modules() if isinstance(module, kinds)][:-1]
