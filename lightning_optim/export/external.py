"""Weights beside an ONNX file: protocol buffers end at 2 GiB, so a larger model keeps its weights in a second file."""

from pathlib import Path
from typing import Any

__all__ = ["DATA_SUFFIX", "LARGEST_FILE", "data_file", "holds_data", "note_on_data", "save", "stored_bytes"]

LARGEST_FILE = 1536 * 2**20
"""Bytes of weights up to which one file holds all, as in ``torch.onnx``: names and graph need room too."""

DATA_SUFFIX = ".data"
"""What is added to the name of a file for that of its weights."""


def data_file(path: Path) -> Path:
    """Return where the weights of a large file are: beside it, in ``model.onnx.data``."""
    return path.with_name(f"{path.name}{DATA_SUFFIX}")


def save(model: Any, path: Path) -> None:
    """Write a model, with its weights in a second file if they are large.

    Args:
        model: An ``onnx_ir.Model``.
        path: The file to write.
    """
    import onnx_ir

    size = sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values())
    # Scales and other small constants stay in the graph: engines read them to find integer kernels.
    onnx_ir.save(model, path, external_data=data_file(path).name if size > LARGEST_FILE else None)


def holds_data(path: Path) -> bool:
    """Whether a file's weights are in :func:`data_file`."""
    if not data_file(path).is_file() or not path.is_file():
        return False
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError:
        return False  # another file of that name
    name = data_file(path).name
    return any(
        entry.key == "location" and entry.value == name
        for weight in graph.initializer
        for entry in weight.external_data
    )


def stored_bytes(path: Path) -> int:
    """Return the size of an exported model: that of the file, and of its weights if they are beside it."""
    return path.stat().st_size + (data_file(path).stat().st_size if holds_data(path) else 0)


def note_on_data(path: Path, final: Path) -> list[str]:
    """Return the sentence for the export report.

    Args:
        path: The file that was written.
        final: The file that it becomes.
    """
    if not holds_data(path):
        return []
    return [
        f"The weights do not fit into one ONNX file. They are in {data_file(final).name}, which must stay beside it "
        "under this name."
    ]
