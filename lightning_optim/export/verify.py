"""An exported file is run in the engine it is meant for, and compared with the module it was made from."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.export.report import Kernels
from lightning_optim.export.saturation import NOTE, overflows, unsigned_weights
from lightning_optim.measure.latency import LatencyResult, against_first
from lightning_optim.measure.rounds import Subject, time_in_rounds
from lightning_optim.registry import Registry

__all__ = [
    "RUNTIMES",
    "Comparison",
    "Runtime",
    "compare",
    "compare_latency",
    "missing_package",
    "runtime_latencies",
]

MOST_DIFFERENCE = 0.05
"""Of outputs without classes, as a fraction of their range (which holds zero).

A value that lies on the edge of two integers may fall to either side; in a few layers that made up to 0.02 of it.
"""


MOST_MEAN_DIFFERENCE = 0.02
"""Of every floating output, as a fraction of its range: what a few values on edges make stays far below."""


MOST_BYTES = 2_000_000_000
"""Of a file that is written anew in memory: protocol buffers end at 2 GiB."""


class Runtime(Protocol):
    """A file that is loaded in an engine, on one thread of the CPU.

    It may have a ``note``: what the export report is to say of how the engine runs the file on this processor.
    """

    clock: Callable[[], float]
    names: list[str]
    """Of the inputs, in the file's order."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, in the file's order."""
        ...

    def kernels(self) -> Kernels:
        """Return what the engine runs with integers."""
        ...

    def again(self) -> "Runtime":
        """Return the same file loaded once more, which lies at another place in memory."""
        ...


RUNTIMES: Registry[Callable[[Path], Runtime]] = Registry("runtime")
"""Name -> what loads a file. A registered name is the package's, and the extra's."""


def missing_package(package: str, extra: str) -> ImportError:
    """Return the error that names the extra."""
    return ImportError(f'{package} is not installed. Install it with: pip install "lightning-optim[{extra}]"')


@RUNTIMES.register("onnxruntime")
class _OnnxRuntime:
    clock = staticmethod(time.thread_time)  # with one thread the call runs in the caller's

    _CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv")
    _INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
    _MATMULS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits")
    _INTEGER_MATMULS = (
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "DynamicQuantizeMatMul",
    )

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise missing_package("onnxruntime", "onnx") from error
        self._source, self.note = _right_here(path)
        with TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._session = self._load(onnxruntime, optimized_model_filepath=str(optimized))
            self._operators = _operators(optimized)
        self.names = [put.name for put in self._session.get_inputs()]

    def _load(self, onnxruntime: Any, **words: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for word, value in words.items():
            setattr(options, word, value)
        return onnxruntime.InferenceSession(self._source, options, providers=["CPUExecutionProvider"])

    def again(self) -> "_OnnxRuntime":
        import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

        other = copy(self)
        other._session = self._load(onnxruntime)
        return other

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(self.names, inputs, strict=True)}
        return [torch.as_tensor(y) for y in self._session.run(None, feeds)]

    def kernels(self) -> Kernels:
        def count(*groups: tuple[str, ...]) -> int:
            return sum(operator in group for operator in self._operators for group in groups)

        return Kernels(
            count(self._CONVOLUTIONS, self._INTEGER_CONVOLUTIONS),
            count(self._INTEGER_CONVOLUTIONS),
            count(self._MATMULS, self._INTEGER_MATMULS),
            count(self._INTEGER_MATMULS),
        )


def _right_here(path: Path) -> tuple[str | bytes, str]:
    """Return what a session on this processor is made of so that it gives the file's answers, and what to say of it."""
    if path.stat().st_size > MOST_BYTES or not overflows():
        return str(path), ""
    import onnx

    model = onnx.load(str(path))
    return (model.SerializeToString(), NOTE) if unsigned_weights(model) else (str(path), "")


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
        raise missing_package("openvino", "openvino") from error
    return openvino.Core()


@RUNTIMES.register("openvino")
class _OpenVINO:
    clock = staticmethod(time.process_time)  # calls run in a thread of its own

    def __init__(self, path: Path) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        self._path = path
        self._model = _core().compile_model(str(path), "CPU", options)
        self._request = self._model.create_infer_request()
        self.names = [put.get_any_name() for put in self._model.inputs]

    def again(self) -> "_OpenVINO":
        return type(self)(self._path)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        results = self._request.infer([x.numpy() for x in inputs])
        return [torch.tensor(results[put]) for put in self._model.outputs]

    def kernels(self) -> Kernels:
        convolutions: list[bool] = []
        matmuls: list[bool] = []
        for operation in self._model.get_runtime_model().get_ops():
            facts = operation.get_rt_info()
            kind = facts["layerType"].astype(str) if "layerType" in facts else ""
            found = {"Convolution": convolutions, "GroupConvolution": convolutions}.get(kind)
            found = matmuls if kind in ("FullyConnected", "MatMul") else found
            if found is not None:
                found.append(facts["runtimePrecision"].astype(str) in ("u8", "i8"))
        return Kernels(len(convolutions), sum(convolutions), len(matmuls), sum(matmuls))


@dataclass(frozen=True)
class Comparison:
    """How far answers are from the module's.

    Attributes:
        max_difference: Over all floating outputs.
        mean_difference: Over all floating outputs.
        agreement: Fraction of rows with the same class, None for outputs without classes.
        rows: How many rows were compared.
        relative: Largest difference of the first output as a fraction of its range, which holds zero.
        mean_relative: The largest, over the floating outputs, of the mean difference as a fraction of the range.
    """

    max_difference: float
    mean_difference: float
    agreement: float | None
    rows: int
    relative: float
    mean_relative: float

    def complaint(self, least_agreement: float) -> str | None:
        """Return what is wrong, None where the answers are close enough."""
        numbers = f"largest difference {self.max_difference:.3g}, mean {self.mean_difference:.3g}"
        if self.agreement is not None and not self.agreement >= least_agreement:
            return (
                f"the same class in {self.agreement:.2%} of {self.rows} rows, asked for are {least_agreement:.2%} "
                f"({numbers})"
            )
        if self.agreement is None and not self.relative <= MOST_DIFFERENCE:
            return (
                f"a difference of {self.relative:.3g} of the output's range, allowed are {MOST_DIFFERENCE} ({numbers})"
            )
        if not self.mean_relative <= MOST_MEAN_DIFFERENCE:
            return (
                f"a mean difference of {self.mean_relative:.3g} of an output's range, allowed are "
                f"{MOST_MEAN_DIFFERENCE} ({numbers})"
            )
        return None


def compare(expected: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> Comparison:
    """Compare the outputs of several calls.

    Args:
        expected: Per call, the module's outputs.
        got: Per call, the engine's.
    """
    pairs = [
        [(call[place], answer[place]) for call, answer in zip(expected, got, strict=True)]
        for place, output in enumerate(expected[0])
        if output.is_floating_point()
    ]
    outputs = [_differences(pair) for pair in pairs]
    firsts = [(call[0], answer[0]) for call, answer in zip(expected, got, strict=True)]
    same = torch.cat([_same_class(left, right) for left, right in firsts])
    first = outputs[0] if outputs and firsts[0][0].is_floating_point() else (torch.zeros(1), 1.0)
    everything = torch.cat([differences for differences, _ in outputs] or [torch.zeros(1)])
    has_classes = _has_classes(firsts[0][0])
    return Comparison(
        float(everything.max()),
        float(everything.mean()),
        float(same.float().mean()) if has_classes else None,
        len(same) if has_classes else 0,
        float(first[0].max()) / first[1],
        max((float(differences.mean()) / span for differences, span in outputs), default=0.0),
    )


def _differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Return the absolute differences of an output over all calls, and its range, which holds zero."""
    expected = torch.cat([left.float().flatten() for left, _ in pairs])
    got = torch.cat([right.float().flatten() for _, right in pairs])
    differences = torch.where(expected == got, 0.0, (got - expected).abs())  # infinities may be equal
    finite = expected[expected.isfinite()]
    span = float(finite.max().clamp_min(0) - finite.min().clamp_max(0)) if len(finite) else 0.0
    return differences, span or 1.0


def _has_classes(output: Tensor) -> bool:
    return not output.is_floating_point() or (output.ndim > 1 and output.shape[-1] > 1)


def _same_class(left: Tensor, right: Tensor) -> Tensor:
    if not left.is_floating_point():
        return (left == right).flatten()
    if not _has_classes(left):
        return torch.ones(0, dtype=torch.bool)
    dimension = 1 if left.ndim > 3 else -1  # of images, [batch, classes, height, width]
    return (left.argmax(dimension) == right.argmax(dimension)).flatten()


class RuntimeSubject(Subject):
    """A file that is loaded anew in every round; one whose runtime has no ``again`` stays as it is.

    The sessions of some rounds are kept, so that the next one is given other memory.
    """

    KEPT = 3

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(lambda case: self._loaded.run(case))
        self._runtime = self._loaded = runtime
        self._kept: deque[Runtime] = deque(maxlen=self.KEPT)

    def renew(self) -> None:
        """Load the file once more."""
        if hasattr(self._runtime, "again"):
            self._loaded = self._runtime.again()
            self._kept.append(self._loaded)

    def release(self) -> None:
        """Free what was loaded for the rounds."""
        self._loaded = self._runtime
        self._kept.clear()


def runtime_latencies(
    runtimes: Sequence[Runtime], batches: Sequence[Sequence[Tensor]], *, seconds: float = 0.5
) -> list[list[LatencyResult]]:
    """Time several files in turns in their engine, in the same rounds; the first is the reference.

    Args:
        runtimes: The files, all in one engine.
        batches: The inputs, one call after the other.
        seconds: Time to spend on a file and batch.

    Returns:
        ``[batch][file]``; the first file's is its time against itself, loaded once more.
    """
    subjects = [RuntimeSubject(runtime) for runtime in (*runtimes, runtimes[0])]
    words = {"least": 10, "most": 200}
    times, calls = time_in_rounds(subjects, batches, runtimes[0].clock, seconds=seconds * len(subjects), **words)
    return [
        [replace(time, batch_size=next((len(x) for x in batch if x.ndim), None)) for time in against_first(rows, calls)]
        for rows, batch in zip(times, batches, strict=True)
    ]


def compare_latency(runtime: Runtime, against: Runtime, inputs: Sequence[Tensor]) -> LatencyResult:
    """Time both files in turns in their engine."""
    return runtime_latencies([against, runtime], [inputs])[0][1]
