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
    if size > LARGEST_FILE:
        # Scales and other small constants stay in the graph: engines read them to find integer kernels.
        onnx_ir.save(model, path, external_data=data_file(path).name)
    else:
        _save_whole(model, path)


def _save_whole(model: Any, path: Path) -> None:
    """Write a model to one file, its large weights one by one: ``onnx_ir.save`` copies all of them three times.

    A message of protocol buffers is its fields one after the other, in any order. The graph is written as the last
    field of the model, and the weights as the last ones of the graph.
    """
    import onnx_ir

    graph = model.graph
    weights = {v.name: v.const_value for v in graph.initializers.values() if v.const_value.nbytes > _SMALL}
    held = [graph.initializers.pop(name) for name in weights]
    try:
        proto = onnx_ir.to_proto(model)
    finally:
        for value in held:
            graph.initializers.add(value)
    heads = [_head(name, tensor) for name, tensor in weights.items()]
    fields = [_field(_RAW_DATA, tensor.nbytes) for tensor in weights.values()]
    sizes = [
        len(head) + len(field) + tensor.nbytes
        for head, field, tensor in zip(heads, fields, weights.values(), strict=True)
    ]
    entries = [_field(_INITIALIZER, size) for size in sizes]
    nodes = proto.graph.SerializeToString()
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(_GRAPH, len(nodes) + sum(sizes) + sum(map(len, entries))))
        file.write(nodes)
        for entry, head, field, tensor in zip(entries, heads, fields, weights.values(), strict=True):
            file.writelines((entry, head, field, tensor.tobytes()))


_SMALL = 2**12
"""Bytes up to which a constant is not worth a write of its own."""

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Numbers of fields in ``onnx.proto``: of a model, of a graph and of a tensor."""


def _head(name: str, tensor: Any) -> bytes:
    """Return all fields of a tensor but its data."""
    import onnx

    head: bytes = onnx.TensorProto(
        name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy()
    ).SerializeToString()
    return head


def _field(number: int, size: int) -> bytes:
    """Return what precedes a field of ``size`` bytes: its number with the kind 2 (bytes follow), and the size."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


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
