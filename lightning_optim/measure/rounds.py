"""Rounds of timing: models alternate, each at a new place in memory in every round.

The place of the weights in memory affects the time of a model (by up to 13 % between a model and its deep copy), and it
does not change while they live. So times of one placement agree with each other but not with those of the next process.
Moving every subject in each round makes the range over the rounds include that difference.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.measure.size import bytes_of, free_bytes
from lightning_optim.target import ForwardInputs

__all__ = ["ROUNDS", "LatencyResult", "ModuleSubject", "Subject", "compared", "places_in_memory", "time_in_rounds"]

ROUNDS = 8
"""With two equal models, all of eight ratios lie on one side of 1 once in 128 times."""

WARM_UP = 5
"""Calls of each model before any is timed: the first after a training step takes 1.9x, the fifth 1.1x."""

WARM_UP_ANEW = 2
"""Warm-up calls at a new place: the first call maps its pages."""

FASTER = (0.05, 0.40)
"""Range of the sorted times whose mean is a model's time in a round."""

SAME = 0.05
"""Ratios closer to 1 than this count as equal."""

LARGEST_SPACER = 1 << 20


@dataclass(frozen=True)
class LatencyResult:
    """Time of one call.

    Attributes:
        milliseconds: Of the model; the median over the rounds.
        against_milliseconds: Of the model it was compared with; None without one.
        ratio: Median over the rounds of the model's time over the other's; below 1 is faster.
        low: Smallest ratio over the rounds. If the range overlaps that of the reference against itself, it is extended
            by it, and so includes 1.
        high: Largest ratio, likewise.
        pairs: Number of timed calls of each model, in all rounds.
        batch_size: Rows of a call; None if the inputs were used as given.

    Examples:
        >>> from torch import nn
        >>> from lightning_optim import measure_latency
        >>> result = measure_latency(nn.Linear(8, 2), torch.zeros(1, 8))
        >>> result.milliseconds > 0
        True
    """

    milliseconds: float
    against_milliseconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    batch_size: int | None = None

    @property
    def differs(self) -> bool:
        """Whether the two models differ by more than the noise."""
        return self.ratio is not None and abs(self.ratio - 1) >= SAME and not (self.low or 0) <= 1 <= (self.high or 0)

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.milliseconds:.3g} ms"
        verdict = "" if self.differs else ", no difference"
        return f"{self.milliseconds:.3g} ms, ratio {self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]{verdict}"


class Subject:
    """A function of a case that is timed. Subclasses can be moved in memory.

    Args:
        function: The function, called with each case.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def renew(self) -> None:
        """Move to a new place in memory; called once in every round."""

    def ready(self) -> None:
        """Prepare a call; this is not timed."""

    def call(self, case: Any) -> Any:
        """Make the call that is timed."""
        return self.function(case)

    def release(self) -> None:
        """Put everything back."""


class ModuleSubject(Subject):
    """A module whose parameters and buffers are copied to a new place in every round, and restored at the end.

    The module itself is not copied: its tensors point to the copies only during its own calls, so two subjects can
    share a module or parameters.

    Args:
        module: The model, in the mode to time.
        inputs: Replaces the case, if the model has inputs of its own.
        places: Number of copies that stay in memory, see :func:`places_in_memory`; with 0 the tensors are not moved.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs | None = None, *, places: int = ROUNDS) -> None:
        super().__init__(lambda case: (inputs or case).call(module))
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
        self._tensors = [tensor for tensor in tensors if places and type(tensor) in (Tensor, nn.Parameter)]
        self._homes = [tensor.data for tensor in self._tensors]
        self._places: deque[list[Tensor]] = deque(maxlen=max(places, 1))
        self._spacer: Tensor | None = None
        self._random = random.Random(id(self))

    def renew(self) -> None:
        """Copy the tensors; earlier copies and a gap of random size keep the new ones from reusing a place."""
        device = self._homes[0].device if self._homes else torch.device("cpu")
        self._spacer = torch.empty(self._random.randrange(64, LARGEST_SPACER, 64), dtype=torch.uint8, device=device)
        self._places.append([home.clone() for home in self._homes])

    def ready(self) -> None:
        """Let the module compute with this round's copies."""
        for tensor, place in zip(self._tensors, self._places[-1], strict=True):
            tensor.data = place

    def release(self) -> None:
        """Give the module its own tensors back."""
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home
        self._places.clear()
        self._spacer = None


def places_in_memory(modules: Sequence[nn.Module]) -> int:
    """Number of copies of each module that fit into half of the free memory, at most one per round.

    A new copy gets the memory of a freed one, so earlier copies are kept: otherwise there would be only two places.
    """
    device = next((tensor.device for module in modules for tensor in module.parameters()), torch.device("cpu"))
    fitting = free_bytes(device) // 2 // max(sum(map(bytes_of, modules)), 1)
    return min(max(fitting - 1, 0), ROUNDS)  # a new copy comes before the oldest leaves


def time_in_rounds(
    subjects: Sequence[Subject],
    cases: Sequence[Any],
    clock: Callable[[], float],
    *,
    seconds: float = 0.2,
    least: int = 10,
    most: int = 100,
) -> tuple[list[list[list[float]]], int]:
    """Time all subjects alternately: in each round and case they are called equally often, in changing order.

    Args:
        subjects: The subjects to compare.
        cases: Arguments of the calls, one case after the other.
        clock: Returns seconds.
        seconds: Time to spend on a case, which determines the number of calls.
        least: Minimum number of calls of a subject, over all rounds.
        most: Maximum number of calls of a subject, over all rounds.

    Returns:
        ``times[case][subject][round]`` in seconds, and the number of calls of each subject in a case.
    """
    times: list[list[list[float]]] = [[[] for _ in subjects] for _ in cases]
    calls = [0] * len(cases)
    shuffled = random.Random(0)
    try:
        for number in range(ROUNDS):
            for subject in subjects:
                subject.renew()
            for index, case in enumerate(cases):
                for _ in range(WARM_UP if number == 0 else WARM_UP_ANEW):
                    once = sum(_timed(clock, subject, case) for subject in subjects)
                if number == 0:
                    wanted = min(max(seconds / max(once, 1e-9), least), most)
                    calls[index] = max(math.ceil(wanted / ROUNDS), 1)
                taken = _turns(subjects, case, clock, calls[index], shuffled)
                for which, samples in enumerate(taken):
                    times[index][which].append(_typical(samples))
    finally:
        for subject in subjects:
            subject.release()
    return times, ROUNDS * min(calls)


def _turns(
    subjects: Sequence[Subject], case: Any, clock: Callable[[], float], calls: int, shuffled: random.Random
) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in subjects]
    order = list(range(len(subjects)))
    for _ in range(calls):
        shuffled.shuffle(order)
        for which in order:
            taken[which].append(_timed(clock, subjects[which], case))
    return taken


def _timed(clock: Callable[[], float], subject: Subject, case: Any) -> float:
    subject.ready()
    begin = clock()
    subject.call(case)
    return clock() - begin


def _typical(times: Sequence[float]) -> float:
    ordered = sorted(times)
    low, high = (int(part * len(ordered)) for part in FASTER)
    return fmean(ordered[low : max(high, low + 1)])


def compared(
    times: Sequence[float],
    reference: Sequence[float] | None = None,
    twin: Sequence[float] | None = None,
    *,
    calls: int = 0,
    batch_size: int | None = None,
) -> LatencyResult:
    """Compare the times of a model with those of the reference in the same rounds.

    Args:
        times: Times of the model in seconds, one per round.
        reference: Times of the reference; None for the time alone.
        twin: Times of the reference at another place; a difference must also exceed their range against the reference.
        calls: Number of calls of each, for the result.
        batch_size: Rows of a call, for the result.
    """
    own = median(times) * 1e3
    if reference is None:
        return LatencyResult(own, pairs=calls, batch_size=batch_size)
    ratios = _ratios(times, reference)
    low, high = min(ratios), max(ratios)
    if twin is not None:
        noise = [1.0, *_ratios(twin, reference)]
        if low <= max(noise) and high >= min(noise):
            low, high = min(low, *noise), max(high, *noise)
    return LatencyResult(own, median(reference) * 1e3, median(ratios), low, high, calls, batch_size)


def _ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [own / max(other, 1e-12) for own, other in zip(times, reference, strict=True)]
