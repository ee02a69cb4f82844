"""Features: what layers of student and teacher give out, how their widths are matched, and which channels survive."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.functional.losses import FEATURE_LOSSES, FeatureLoss
from lightning_optim.modules import (
    CONVOLUTIONS,
    EMBEDDINGS,
    INPUTS_FIRST,
    TRANSPOSED,
    copy_module,
    evaluating,
    without_compiler,
)
from lightning_optim.outputs import output_tensors
from lightning_optim.structured.groups import Removal
from lightning_optim.structured.removal import apply_removal
from lightning_optim.target import ForwardInputs

__all__ = [
    "Capture",
    "Feature",
    "channel_axis",
    "find_layer",
    "propose_features",
    "surviving_channels",
    "tensor_of",
]

_LAST_AXIS = (nn.Linear, nn.LayerNorm, *EMBEDDINGS)


@dataclass(frozen=True)
class Feature:
    """A layer of the student that is to give what a layer of the teacher gives.

    Args:
        student: Dotted name of the student's layer.
        teacher: Dotted name of the (first) teacher's layer.
        loss: Name in ``functional.losses.FEATURE_LOSSES`` or a callable ``(student_feature, teacher_feature)``.
        weight: Weight in the total loss, >= 0.
        projector: Whether the student's feature goes through a learned projection to the teacher's width; None: where
            the loss asks for one.

    Raises:
        TypeError: If a layer is not given by its name.
        ValueError: If the loss is unknown or the weight negative.
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
    def of(cls, given: Any) -> "Feature":
        """Read ``(student layer, teacher layer)``, with loss and weight after them, or a mapping of the same words."""
        if isinstance(given, Feature):
            return given
        if isinstance(given, Mapping):
            return cls(**given)
        if isinstance(given, str) or not 2 <= len(given) <= 5:
            raise TypeError(f"a feature is (student layer, teacher layer[, loss[, weight]]), got {given!r}.")
        return cls(*given)

    @property
    def function(self) -> FeatureLoss:
        """The loss function."""
        return FEATURE_LOSSES.resolve(self.loss)

    @property
    def projects(self) -> bool:
        """Whether there is a projector."""
        needs: tuple[str, ...] = getattr(self.function, "needs", ())
        return "projector" in needs if self.projector is None else self.projector


def feature_names(features: Sequence[Feature]) -> list[str]:
    """Return a name for each feature, for metrics: the student's layer, and the loss where a layer is named twice."""
    layers = [feature.student for feature in features]
    return [
        layer if layers.count(layer) == 1 else f"{layer}.{getattr(feature.function, '__name__', 'loss')}"
        for layer, feature in zip(layers, features, strict=True)
    ]


def find_layer(root: nn.Module, name: str, word: str) -> nn.Module:
    """Return the layer of a dotted name; the empty name is ``root``.

    Args:
        root: The student or a teacher.
        name: The layer's name.
        word: What the name is, for the error ("feature", "logits_from").

    Raises:
        ValueError: If there is none; the nearest names are listed.
    """
    try:
        return root.get_submodule(name)
    except AttributeError:
        names = [each for each, _ in root.named_modules() if each]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"{word}: {type(root).__name__} has no layer {name!r}. Nearest: {', '.join(near) or 'it has no layers'}."
        ) from None


class Capture:
    """Catch inputs and outputs of layers while other code runs; the hooks live as long as the ``with`` block.

    Registered anew for each step, hooks outlive a layer that is swapped, are not in copies of the module, and do not
    fire again when activations are recomputed in the backward pass.

    Args:
        root: The module.
        names: Dotted names of its layers.
        word: What the names are, for errors.
        trains: Leave out calls without gradient, where the code around records gradients: a metric of the training
            step, say, that calls the model again.

    Raises:
        ValueError: If there is no such layer.
        MisconfigurationException: If a layer lies inside a compiled one, where hooks do not fire.
    """

    def __init__(self, root: nn.Module, names: Iterable[str], word: str = "feature", *, trains: bool = False) -> None:
        self.trains = trains and torch.is_grad_enabled()
        self.without_gradient = 0
        self.layers = {name: find_layer(root, name, word) for name in names}
        for name in self.layers:
            _refuse_compiled(root, name)
        self.calls: dict[str, list[tuple[ForwardInputs, Any]]] = {name: [] for name in self.layers}
        self._restore: list[Callable[[], object]] = []

    def __enter__(self) -> "Capture":
        for name, layer in self.layers.items():
            compiled = getattr(layer, "_compiled_call_impl", None)
            if compiled is not None:  # a hook would be traced into the graph, and later ones never seen
                self._around(layer, compiled, self.calls[name])
            else:
                handle = layer.register_forward_hook(self._hook(self.calls[name]), with_kwargs=True)
                self._restore.append(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        for restore in self._restore:
            restore()
        self._restore = []

    def _note(self, calls: list[tuple[ForwardInputs, Any]], args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.trains and not torch.is_grad_enabled():
            self.without_gradient += 1
        else:
            calls.append((ForwardInputs(args, dict(kwargs)), output))

    def _hook(self, calls: list[tuple[ForwardInputs, Any]]) -> Callable[[nn.Module, Any, Any, Any], None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._note(calls, args, kwargs, output)

        return note

    def _around(self, layer: Any, compiled: Callable[..., Any], calls: list[tuple[ForwardInputs, Any]]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            self._note(calls, args, kwargs, output)
            return output

        layer._compiled_call_impl = call
        self._restore.append(lambda: setattr(layer, "_compiled_call_impl", compiled))

    def outputs(self, name: str) -> list[Tensor]:
        """Return the tensors a layer gave out, one a call."""
        return [tensor_of(output) for _, output in self.calls[name]]


def _refuse_compiled(root: nn.Module, name: str) -> None:
    parts = name.split(".") if name else []
    for depth in range(len(parts)):
        above = root.get_submodule(".".join(parts[:depth]))
        if getattr(above, "_compiled_call_impl", None) is not None or without_compiler(above) is not above:
            raise MisconfigurationException(
                f"layer {name!r} lies inside {'.'.join(parts[:depth]) or type(root).__name__!r}, which is compiled: "
                "its output cannot be seen from outside. Compile the parts below or beside it instead."
            )


def tensor_of(output: Any) -> Tensor:
    """Return the first tensor in a layer's output.

    Raises:
        TypeError: If there is none.
    """
    for tensor in output_tensors(output):
        return tensor
    raise TypeError(f"a layer whose feature is used must give out a tensor, got {type(output).__name__}.")


def channel_axis(feature: Tensor) -> int:
    """Return where a feature's width is: dimension 1 of an image, else the last."""
    return 1 if feature.ndim >= 4 else feature.ndim - 1


def observe(root: nn.Module, call: nn.Module, inputs: ForwardInputs, names: Iterable[str]) -> dict[str, Tensor]:
    """Return features of one dry forward in eval mode; modes come back.

    Args:
        root: The module whose names are given.
        call: What of it is called.
        inputs: With these inputs.
        names: Layers whose features are wanted.

    Raises:
        ValueError: If a layer is not called.
    """
    with evaluating(root), Capture(root, names) as caught:
        inputs.call(call)
    for name in caught.layers:
        if not caught.calls[name]:
            raise ValueError(f"feature {name!r} of {type(root).__name__} is not called by its forward.")
    return {name: caught.outputs(name)[0] for name in caught.layers}


# Proposals.


def propose_features(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], loss: FeatureLoss | str = "hint"
) -> list[Feature]:
    """Propose pairs: images by resolution (the last layer of each), all else by relative depth.

    Args:
        student: Features by layer name, in the order of calls.
        teacher: The same.
        loss: Of every pair.
    """
    pairs: list[tuple[str, str]] = []
    theirs = _by_kind(teacher)
    for kind, names in _by_kind(student).items():
        others = theirs.get(kind)
        if not others:
            continue
        if kind[0] == 4:
            pairs.append((names[-1], others[-1]))
        else:
            count = min(len(names), len(others))
            pairs += [(names[_at(i, count, len(names))], others[_at(i, count, len(others))]) for i in range(count)]
    return [Feature(ours, other, loss) for ours, other in pairs]


def _at(position: int, count: int, length: int) -> int:
    """The last of ``count`` equal parts of a list: pairs end at the end."""
    return (position + 1) * length // count - 1


def _by_kind(features: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in features.items():
        kinds.setdefault((tensor.ndim, *(tensor.shape[2:] if tensor.ndim == 4 else ())), []).append(name)
    return kinds


def candidate_layers(root: nn.Module) -> list[str]:
    """Return layers whose features are worth matching: repeated blocks, else those that hold a matrix or kernel.

    The last layer of a model without blocks gives its logits, and is left out.
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
    kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    return [name for name, module in root.named_modules() if isinstance(module, kinds)][:-1]


# Channels that leave.


def surviving_channels(
    student: nn.Module, called: str, inputs: ForwardInputs, layers: Iterable[str], removal: Removal
) -> dict[str, Tensor]:
    """Return which channels of features survive a removal, for those that lose some.

    Found on a copy of the student as it is: NaN goes into the channels that leave a layer; where it arrives in the
    feature channel by channel, these leave the feature too. Where layers mix channels everything becomes NaN.

    Args:
        student: The student before the removal.
        called: Name of its module that takes the inputs.
        inputs: What that module's forward receives.
        layers: Names of the features' layers.
        removal: What will be left of the student.

    Returns:
        Surviving channels, int64, by layer.

    Raises:
        ValueError: If a feature changes its width and its channels cannot be followed.
    """
    before, after = copy_module(student, rounded=False), copy_module(student, rounded=False)
    apply_removal(after, removal)
    names = list(layers)
    old = observe(before, before.get_submodule(called), inputs, names)
    new = observe(after, after.get_submodule(called), inputs, names)
    axes = {name: channel_axis(old[name]) for name in names}
    shrunk = [name for name in names if old[name].shape[axes[name]] != new[name].shape[axes[name]]]
    kept = {}
    for name in shrunk:
        width, left = old[name].shape[axes[name]], new[name].shape[axes[name]]
        found = _follow(before, called, inputs, name, width, removal)
        if found is None or len(found) != left:
            raise ValueError(
                f"feature {name!r} goes from {width} to {left} channels, and which ones stay cannot be told. Take a "
                "layer whose output is not concatenated or shuffled, a feature loss without projector ('rkd', "
                f"'similarity_preserving', 'attention_transfer'), or leave its channels alone: exclude=[{name!r}]."
            )
        kept[name] = found
    return kept


def _follow(
    student: nn.Module, called: str, inputs: ForwardInputs, feature: str, width: int, removal: Removal
) -> Tensor | None:
    for name, leaving, count in _leaving(student, removal):
        if width % count:
            continue
        one = _tainted(student, called, inputs, feature, name, leaving[:1])
        if int(one.sum()) != width // count:  # not reached, or mixed with others on the way
            continue
        return (~_tainted(student, called, inputs, feature, name, leaving)).nonzero().flatten()
    return None


def _leaving(student: nn.Module, removal: Removal) -> list[tuple[str, Tensor, int]]:
    """Return layers that lose outputs: name, channels that leave, channels there are."""
    found = {}
    for name, kept in removal.kept.items():
        owner, _, leaf = name.rpartition(".")
        layer = student.get_submodule(owner)
        parameter = layer._parameters.get(leaf)
        if parameter is None or leaf not in ("weight", "bias"):
            continue
        axis = 1 if isinstance(layer, INPUTS_FIRST) and leaf == "weight" else 0
        after = math.prod(parameter.shape[axis + 1 :])
        stay = kept.cpu() // after % parameter.shape[axis]
        leave = torch.ones(parameter.shape[axis], dtype=torch.bool)
        leave[stay] = False
        if leave.any():
            found[owner] = (owner, leave.nonzero().flatten(), parameter.shape[axis])
    return list(found.values())


def _tainted(
    student: nn.Module, called: str, inputs: ForwardInputs, feature: str, layer: str, channels: Tensor
) -> Tensor:
    """Return which channels of a feature are NaN when some channels of a layer are."""
    source = student.get_submodule(layer)

    def taint(module: nn.Module, args: Any, output: Any) -> Any:
        axis = -1 if isinstance(module, _LAST_AXIS) else 1
        return output.index_fill(axis, channels.to(output.device), float("nan"))

    handle = source.register_forward_hook(taint)
    try:
        seen = observe(student, student.get_submodule(called), inputs, [feature])[feature]
    finally:
        handle.remove()
    axis = channel_axis(seen)
    return seen.isnan().any(dim=[d for d in range(seen.ndim) if d != axis]).cpu()
