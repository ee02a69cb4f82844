"""The report on an export: what is in the file, how far its answers are from the module's, and what it costs."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lightning_optim._upstream import BatchNorm as _BatchNorm
from lightning_optim.export.integer import rounds, rounds_output
from lightning_optim.export.packed import PACKED_BITS, StoredRows
from lightning_optim.export.stored import StoredWeight
from lightning_optim.measure.latency import LatencyResult
from lightning_optim.modules import EMBEDDINGS
from lightning_optim.quantization.functions import QuantizedFunctions
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.rows import rounded_names
from lightning_optim.tables import Listed, Listing, Plotted, by_reason, new_figure, size_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ExportReport", "Kernels", "Mix", "describe_layers", "notes_on"]


@dataclass(frozen=True)
class Kernels:
    """Number of convolutions and matrix products that the engine runs, and how many of them with integers.

    Attributes:
        convolutions: All convolutions.
        integer_convolutions: Convolutions with integers.
        matmuls: All matrix products, including attention's products of activations.
        integer_matmuls: Matrix products with integers.
    """

    convolutions: int = 0
    integer_convolutions: int = 0
    matmuls: int = 0
    integer_matmuls: int = 0


@dataclass(frozen=True)
class Mix:
    """A file that was timed, with some of the quantized layers computed in float.

    Attributes:
        name: What is computed in float.
        layers: Names of these layers.
        times: Time of a call per batch, as a ratio to the float32 export.
        file_bytes: Size of the file.
    """

    name: str
    layers: tuple[str, ...]
    times: tuple[LatencyResult, ...]
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Geometric mean over the batches of the time as a ratio to that of the float32 export."""
        return math.exp(sum(math.log(time.ratio or 1.0) for time in self.times) / len(self.times))

    def __str__(self) -> str:
        times = "; ".join(f"batch {time.batch_size}: {time}" for time in self.times)
        return f"{self.name}: {self.file_bytes:,} bytes, {times}"


@dataclass(frozen=True)
class ExportReport(Listed, Plotted):
    """The result of an export; ``str(report)`` is a table.

    Its plot shows the file's size beside that of the float32 export; with ``keep_float="auto"`` each mix and its time.

    Figures are None if nothing was verified (``verify=False``) or there was nothing to compare with.

    Attributes:
        path: The file.
        runtime: The engine it was verified in; None without verification.
        opset: Version of ONNX's operators.
        inputs: Name -> shape, with "batch" for a free batch.
        outputs: Names.
        layers: Layer with parameters -> how it is stored and computed.
        notes: Sentences on anything unexpected.
        file_bytes: Size of the file, with that of its weights if they are beside it.
        float_bytes: Size of the float32 export of the same module.
        max_difference: Largest absolute difference of any output from the module's.
        mean_difference: Mean absolute difference.
        agreement: Fraction of rows in which the largest entry of the first output is the module's, in [0, 1]; None for
            outputs without classes.
        rows: Number of such rows compared.
        convolutions: Convolutions that the engine runs.
        integer_convolutions: Convolutions with integers.
        matmuls: Matrix products that the engine runs, including attention's products of activations.
        integer_matmuls: Matrix products with integers.
        latency: Time of a call in the engine, as a ratio to the float32 export.
        kept_float: Quantized layers, and functions between them, that the file computes in float: what they read is not
            rounded, as it is in the module.
        mixes: With ``keep_float="auto"``, the files that were timed; the first is the float32 export.
        target: The engine that the file is written for.

    Examples:
        >>> report = export_onnx(model, "model.onnx", example_inputs, inputs=held_out)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> report.agreement, report.size_ratio, report.latency  # doctest: +SKIP
    """

    path: Path
    runtime: str | None
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    layers: dict[str, str]
    notes: list[str] = field(default_factory=list)
    file_bytes: int = 0
    float_bytes: int | None = None
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    rows: int = 0
    convolutions: int | None = None
    integer_convolutions: int | None = None
    matmuls: int | None = None
    integer_matmuls: int | None = None
    latency: LatencyResult | None = None
    kept_float: tuple[str, ...] = ()
    mixes: tuple[Mix, ...] = ()
    target: str = "onnxruntime"

    @property
    def size_ratio(self) -> float | None:
        """``file_bytes / float_bytes``."""
        return None if not self.float_bytes else self.file_bytes / self.float_bytes

    def listing(self) -> Listing:
        """Return how each layer is stored, with sentences on size, answers and time."""
        rows = by_reason(self.layers, shown=4)
        form = f"ONNX, opset {self.opset}" + ("" if self.target == "onnxruntime" else f", for {self.target}")
        title = f"{self.path} ({form})"
        return Listing(("layer", "in the file"), rows, title=title, after=[*self._sentences(), *self.notes])

    def _figure(self) -> "Figure":
        sizes = {mix.name: mix.file_bytes for mix in self.mixes}
        if not sizes:
            sizes = {self.path.name: self.file_bytes}
            sizes = {"float32": self.float_bytes, **sizes} if self.float_bytes else sizes
        figure = new_figure(9 if self.mixes else 6, 1.2 + 0.3 * len(sizes))
        left, *right = figure.subplots(1, 2 if self.mixes else 1, sharey=True, squeeze=False)[0]
        left.barh(range(len(sizes)), [size / 1e3 for size in sizes.values()], color="C0")
        left.set_yticks(range(len(sizes)), list(sizes), parse_math=False)
        left.invert_yaxis()
        left.set_xlabel("file, kB")
        for axes in right:
            for size in dict.fromkeys(time.batch_size for mix in self.mixes for time in mix.times):
                ratios = [next((t.ratio for t in mix.times if t.batch_size == size), None) for mix in self.mixes]
                drawn = [(ratio, place) for place, ratio in enumerate(ratios) if ratio is not None]
                axes.plot(*zip(*drawn, strict=True), "o", label=f"batch {size}")
            axes.axvline(1, color="0.4", linestyle="--", linewidth=1)
            axes.set_xlabel("time of a call / float32 export")
            axes.legend(frameon=False)
        return figure

    def _sentences(self) -> list[str]:
        size = size_in_words(self.file_bytes)
        if self.float_bytes:
            size += (
                f", {self.file_bytes / self.float_bytes:.2f} of the float32 export's {size_in_words(self.float_bytes)}"
            )
        sentences = [f"Size: {size}."]
        if self.runtime is None:
            return [*sentences, "Not verified."]
        agreement = "" if self.agreement is None else f", the same class in {self.agreement:.2%} of {self.rows} rows"
        sentences.append(
            f"Verified in {self.runtime}: largest difference {self.max_difference:.3g}, mean "
            f"{self.mean_difference:.3g}{agreement}."
        )
        sentences.append(
            f"Integer kernels: {self.integer_convolutions} of {self.convolutions} convolutions and "
            f"{self.integer_matmuls} of {self.matmuls} matrix products."
        )
        if self.latency is not None:
            sentences.append(f"Time of a call (batch {self.latency.batch_size}, one thread): {self.latency}.")
        if self.mixes:
            sentences.append("Timed in turns, as ratios to the float32 export:")
            sentences += [f"  {mix}." for mix in self.mixes]
        return sentences


def describe_layers(
    module: nn.Module, exported: nn.Module, batch_norms: Mapping[str, str], held: Collection[int]
) -> dict[str, str]:
    """Describe how each layer with parameters of its own is stored and computed in the exported graph.

    Args:
        module: The module as it was quantized.
        exported: The exported copy.
        batch_norms: Convolution -> BatchNorm that is folded into it.
        held: Identities of the tensors of ``exported`` that the graph uses.
    """
    layers, copies = dict(module.named_modules()), dict(exported.named_modules())
    folded = {norm: convolution for convolution, norm in batch_norms.items() if rounds(layers[convolution])}
    descriptions: dict[str, str] = {}
    for name, layer in layers.items():
        if name in folded:
            descriptions[name] = f"folded into {folded[name]}"
        elif any(True for _ in layer.parameters(recurse=False)):
            writer = layers[batch_norms[name]] if name in batch_norms else layer
            descriptions[name] = _described_as_held(layer, writer, copies[name], held)
    return descriptions


NOT_HELD = "not in the file: forward does not use it"


def _described_as_held(layer: nn.Module, writer: nn.Module, copy: nn.Module, held: Collection[int]) -> str:
    if not _is_held(copy, held):
        return NOT_HELD
    if rounds(layer) and not _stored_is_held(copy, held):
        return "float: forward reads the Parameter by another name"
    return _described(layer, writer, copy)


def _is_held(copy: nn.Module, held: Collection[int]) -> bool:
    """Whether the graph uses a layer's own tensors, as integers or unchanged."""
    return _stored_is_held(copy, held) or any(id(parameter) in held for parameter in copy.parameters(recurse=False))


def _stored_is_held(copy: nn.Module, held: Collection[int]) -> bool:
    stored = getattr(copy, "stored", None)
    parts = stored.modules() if isinstance(stored, nn.Module) else ()
    integers = [part.integers for part in parts if isinstance(part, StoredWeight)]
    return bool(integers) and all(id(each) in held for each in integers)


def _rounded_is_held(copy: nn.Module, held: Collection[int]) -> bool:
    return any(id(copy._parameters.get(name)) in held for name in rounded_names(copy))


def _described(layer: nn.Module, writer: nn.Module, copy: nn.Module) -> str:
    parts = []
    if isinstance(layer, QuantizedLayer) and rounds(layer):
        bits, packed = (PACKED_BITS, ", packed") if _is_packed(copy) else (8, "")
        container = "" if layer.weight_bits == bits else f" in int{bits} container"
        shared = layer.weight_granularity.replace("_", " ")
        parts.append(f"int{layer.weight_bits}{container} weight {shared}{packed}")
        if layer.activation_bits is not None and layer.activation_ranges == "dynamic":
            parts.append(f"{layer.integer_type} input, range of each call")
        elif layer.activation_bits is not None and layer.rounds_operands:
            parts.append(f"{layer.integer_type} {', '.join(layer.operands)}")
    if isinstance(writer, QuantizedFunctions) and rounds_output(writer):
        parts.append(f"{writer.integer_type} operands of {', '.join(writer.functions)}")
    elif isinstance(writer, QuantizedLayer) and rounds_output(writer):
        parts.append(f"{writer.integer_type} output")
    return ", ".join(parts) or "float"


def _stored(copy: nn.Module) -> StoredWeight | None:
    stored = getattr(copy, "stored", None)
    parts = stored.modules() if isinstance(stored, nn.Module) else ()
    return next((part for part in parts if isinstance(part, StoredWeight)), None)


def _is_packed(copy: nn.Module) -> bool:
    stored = _stored(copy)
    return stored is not None and stored.is_packed


def _multiplies(copy: nn.Module) -> bool:
    stored = _stored(copy)
    return stored is not None and stored.multiplies


def notes_on(module: nn.Module, exported: nn.Module, held: Collection[int]) -> list[str]:
    """Return what a user should know about how the layers run.

    Args:
        module: The module as it was quantized.
        exported: The exported copy.
        held: Identities of the tensors of ``exported`` that the graph uses.
    """
    copies = dict(exported.named_modules())
    rounded = {n: x for n, x in module.named_modules() if isinstance(x, QuantizedLayer) and rounds(x)}
    layers = [layer for name, layer in rounded.items() if _is_held(copies[name], held)]
    if not layers:
        return ["Nothing in this file is quantized: it is the float32 export of the module."]
    notes = []
    twice = [n for n in rounded if _stored_is_held(copies[n], held) and _rounded_is_held(copies[n], held)]
    if twice:
        notes.append(
            f"{', '.join(twice)}: stored twice, as integers and as float32, because forward also reads the Parameter "
            "by another name, in float."
        )
    stored = [(layer, copies[name]) for name, layer in rounded.items() if _is_held(copies[name], held)]
    if any((layer.weight_bits or 8) < 8 and not _is_packed(copy) for layer, copy in stored):
        notes.append(
            "Weights of fewer than 8 bits that are not packed are stored as int8: they are no smaller and no faster "
            "than 8 bits."
        )
    in_groups = [pair for pair in stored if pair[0].weight_granularity.startswith("per_group")]
    products = [copy for layer, copy in in_groups if not _is_table(layer)]
    if any(_multiplies(copy) for copy in products):
        notes.append(
            f"{sum(map(_multiplies, products))} matrices are multiplied as they are stored. ONNX Runtime rounds their "
            "inputs to 8 bits by row and group: that is its default, and what was compared here (with the session "
            "option session.qdq_matmulnbits_accuracy_level=1 it does not, and is slower). OpenVINO does not round them."
        )
    if any(isinstance(_stored(copy), StoredRows) and _multiplies(copy) for copy in products):
        notes.append(
            "A table that is a matrix too is stored once, and multiplied by com.microsoft.MatMulNBits, which is no "
            "standard operator: ONNX Runtime and OpenVINO have it. ONNX Runtime rounds its inputs whatever the option."
        )
    if any(not _multiplies(copy) for copy in products):
        notes.append(
            "Weights that share scales per group are stored as int8 and multiplied out to float when the file is "
            "loaded; ONNX Runtime rounds those of convolutions, and of matrices before another quantized layer, to "
            "int8 once more, in its own way."
        )
    if any(layer.rounds_operands and (layer.activation_bits or 8) < 8 for layer in layers):
        notes.append(
            "Activations of fewer than 8 bits are stored as uint8 and clipped in float: they are slower than 8 bits."
        )
    return notes


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, (*EMBEDDINGS, _BatchNorm))
