"""The latency of exported files in their engine."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_optim.export.runtimes import Runtime
from lightning_optim.measure.latency import LatencyResult, against_first
from lightning_optim.measure.rounds import Subject, time_in_rounds

__all__ = ["RuntimeSubject", "compare_latency", "runtime_latencies"]


LARGE = 2**25
"""Bytes of a file from which on all files that are timed with it are loaded once."""


class RuntimeSubject(Subject):
    """A file that is loaded again in every round, unless its runtime has no ``again``.

    The sessions of a few rounds are kept, so that the next one gets other memory.

    Args:
        runtime: The loaded file.
        moves: Whether it is loaded again.
    """

    KEPT = 3

    def __init__(self, runtime: Runtime, *, moves: bool = True) -> None:
        super().__init__(lambda case: self._loaded.run(case))
        self._runtime = self._loaded = runtime
        self._moves = moves and hasattr(runtime, "again")
        self._kept: deque[Runtime] = deque(maxlen=self.KEPT)

    def renew(self) -> None:
        """Load the file once more."""
        if self._moves:
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
        ``[batch][file]``; the first file is compared with itself.
    """
    # Each session holds all weights, often twice and multiplied out, also of a file that is small for its integers.
    # Of large ones a fraction fits into a processor's cache, and their place in memory matters less.
    large = max(getattr(runtime, "file_bytes", 0) for runtime in runtimes) > LARGE
    subjects = [RuntimeSubject(runtime, moves=not large) for runtime in (*runtimes, runtimes[0])]
    seconds *= len(subjects)
    times, calls = time_in_rounds(subjects, batches, runtimes[0].clock, seconds=seconds, least=10, most=200)
    return [
        [replace(time, batch_size=next((len(x) for x in batch if x.ndim), None)) for time in against_first(rows, calls)]
        for rows, batch in zip(times, batches, strict=True)
    ]


def compare_latency(runtime: Runtime, against: Runtime, inputs: Sequence[Tensor]) -> LatencyResult:
    """Time both files in turns in their engine."""
    return runtime_latencies([against, runtime], [inputs])[0][1]
