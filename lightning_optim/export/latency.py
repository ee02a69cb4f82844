"""The latency of exported files in their engine."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_optim.export.runtimes import Runtime
from lightning_optim.measure.latency import LatencyResult, against_first
from lightning_optim.measure.rounds import Subject, time_in_rounds

__all__ = ["RuntimeSubject", "compare_latency", "runtime_latencies"]


class RuntimeSubject(Subject):
    """A file that is loaded again in every round, unless its runtime has no ``again``.

    The sessions of a few rounds are kept, so that the next one gets other memory. Those of large files are not: each
    holds all weights, often twice, and a fraction of them fits into a processor's cache.
    """

    KEPT, KEPT_BYTES = 3, 2**25

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(lambda case: self._loaded.run(case))
        self._runtime = self._loaded = runtime
        large = getattr(runtime, "file_bytes", 0) > self.KEPT_BYTES
        self._kept: deque[Runtime] = deque(maxlen=0 if large else self.KEPT)

    def renew(self) -> None:
        """Load the file once more."""
        if hasattr(self._runtime, "again"):
            self._loaded = self._runtime.again()
            self._kept.append(self._loaded)

    def release(self) -> None:
        """Free the sessions of the rounds."""
        self._loaded = self._runtime
        self._kept.clear()


def runtime_latencies(
    runtimes: Sequence[Runtime], batches: Sequence[Sequence[Tensor]], *, seconds: float = 0.5
) -> list[list[LatencyResult]]:
    """Time several files in turns in one engine, in the same rounds; the first is the reference.

    Args:
        runtimes: The files, all in one engine.
        batches: The inputs, one call after the other.
        seconds: Time to spend on each file and batch.

    Returns:
        ``[batch][file]``; the first file is compared with itself, loaded once more.
    """
    subjects = [RuntimeSubject(runtime) for runtime in (*runtimes, runtimes[0])]
    seconds *= len(subjects)
    times, calls = time_in_rounds(subjects, batches, runtimes[0].clock, seconds=seconds, least=10, most=200)
    return [
        [replace(time, batch_size=next((len(x) for x in batch if x.ndim), None)) for time in against_first(rows, calls)]
        for rows, batch in zip(times, batches, strict=True)
    ]


def compare_latency(runtime: Runtime, against: Runtime, inputs: Sequence[Tensor]) -> LatencyResult:
    """Time both files in turns in their engine."""
    return runtime_latencies([against, runtime], [inputs])[0][1]
