"""What the examples share about exported files: a file called like a module, and what it costs beside the dense one."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from lightning_optim import export_onnx, measure_latency
from lightning_optim.functional.score import Terms, performance_score
from lightning_optim.measure.size import SIZES
from reporting import Column, Row

__all__ = ["EXPORT_COLUMNS", "EXPORT_NOTE", "OnnxFile", "export_row"]


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
    model: nn.Module, path: Path, one: Any, held_out: Any, dense: tuple[OnnxFile, float] | None, error: float
) -> tuple[OnnxFile, Row]:
    """Export a model, verified on held-out inputs, and measure the file.

    Args:
        model: Float or quantized.
        path: Where the file goes.
        one: Inputs of one call, as it is deployed.
        held_out: Inputs that the file's answers are compared on.
        dense: File and size in bits of the dense model; None when this is the dense model.
        error: 1 - accuracy on the validation data, for P.

    Returns:
        The file, and the row's figures.
    """
    report = export_onnx(model, path, one, inputs=held_out)
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


def _kernels(row: Row) -> str:
    return f"{row['integer_kernels']:.0f}/{row['kernels']:.0f}"


EXPORT_COLUMNS = [
    Column("onnx_bytes", "ONNX file (bytes)", "{:,.0f}"),
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
