"""The ranges of activations: folded from batches, and settled."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_optim.functional.fake_quantize import affine_parameters, symmetric_parameters
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.learned import FIRST

__all__ = ["copy_ranges", "fold_ranges", "observing", "settle_ranges", "unseen_inputs", "write_scales"]

Reduce = Callable[[Tensor, str], Tensor]
"""Sums ("sum") a tensor over the ranks, or returns its maximum ("max")."""

_Watched = list[tuple[str, QuantizedLayer, str]]


def _watched(layers: Mapping[str, QuantizedLayer], phases: tuple[str, ...]) -> _Watched:
    return [
        (name, layer, which)
        for name, layer in layers.items()
        for which in layer.watched
        if layer.phase_of(which) in phases
    ]


@contextmanager
def observing(layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """Let layers record their inputs and outputs while the block runs."""
    for layer in layers.values():
        layer.observing = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.observing = False


def fold_ranges(layers: Mapping[str, QuantizedLayer], reduce: Reduce | None = None) -> None:
    """Fold what was recorded since the last call into the statistics, and update the scales.

    Args:
        layers: Layers with the same observer and number of activation bits.
        reduce: Pools over ranks, in one call for all layers.
    """
    watched = _watched(layers, ("observe", "fake_quantize"))
    if not watched:
        return
    first = watched[0][1]
    observer = OBSERVERS[first.observer]
    states = [layer.state_of(which) for _, layer, which in watched]
    statistic = torch.stack([state["statistic"] for state in states])
    batches = torch.stack([state["batches"] for state in states])
    seen = _take_seen(watched, statistic, observer.reduction)
    if reduce is not None:
        seen = reduce(seen, observer.reduction)
    nothing = (seen == (-torch.inf if observer.reduction == "max" else 0)).all(1, keepdim=True)
    folded = torch.where(nothing, statistic, observer.fold(statistic, seen, batches))
    _write(states, "statistic", folded)
    _write(states, "batches", batches + ~nothing[:, 0])
    if not observer.settles:
        write_scales(states, first)


def _take_seen(watched: _Watched, statistic: Tensor, reduction: str) -> Tensor:
    """Return what was recorded, and clear it; a layer without a record gets the reduction's neutral element."""
    nothing = torch.full_like(statistic[0], -torch.inf if reduction == "max" else 0.0)
    seen = []
    for _, layer, which in watched:
        own: Tensor | None = getattr(layer, f"seen_{which}", None)
        seen.append(nothing if own is None else own)
        setattr(layer, f"seen_{which}", None)
    return torch.stack(seen)


def _write(states: list[dict[str, Tensor]], name: str, values: Tensor) -> None:
    torch._foreach_copy_([state[name] for state in states], list(values.unbind(0)))


def write_scales(states: list[dict[str, Tensor]], layer: QuantizedLayer) -> None:
    """Compute scales and zero points from the statistics.

    Args:
        states: :meth:`QuantizedLayer.state_of` of several watched tensors.
        layer: One of their layers; all have the same observer, bits and kind of range.
    """
    if not states:
        return
    bits = layer.activation_bits or 8
    statistic = torch.stack([state["statistic"] for state in states])
    observer = OBSERVERS[layer.observer]
    if layer.activation_ranges == "symmetric":  # half of the integers are there for each sign
        largest = observer.range_of(observer.magnitudes(statistic), bits - 1)
        scale, zero_point = symmetric_parameters(*largest, bits)
    else:
        scale, zero_point = affine_parameters(*observer.range_of(statistic, bits), bits)
    _write(states, "scale", scale)
    _write(states, "zero_point", zero_point)


def unseen_inputs(layers: Mapping[str, QuantizedLayer]) -> set[str]:
    """Return the layers whose input will be rounded and was never seen; layers that round already are skipped."""
    waiting = {
        name: torch.stack([layer.state_of(which)["batches"] for which in layer.operands]).amin()
        for name, layer in layers.items()
        if layer.rounds_operands and layer.quantization_phase in ("off", "observe")
    }
    counts = torch.stack(list(waiting.values())).tolist() if waiting else []
    return {name for name, count in zip(waiting, counts, strict=True) if not count}


def settle_ranges(layers: Mapping[str, QuantizedLayer]) -> None:
    """Compute the scales from the statistics, before they are used.

    Raises:
        RuntimeError: If an input was never seen or is not finite; the layers are named.
    """
    watched = _watched(layers, ("observe", "fake_quantize"))
    if not watched:
        return
    states = [layer.state_of(which) for _, layer, which in watched]
    batches = torch.stack([state["batches"] for state in states]).tolist()
    counted = zip(watched, batches, strict=True)
    unseen = list(
        dict.fromkeys(name for (name, layer, which), count in counted if not count and which in layer.operands)
    )
    if unseen:
        raise RuntimeError(
            f"no input of {', '.join(unseen[:5])} was seen while ranges were observed: the forward pass does not call "
            f"{'it' if len(unseen) == 1 else 'them'}. Pass exclude={unseen[:5]!r}."
        )
    statistic = torch.stack([state["statistic"] for state in states])
    finite = torch.isfinite(statistic).all(1).tolist()
    infinite = [f"the {which} of {name}" for (name, _, which), ok in zip(watched, finite, strict=True) if not ok]
    if infinite:
        raise RuntimeError(
            f"{infinite[0]} is not finite for some batch, so it has no range. Look for overflow before that layer, or "
            "exclude it."
        )
    write_scales(states, watched[0][1])


def copy_ranges(layers: Mapping[str, QuantizedLayer], copies: Mapping[str, QuantizedLayer]) -> None:
    """Copy the ranges of the live layers to an averaged copy: an average of ranges would lag behind."""
    pairs = [
        (copies[name].state_of(which)[part], tensor)
        for name, layer in layers.items()
        for which in layer.watched
        for part, tensor in layer.state_of(which).items()
    ]
    pairs += [
        (getattr(copies[name], FIRST), getattr(layer, FIRST))
        for name, layer in layers.items()
        if FIRST in layer._buffers
    ]
    if pairs:
        torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
