"""Inference engines that run exported files. An engine is one class here, and an extra in ``pyproject.toml``."""

import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.export.external import data_file, stored_bytes
from lightning_optim.export.report import Kernels
from lightning_optim.export.saturation import note_on, overflows, unsigned_weights
from lightning_optim.registry import Registry

__all__ = ["RUNTIMES", "Runtime", "load_runtime", "missing_package"]

MOST_BYTES = 2_000_000_000
"""Most bytes of weights that are rewritten in memory: protocol buffers end at 2 GiB."""


class Runtime(Protocol):
    """A file loaded in an engine, on one thread of the CPU.

    A class may also have a ``title`` (the engine's name in tables), an ``extra`` (of this package, that installs it;
    both default to the registered name), a ``note``: a sentence for the export report on how the engine runs this
    file on this processor, and ``file_bytes``: the size of the file, so that of large ones few are held while they are
    timed.

    Attributes:
        clock: What times a call: seconds of the calling thread, or of the process.
        names: Names of the inputs, in the file's order.
    """

    clock: Callable[[], float]
    names: list[str]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, in the file's order."""
        ...

    def kernels(self) -> Kernels:
        """Count the operators that the engine runs with integers."""
        ...

    def again(self) -> "Runtime":
        """Return the same file loaded once more, at another place in memory."""
        ...


RUNTIMES: Registry[Callable[[Path], Runtime]] = Registry("runtime")
"""Name -> class that loads a file. The name is that of the engine's package."""


def missing_package(package: str, extra: str) -> ImportError:
    """Return the error that names the extra."""
    return ImportError(f'{package} is not installed. Install it with: pip install "lightning-optim[{extra}]"')


def load_runtime(path: Path, runtime: str) -> Runtime:
    """Load an exported file in an engine.

    Raises:
        ImportError: If the engine is not installed.
        RuntimeError: If it cannot load the file.
    """
    try:
        return RUNTIMES.resolve(runtime)(path)
    except ImportError:
        raise
    except Exception as error:  # engines raise classes of their own; all of them mean the same here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines)[-600:] or type(error).__name__
        raise RuntimeError(
            f"{runtime} cannot load the exported file, so nothing was written: {reason}\nExport it for another engine "
            "with `runtime=`, or without verification with verify=False."
        ) from error


@RUNTIMES.register("onnxruntime")
class OnnxRuntime:
    """A session of ONNX Runtime."""

    title, extra = "ONNX Runtime", "onnx"
    clock = staticmethod(time.thread_time)  # with one thread, a call runs in the caller's

    _CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose")
    _INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
    _MATMULS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
    _INTEGER_MATMULS = (
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "DynamicQuantizeMatMul",
        "MatMulNBits",  # by default it rounds its inputs to 8 bits
    )

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise missing_package("onnxruntime", self.extra) from error
        self._source = _source_here(path, self.title, "a plain InferenceSession", _overflows_in_onnxruntime)
        self.note, self.file_bytes = self._source.note, stored_bytes(path)
        with TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            # This session is never run: without packed weights, and gone before the next, it costs little memory.
            self._load(onnxruntime, {"session.disable_prepacking": "1"}, optimized_model_filepath=str(optimized))
            self._operators = _operators(optimized)
        self._session = self._load(onnxruntime)
        self.names = [put.name for put in self._session.get_inputs()]

    def _load(self, onnxruntime: Any, entries: Mapping[str, str] | None = None, **more: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for name, value in more.items():
            setattr(options, name, value)
        # The optimized graph may have weights multiplied out: more than one file holds. And from the arena, which grows
        # by doubling, weights take up to twice their memory.
        entries = {
            "session.optimized_model_external_initializers_file_name": "optimized.data",
            "session.use_device_allocator_for_initializers": "1",
            **(entries or {}),
        }
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        return onnxruntime.InferenceSession(self._source.model, options, providers=["CPUExecutionProvider"])

    def again(self) -> "OnnxRuntime":
        """Load the file once more."""
        import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

        other = copy(self)
        other._session = self._load(onnxruntime)
        return other

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        feeds = {name: x.numpy() for name, x in zip(self.names, inputs, strict=True)}
        return [torch.as_tensor(y) for y in self._session.run(None, feeds)]

    def kernels(self) -> Kernels:
        """Count the operators of the optimized graph."""

        def count(*groups: tuple[str, ...]) -> int:
            return sum(operator in group for operator in self._operators for group in groups)

        return Kernels(
            count(self._CONVOLUTIONS, self._INTEGER_CONVOLUTIONS),
            count(self._INTEGER_CONVOLUTIONS),
            count(self._MATMULS, self._INTEGER_MATMULS),
            count(self._INTEGER_MATMULS),
        )


@dataclass(frozen=True)
class _SourceHere:
    """A path or model that gives the file's answers on this processor.

    Attributes:
        model: A path, or a model's bytes.
        note: What to note about it.
    """

    model: str | bytes
    note: str = ""


def _source_here(path: Path, engine: str, plainly: str, does_overflow: Callable[[], bool]) -> _SourceHere:
    """Return what an engine loads: on some processors with the weights as uint8."""
    here = os.path.realpath(path)  # weights beside it are not beside a link to it
    if find_spec("onnx") is None or not does_overflow() or not _mentions(path, b"DequantizeLinear"):
        return _SourceHere(here)
    import onnx

    model = onnx.load(here)
    if not unsigned_weights(model):
        return _SourceHere(here)
    note = note_on(engine, plainly)
    if sum(len(weight.raw_data) for weight in model.graph.initializer) <= MOST_BYTES:
        return _SourceHere(model.SerializeToString(), note)
    folder = mkdtemp()
    rewritten = Path(folder) / "model.onnx"
    source = _SourceHere(str(rewritten), note)
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    onnx.save(model, str(rewritten), save_as_external_data=True, location=data_file(rewritten).name)
    return source


def _mentions(path: Path, name: bytes, block: int = 2**20) -> bool:
    """Whether a name is in a file, which is read block by block: parsing it takes twice its size in memory."""
    last = b""
    with path.open("rb") as file:
        while part := file.read(block):
            if name in last + part:
                return True
            last = part[-len(name) :]
    return False


@cache
def _overflows_in_onnxruntime() -> bool:
    import onnxruntime

    def run(model: bytes, inputs: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"inputs": inputs})[0]

    return overflows(run)


@cache
def _overflows_in_openvino() -> bool:
    def run(model: bytes, inputs: Any) -> Any:
        compiled = _core().compile_model(_core().read_model(model), "CPU", OpenVINO.options)
        return compiled([inputs])[0]

    return overflows(run)


def _operators(path: Path) -> list[str]:
    import onnx

    def walk(graph: Any) -> Iterable[str]:
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from walk(inner)

    return list(walk(onnx.load(str(path), load_external_data=False).graph))


@cache
def _core() -> Any:
    """Return the process's one OpenVINO core.

    A core gives the thread that first compiles with it an alternate signal stack, and takes it back when it is deleted.
    Two cores that are deleted in the order in which they were made leave the thread with a freed one, and the next
    signal with a Python handler (a DataLoader's worker that ends, Ctrl-C) crashes the process. Seen in OpenVINO 2026.4.
    """
    try:
        import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise missing_package("openvino", OpenVINO.extra) from error
    return openvino.Core()


@RUNTIMES.register("openvino")
class OpenVINO:
    """A compiled model of OpenVINO."""

    title, extra = "OpenVINO", "openvino"
    clock = staticmethod(time.process_time)  # calls run in a thread of OpenVINO's own
    options: Mapping[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = _source_here(path, self.title, "a plain Core.compile_model", _overflows_in_openvino)
        self.note, self.file_bytes = self._source.note, stored_bytes(path)
        self._model = _core().compile_model(_core().read_model(self._source.model), "CPU", self.options)
        self._request = self._model.create_infer_request()
        self.names = [put.get_any_name() for put in self._model.inputs]

    def again(self) -> "OpenVINO":
        """Compile the file once more."""
        return type(self)(self._path)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        results = self._request.infer([x.numpy() for x in inputs])
        return [torch.tensor(results[put]) for put in self._model.outputs]

    def kernels(self) -> Kernels:
        """Count the operators of the compiled graph."""
        convolutions: list[bool] = []
        matmuls: list[bool] = []
        kinds = {
            "Convolution": convolutions,
            "GroupConvolution": convolutions,
            "Deconvolution": convolutions,
            "FullyConnected": matmuls,
            "MatMul": matmuls,
        }
        for operation in self._model.get_runtime_model().get_ops():
            facts = operation.get_rt_info()
            kind = facts["layerType"].astype(str) if "layerType" in facts else ""
            if kind in kinds:
                kinds[kind].append(facts["runtimePrecision"].astype(str) in ("u8", "i8"))
        return Kernels(len(convolutions), sum(convolutions), len(matmuls), sum(matmuls))
