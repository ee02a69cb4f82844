"""What the examples share about exported files: a file called like a module, and what it costs beside the dense one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from lightning_optim import export_onnx, measure_latency
from lightning_optim.functional.score import Terms, performance_score
from lightning_optim.measure.latency import SAME
from lightning_optim.measure.size import SIZES
from reporting import Column, Row

__all__ = ["EXPORT_COLUMNS", "EXPORT_NOTE", "ExportedFiles", "OnnxFile", "export_row", "rounding_notes"]


class OnnxFile(nn.Module):
    """A file in ONNX Runtime on one thread, called like the module it was made from."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in (*zip(self.names, args, strict=False), *kwargs.items())}
        return torch.from_numpy(self.session.run(None, feeds)[0])


def export_row(
    model: nn.Module,
    path: Path,
    one: Any,
    held_out: Any,
    dense: tuple[OnnxFile, float] | None,
    error: float,
    *,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
) -> tuple[OnnxFile, Row]:
    """Export a model, verified on held-out inputs, and measure the file.

    Args:
        model: Float or quantized.
        path: Where the file goes.
        one: Inputs of one call, as it is deployed.
        held_out: Inputs that the file's answers are compared on.
        dense: File and size in bits of the dense model; None when this is the dense model.
        error: 1 - accuracy on the validation data, for P.
        dynamic_dims: Free dimensions of the inputs besides the batch, as ``export_onnx`` takes them.

    Returns:
        The file, and the row's figures.
    """
    report = export_onnx(model, path, one, inputs=held_out, dynamic_dims=dynamic_dims)
    file, bits = OnnxFile(path), SIZES["bits"](model)
    against, dense_bits = dense or (OnnxFile(path), bits)
    latency = measure_latency(file, one, against=against, batch_size=None)
    terms = Terms(size=bits / dense_bits, inference_time=latency.ratio or 1.0, error=error)
    return file, {
        "onnx_bytes": report.file_bytes,
        "onnx_ms": latency.milliseconds,
        "onnx_latency": latency.ratio,
        "onnx_agreement": report.agreement,
        "integer_kernels": report.integer_convolutions + report.integer_matmuls,
        "kernels": report.convolutions + report.matmuls,
        "onnx_P": performance_score(terms),
    }


class ExportedFiles:
    """The files of one comparison; each is measured against that of its dense model, which comes before it.

    Args:
        folder: Where they go.
        one: Inputs of one call, as the models are deployed.
        held_out: Inputs that the files' answers are compared on.
        dynamic_dims: Free dimensions of the inputs besides the batch, as ``export_onnx`` takes them.
    """

    def __init__(
        self, folder: str | Path, one: Any, held_out: Any, dynamic_dims: Mapping[str, Mapping[int, str]] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.one, self.held_out, self.dynamic_dims = one, held_out, dynamic_dims
        self.dense: dict[str, tuple[OnnxFile, float]] = {}

    def add(self, name: str, model: nn.Module, *, dense: str, accuracy: float) -> Row:
        """Export and measure a model.

        Args:
            name: Of its row.
            model: Float or quantized.
            dense: Name of the row of its dense model; its own where it is that.
            accuracy: On the validation data.
        """
        path = self.folder / f"{name}.onnx"
        against = None if name == dense else self.dense[dense]
        file, row = export_row(
            model, path, self.one, self.held_out, against, 1 - accuracy, dynamic_dims=self.dynamic_dims
        )
        if against is None:
            self.dense[name] = file, SIZES["bits"](model)
        return row


def _kernels(row: Row) -> str:
    return f"{row['integer_kernels']:.0f}/{row['kernels']:.0f}"


EXPORT_COLUMNS = [
    Column("onnx_bytes", "ONNX file (bytes)", "{:,.0f}", begins_part=True),
    Column("integer_kernels", "integer kernels", _kernels),
    Column("onnx_ms", "ONNX Runtime, one call (ms)", "{:.4f}"),
    Column("onnx_latency", "/ dense", "{:.2f}"),
    Column("onnx_P", "P, exported", "{:.3f}"),
]

EXPORT_NOTE = (
    "The ONNX file was run in ONNX Runtime on one thread and gave the class of the PyTorch model for at least 99 % of "
    "held-out rows before it was written. Integer kernels are counted in the graph the engine really runs. P, exported "
    "= 0.4 bits / dense + 0.6 time in ONNX Runtime / dense + 0.1 (1 - accuracy on the validation data)."
)


def rounding_notes(rows: Sequence[Row], sources: Mapping[str, str], key: str, metric: str) -> list[str]:
    """Say what rounding after training costs and what it saves, from what was measured.

    Args:
        rows: The table's rows.
        sources: Name of a quantized row -> name of the float row it was made from.
        key: Of the metric in a row.
        metric: The same in words.
    """
    by_name = {row["name"]: row for row in rows}
    pairs = {name: (by_name[name], by_name[source]) for name, source in sources.items()}
    changes = [f"{name}: {_change(*pair, key, metric)}" for name, pair in pairs.items()]
    slower = [
        f"{name} ({row['onnx_latency'] / source['onnx_latency']:.2f} times)"
        for name, (row, source) in pairs.items()
        if "onnx_latency" in row and row["onnx_latency"] > (1 + SAME) * source["onnx_latency"]
    ]
    notes = [f"Rounded after training, each against the float32 row it was made from. {'; '.join(changes)}."]
    if slower:
        notes.append(
            f"Integers are no promise of speed: one call of {', '.join(slower)} took longer than in float32. A row of "
            "an int8 table is looked up, cast and multiplied by its scale where a float32 one is only looked up, and "
            "inputs are rounded before each integer product; with one row in a call there is little to win back."
        )
    return notes


def _change(row: Row, source: Row, key: str, metric: str) -> str:
    words = f"{metric} {round(row[key] - source[key], 4) + 0.0:+.4f}"  # + 0.0: no "-0.0000"
    if "onnx_bytes" not in row:
        return words
    size, time = (row[name] / source[name] for name in ("onnx_bytes", "onnx_latency"))
    return f"{words}, {size:.0%} of the file's bytes, {time:.2f} times as long a call"
