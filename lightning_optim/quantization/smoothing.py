"""Moves the range of activations with outliers into the weights that read them, and proves that nothing else changes.

A channel that is a hundred times the others takes the whole range of a tensor's 8 bits. Dividing it where it is made
(by the weights of a norm or a Linear) and multiplying the weights that read it leaves the model's answers as they are.
Which layer makes what another one reads is guessed from one forward pass, and proven: the factors are powers of two, so
what every other layer returns stays the same to the last bit where the guess is right (through a ReLU or an attention's
average, for example), and differs where it is wrong (through a GELU, or where something else reads the channels).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.smoothing import smoothing_scales
from lightning_optim.modules import LINEARS, Conv1D, evaluating, without_fast_path
from lightning_optim.outputs import output_tensors
from lightning_optim.target import ForwardInputs

__all__ = ["Smoothed", "smooth_inputs", "undo_smoothing"]

_NEAREST = 3
"""Layers before a Linear that are tried as the one that makes its inputs, the nearest first."""


@dataclass(frozen=True)
class Smoothed:
    """Channels that one layer makes and others read.

    Attributes:
        maker: Name of a norm or a Linear.
        readers: Names of the Linear layers.
        scales: By what the maker's channels were divided, ``[channels]``.
    """

    maker: str
    readers: tuple[str, ...]
    scales: Tensor


def undo_smoothing(model: nn.Module, moved: Iterable[Smoothed]) -> None:
    """Move the scales back; they are powers of two, so the weights are what they were."""
    for one in moved:
        group = _Group({name: model.get_submodule(name) for name in one.readers}, {})
        with torch.no_grad():
            _scale(group, model.get_submodule(one.maker), one.scales.reciprocal())


@dataclass(eq=False)
class _Group:
    """Linear layers that read one tensor, and which layers may have made it."""

    readers: dict[str, nn.Module]
    makers: dict[str, nn.Module]
    largest: Tensor | None = None

    def kind(self, maker: str) -> tuple[str, ...]:
        """Return what the same places of all blocks have in common."""
        return tuple(re.sub(r"\d+", "*", name) for name in (maker, *self.readers))


def smooth_inputs(
    model: nn.Module, calls: Sequence[ForwardInputs], readers: Mapping[str, nn.Module], alpha: float = 0.5
) -> list[Smoothed]:
    """Move scale from the inputs of Linear layers into their weights, in place.

    Args:
        model: The model, in float.
        calls: Arguments of its forward, from which the channels' ranges are taken; the first one proves each move.
        readers: The Linear layers whose inputs are to be rounded, by name in the model.
        alpha: How much moves, see :func:`~lightning_optim.functional.smoothing.smoothing_scales`.

    Returns:
        What was moved. The model's answers are what they were.
    """
    with evaluating(model), without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        groups = _find_groups(model, calls[0], readers)
        _measure(model, calls, groups)
        proof = _Proof(model, calls[0], {**readers, **{k: v for group in groups for k, v in group.makers.items()}})
        done: list[Smoothed] = []
        for place in range(_NEAREST):
            left = [group for group in groups if not any(set(group.readers) == set(one.readers) for one in done)]
            kinds: dict[tuple[str, ...], list[tuple[str, _Group]]] = {}
            for group in left:
                if len(group.makers) > place:
                    maker = list(group.makers)[place]
                    kinds.setdefault(group.kind(maker), []).append((maker, group))
            for members in kinds.values():
                done += _proven(members, alpha, proof)
    return done


class _Proof:
    """Whether every layer whose channels were not moved, and the model, return what they did."""

    def __init__(self, model: nn.Module, call: ForwardInputs, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._call, self._layers = model, call, layers
        self._expected = _answers(model, call, layers)
        self._moved: set[str] = set()

    def holds(self, makers: Iterable[str]) -> bool:
        """Look at a move of some layers' channels; one that is right counts from then on."""
        apart = self._moved.union(makers)
        answers = _answers(self._model, self._call, self._layers)
        if any(answers[name] != said for name, said in self._expected.items() if name not in apart):
            return False
        self._moved = apart
        return True


def _proven(members: Sequence[tuple[str, _Group]], alpha: float, proof: _Proof) -> list[Smoothed]:
    """Apply what is right: all of a kind, or what remains of it without those that are wrong."""
    applied = [_apply(maker, group, alpha) for maker, group in members]
    found = [one for one in applied if one is not None]
    if not found or proof.holds(one.maker for one in found):
        return found
    for (maker, group), one in zip(members, applied, strict=True):
        if one is not None:
            _scale(group, group.makers[maker], one.scales.reciprocal())
    if len(members) == 1:
        return []
    first = _proven(members[:1], alpha, proof)
    if not first:  # what the first block does not allow, the others will not
        return []
    middle = (len(members) + 1) // 2
    parts = [part for part in (members[1:middle], members[middle:]) if part]
    return [*first, *(one for part in parts for one in _proven(part, alpha, proof))]


def _find_groups(model: nn.Module, call: ForwardInputs, readers: Mapping[str, nn.Module]) -> list[_Group]:
    """Return the groups of Linear layers that read one tensor, with the layers that may make it."""
    shared = _shared_weights(model)
    makers = {
        name: layer for name, layer in model.named_modules() if _makes(layer) and id(_weight(layer)) not in shared
    }
    order: list[tuple[str, Tensor]] = []  # the tensors are kept, so that no two have one identity
    read: list[tuple[str, Tensor, int]] = []

    def note_made(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                order.append((name, output))

        return hook

    def note_read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                read.append((name, args[0], len(order)))

        return hook

    with ExitStack() as stack:
        for name, layer in readers.items():
            if isinstance(layer, LINEARS) and id(_weight(layer)) not in shared:
                stack.callback(layer.register_forward_pre_hook(note_read(name)).remove)
        for name, layer in makers.items():
            stack.callback(layer.register_forward_hook(note_made(name)).remove)
        call.call(model)
    made, asked = Counter(name for name, _ in order), Counter(name for name, *_ in read)
    groups: dict[int, _Group] = {}
    for name, tensor, place in read:
        if asked[name] > 1:
            continue
        group = groups.get(id(tensor))
        if group is None:
            width = tensor.shape[-1]
            before = [(maker, output) for maker, output in order[:place] if made[maker] == 1]
            same = [maker for maker, output in before if output is tensor]
            fitting = [maker for maker, output in reversed(before) if output.shape[-1] == width]
            names = same or list(dict.fromkeys(fitting))[:_NEAREST]
            group = groups[id(tensor)] = _Group({}, {maker: makers[maker] for maker in names})
        group.readers[name] = readers[name]
    return [group for group in groups.values() if group.makers]


def _measure(model: nn.Module, calls: Iterable[ForwardInputs], groups: Sequence[_Group]) -> None:
    """Note the largest magnitude of each channel that a group reads."""

    def note(group: _Group) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            largest = args[0].detach().float().abs().flatten(0, -2).amax(0)
            group.largest = largest if group.largest is None else torch.maximum(group.largest, largest)

        return hook

    with ExitStack() as stack:
        for group in groups:
            first = next(iter(group.readers.values()))
            stack.callback(first.register_forward_pre_hook(note(group)).remove)
        for call in calls:
            call.call(model)


def _apply(maker: str, group: _Group, alpha: float) -> Smoothed | None:
    """Move a group's scale; None if nothing is to be moved."""
    assert group.largest is not None  # noqa: S101 - each group was measured
    weights = [_by_input(layer).abs().amax(0) for layer in group.readers.values()]
    scales = smoothing_scales(group.largest, torch.stack(weights).amax(0), alpha)
    if bool((scales == scales[0]).all()):
        return None
    _scale(group, group.makers[maker], scales)
    return Smoothed(maker, tuple(group.readers), scales)


def _scale(group: _Group, maker: nn.Module, scales: Tensor) -> None:
    weight = _weight(maker)
    if weight.ndim == 1 or isinstance(maker, Conv1D):
        weight.div_(scales.to(weight))
    else:
        weight.div_(scales.to(weight)[:, None])
    if maker._parameters.get("bias") is not None:
        maker._parameters["bias"].div_(scales.to(weight))  # type: ignore[union-attr]
    for layer in group.readers.values():
        _by_input(layer).mul_(scales.to(weight))


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer._parameters.get("weight")
    return weight  # type: ignore[no-any-return]


def _by_input(layer: nn.Module) -> Tensor:
    """Return a Linear's weight with its input channels last, sharing its memory."""
    weight = _weight(layer).detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _makes(layer: nn.Module) -> bool:
    """Whether the channels of a layer's output are scaled by its weight: a norm with a vector, or a Linear."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or any(True for _ in layer.children()):
        return False
    others = set(layer._parameters) - {"weight", "bias"}
    outputs = weight.shape[0] if weight.ndim == 1 else weight.shape[1 if isinstance(layer, Conv1D) else 0]
    fits = bias is None or bias.shape == (outputs,)
    return not others and fits and (weight.ndim == 1 or isinstance(layer, LINEARS))


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the identities of weights that several layers hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared | {id(None)}


def _answers(model: nn.Module, call: ForwardInputs, layers: Mapping[str, nn.Module]) -> dict[str, list[bytes]]:
    """Return fingerprints of what each layer returns, and of the model's outputs under an empty name.

    A cache of keys and values is no output: it holds what layers inside made.
    """
    found: dict[str, list[bytes]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.setdefault(name, []).extend(map(_fingerprint, output_tensors(output)))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(name)).remove)
        found[""] = [_fingerprint(tensor) for tensor in output_tensors(call.call(model), objects=False)]
    return found


def _fingerprint(tensor: Tensor) -> bytes:
    """Return what two tensors have in common only if they are equal bit for bit."""
    plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().data, digest_size=16).digest()
