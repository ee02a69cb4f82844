"""Which quantized layers a file computes in float: integers make small layers slower.

Such a layer keeps its weight as integers in the file, which the engine multiplies out once, when it loads the file: the
file does not grow. What it reads and what it writes is not rounded. Tables are not touched: they compute nothing.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from lightning_optim.export.external import stored_bytes
from lightning_optim.export.integer import rounds, rounds_output
from lightning_optim.export.latency import runtime_latencies
from lightning_optim.export.report import Mix
from lightning_optim.export.runtimes import load_runtime
from lightning_optim.export.verify import Comparison
from lightning_optim.modules import CONVOLVING, EMBEDDINGS
from lightning_optim.quantization.experts import QuantizedExperts
from lightning_optim.quantization.layers import QuantizedLayer

__all__ = [
    "ALL_FLOAT",
    "ALL_INTEGERS",
    "FLOAT_EXPORT",
    "KEEP_FLOAT",
    "against_rounded",
    "fastest",
    "leave_float",
    "notes_on_float",
    "small_layers",
]

KEEP_FLOAT = ("small", "none", "auto")
"""Values of ``keep_float``."""

FLOAT_EXPORT, ALL_INTEGERS, ALL_FLOAT = "float32 export", "all integers", "integer weights, all computed in float"
"""Names of files that are always timed."""

SMALL_MATRIX = 128 * 128
"""Weights from which a matrix product gains from integers, at 1 row and more."""

SMALL_CONVOLUTION = 16 * 16 * 9
"""Weights up to which a convolution does not."""

BLOCKED = 4
"""Float kernels of ONNX Runtime need channels in multiples of it: others are slow, and integers win early."""

_GAIN = 0.98
"""Ratio of times below which a group of layers is worth computing in float."""

_Write = Callable[[Collection[str], Path], None]


def leave_float(module: nn.Module, names: Collection[str]) -> None:
    """Let quantized layers compute in float with their rounded weights, in place.

    Args:
        module: A copy that is not converted yet.
        names: Layers, and modules with quantized functions.
    """
    layers = dict(module.named_modules())
    for name in names:
        layer = layers[name]
        assert isinstance(layer, QuantizedLayer)  # noqa: S101 - only such have names here
        layer.activation_bits, layer.output_phase = None, "off"


def small_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the layers that are too small to gain from integers, and what lies between them.

    Between layers a change from integers to floats costs more than it gains: ONNX Runtime computes an integer product
    in float, with its weight scaled in each call, if a ReLU follows and no rounding. So convolutions are left float if
    all of them are small, and matrices if all layers are.

    Args:
        module: A quantized module.
    """
    layers = _integer_layers(module)
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, CONVOLVING)}
    matrices = layers.keys() - convolutions.keys()
    if not all(map(_is_small, convolutions.values())):
        return ()
    small = all(_weights(layers[name]) < SMALL_MATRIX for name in matrices)
    return _with_followers(module, layers if small else convolutions)


def _is_small(convolution: nn.Module) -> bool:
    channels: Any = convolution.in_channels
    is_slow_in_float = channels > 2 * BLOCKED and channels % BLOCKED != 0
    return _weights(convolution) <= SMALL_CONVOLUTION and not is_slow_in_float


def _weights(layer: nn.Module) -> int:
    weight = layer._parameters["weight"]
    assert weight is not None  # noqa: S101 - it is rounded
    return weight.numel()


def _integer_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers that a file would compute with integers."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLayer)
        and rounds(layer)
        and layer.activation_bits is not None
        and layer._parameters.get("weight") is not None
        and not isinstance(layer, (*EMBEDDINGS, QuantizedExperts))
        and (layer.activation_ranges == "dynamic" or "input" in layer.watched)
    }


def _with_followers(module: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """Add what only rounds operands or outputs, and goes with a layer: the last one inside it, or else before it.

    Of convolutions and matrices these are the convolutions, between which most of it stands.
    """
    every = _integer_layers(module)
    layers = {name: layer for name, layer in every.items() if isinstance(layer, CONVOLVING)} or every
    names = [name for name, layer in module.named_modules() if name in every or rounds_output(layer)]
    added = set(chosen)
    for place, name in enumerate(names):
        if name in every:
            continue
        inside = [other for other in names if other in layers and (not name or other.startswith(f"{name}."))]
        before = [other for other in names[:place] if other in layers]
        owner = inside[-1] if inside else before[-1] if before else next(iter(layers), None)
        if owner is None or owner in chosen:
            added.add(name)
    return tuple(name for name in names if name in added)


def groups(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return layers of one kind and of sizes within a factor of four together, by what they are called.

    Args:
        module: A quantized module.
    """
    found: dict[str, set[str]] = {}
    for name, layer in _integer_layers(module).items():
        kind = "matrices" if not isinstance(layer, CONVOLVING) else _kind_of_convolution(layer)
        most = 4 ** max(math.ceil(math.log(max(_weights(layer), 1), 4)), 1)
        found.setdefault(f"{kind} of {most // 4 + 1:,} to {most:,} weights", set()).add(name)
    return {name: _with_followers(module, layers) for name, layers in found.items()}


def _kind_of_convolution(layer: nn.Module) -> str:
    return "convolutions with groups" if getattr(layer, "groups", 1) > 1 else "convolutions"


def fastest(
    module: nn.Module, write: _Write, float_file: Path, batches: Sequence[Sequence[Tensor]], runtime: str
) -> tuple[Mix, tuple[Mix, ...]]:
    """Measure which layers to compute in float.

    First each group of layers alone, then all groups together that made the file faster. All files of a round are timed
    in turns. Of files that do not differ the one with more integers counts.

    Args:
        module: The quantized module.
        write: Writes the file in which the layers with these names compute in float.
        float_file: The float32 export.
        batches: Inputs of the calls to time.
        runtime: The engine.

    Returns:
        The fastest mix, and what was timed: the first is the float32 export, the second has all integers.
    """
    everything = _with_followers(module, _integer_layers(module))
    alone = groups(module)
    with TemporaryDirectory() as folder:
        timed = _Timed(write, float_file, Path(folder), batches, runtime)
        first = timed.round({ALL_INTEGERS: (), ALL_FLOAT: everything, **(alone if len(alone) > 1 else {})})
        integers = first[1]
        better = [mix for mix in first[3:] if mix.ratio < _GAIN * integers.ratio]
        together = tuple(name for name in everything if any(name in mix.layers for mix in better))
        candidates = {mix.name: mix.layers for mix in sorted(better, key=lambda mix: mix.ratio)[:1]}
        if len(better) > 1:
            candidates[" and ".join(mix.name for mix in better)] = together
        last = timed.round({ALL_INTEGERS: (), ALL_FLOAT: everything, **candidates}) if candidates else first
    best = min(last[1:], key=lambda mix: mix.ratio)
    chosen = last[1] if best.ratio >= _GAIN * last[1].ratio else best
    again = {mix.name for mix in last}
    return chosen, (*last, *(mix for mix in first if mix.name not in again))


class _Timed:
    def __init__(
        self, write: _Write, float_file: Path, folder: Path, batches: Sequence[Sequence[Tensor]], runtime: str
    ) -> None:
        self._write, self._folder, self._batches, self._runtime = write, folder, batches, runtime
        self._files: dict[tuple[str, ...], Path] = {}
        self._float = float_file

    def round(self, mixes: Mapping[str, tuple[str, ...]]) -> list[Mix]:
        """Time the float32 export and some mixes in turns."""
        named = {FLOAT_EXPORT: self._float, **{name: self._file(layers) for name, layers in mixes.items()}}
        loaded = [load_runtime(path, self._runtime) for path in named.values()]
        times = runtime_latencies(loaded, self._batches)
        return [
            Mix(name, tuple(mixes.get(name, ())), tuple(batch[place] for batch in times), stored_bytes(path))
            for place, (name, path) in enumerate(named.items())
        ]

    def _file(self, layers: tuple[str, ...]) -> Path:
        if layers not in self._files:
            path = self._folder / f"{len(self._files)}.onnx"
            self._write(layers, path)
            self._files[layers] = path
        return self._files[layers]


def notes_on_float(layers: Sequence[str], keep_float: str) -> list[str]:
    """Return what a report says about layers that compute in float."""
    if not layers:
        return []
    why = "too small to gain from integers" if keep_float == "small" else "faster so where this file was written"
    named = ", ".join(name or "the module's own functions" for name in layers[:4])
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return [
        f"Computed in float ({why}): {named}{more}. Their weights are stored as integers; what they read is not "
        'rounded, as it is in the module. keep_float="none" computes all with integers.'
    ]


def against_rounded(comparison: Comparison) -> str:
    """Return how a file that rounds less than the module agrees with it."""
    same = "" if comparison.agreement is None else f", the same class in {comparison.agreement:.2%}"
    return (
        "It was verified against the module without these roundings. Difference from the module with them: mean "
        f"{comparison.mean_difference:.3g}{same}."
    )
