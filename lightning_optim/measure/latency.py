"""How long one call of a model takes, as a ratio that holds on a busy machine.

Calls of the two models take turns, in CPU time of the thread on a CPU and in synchronised wall time on a GPU; each
model's time is the mean of its faster calls (the 5th to the 40th hundredth). The slow half is what neighbours on the
machine do; the single fastest call is luck when two models push each other out of the cache (two of 12.7 MB: the ratio
of minima of equal models spread by 8 %, that of these means by 1 %).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows

__all__ = ["LatencyResult", "interleaved_latency", "measure_latency", "time_in_turns"]

WARM_UP = 5
"""Calls of each model before any is timed: the first after a training step takes 1.9x, the fifth 1.1x."""

ROUNDS = 5
"""The interval is the range of the ratio over this many rounds."""

FASTER = (0.05, 0.40)
"""The part of the sorted times whose mean stands for a model."""

SAME = 0.05
"""Ratios closer to 1 than this are called equal."""


@dataclass(frozen=True)
class LatencyResult:
    """Time of one call.

    Attributes:
        milliseconds: Of the model.
        against_milliseconds: Of the model it was compared with, None where there was none.
        ratio: ``milliseconds / against_milliseconds``; below 1 is faster.
        low: Smallest ratio over the rounds.
        high: Largest ratio over the rounds.
        pairs: Calls of each model that were timed.
        batch_size: Rows in a call, None where the inputs were taken as given.
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


@contextmanager
def _inference(*modules: nn.Module) -> Iterator[None]:
    """Set eval, no_grad, one thread and a forked RNG, and put everything back flag by flag.

    ``no_grad`` and not ``inference_mode``: a module that caches a tensor in its forward would fail at the next
    training step.
    """
    flags = [(layer, layer.training) for module in modules for layer in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    threads = torch.get_num_threads()
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    torch.set_num_threads(1)
    try:
        for module in modules:
            module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for layer, training in flags:
            layer.training = training
        with torch.no_grad():
            for buffer, value in buffers:  # of a module that counts its calls, say
                buffer.copy_(value)
        torch.set_num_threads(threads)


def _clock(module: nn.Module) -> Callable[[], float]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return time.thread_time

    def synchronised() -> float:
        torch.get_device_module(device).synchronize(device)
        return time.perf_counter()

    return synchronised


def interleaved_latency(
    module: nn.Module,
    inputs: ForwardInputs,
    against: nn.Module | None = None,
    against_inputs: ForwardInputs | None = None,
    *,
    seconds: float = 0.2,
    least: int = 10,
    most: int = 100,
) -> LatencyResult:
    """Time a model, in turns with another one where given.

    Both are measured in eval mode, without gradients, on one thread; their flags, the RNG and the thread count are
    restored, and nothing of theirs is changed.

    Args:
        module: The model.
        inputs: What its forward receives.
        against: The model to compare with.
        against_inputs: What that one receives; default the same.
        seconds: Time to spend: it decides on the number of pairs.
        least: Pairs at least.
        most: Pairs at most.
    """
    calls = [lambda: inputs.call(module)]
    if against is not None:
        other, other_inputs = against, against_inputs or inputs
        calls.append(lambda: other_inputs.call(other))
    modules = [module] if against is None else [module, against]
    with _inference(*modules):
        return time_in_turns(calls, _clock(module), seconds=seconds, least=least, most=most)


def time_in_turns(
    calls: Sequence[Callable[[], Any]],
    clock: Callable[[], float] = time.thread_time,
    *,
    seconds: float = 0.2,
    least: int = 10,
    most: int = 100,
) -> LatencyResult:
    """Time one function, or two in turns.

    Args:
        calls: The function, and the one to compare with.
        clock: Gives seconds.
        seconds: Time to spend: it decides on the number of pairs.
        least: Pairs at least.
        most: Pairs at most.
    """
    for _ in range(WARM_UP):
        once = [_timed(clock, call) for call in calls]
    pairs = int(min(max(seconds / max(sum(once), 1e-9), least), most))
    times: list[list[float]] = [[] for _ in calls]
    for index in range(pairs):
        order = range(len(calls)) if index % 2 else reversed(range(len(calls)))
        for which in order:
            times[which].append(_timed(clock, calls[which]))
    return _result(times, pairs)


def _timed(clock: Callable[[], float], call: Callable[[], Any]) -> float:
    begin = clock()
    call()
    return clock() - begin


def _result(times: list[list[float]], pairs: int) -> LatencyResult:
    own = _typical(times[0])
    if len(times) == 1:
        return LatencyResult(own * 1e3, pairs=pairs)
    other = _typical(times[1])
    rounds = [_typical(times[0][i::ROUNDS]) / _typical(times[1][i::ROUNDS]) for i in range(min(ROUNDS, pairs))]
    ratio = own / other
    return LatencyResult(own * 1e3, other * 1e3, ratio, low=min(*rounds, ratio), high=max(*rounds, ratio), pairs=pairs)


def _typical(times: list[float]) -> float:
    ordered = sorted(times)
    low, high = (int(part * len(ordered)) for part in FASTER)
    return fmean(ordered[low : max(high, low + 1)])


def measure_latency(
    module: nn.Module, example_inputs: Any, *, against: nn.Module | None = None, batch_size: int | None = 1
) -> LatencyResult:
    """Measure the time of one call, alone or as a ratio against another model.

    Args:
        module: The model; it is measured as it is, in eval mode on one thread, and left as it was.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments, on the model's device.
        against: A model that takes the same inputs, measured in turns with the first.
        batch_size: Rows that the inputs are cut (or repeated) to; None takes them as given (ragged inputs).

    Returns:
        Milliseconds, and with ``against`` the ratio with its range over five rounds.

    Raises:
        ValueError: If the inputs' tensors disagree in dimension 0, so that rows cannot be cut.

    Examples:
        >>> small, big = nn.Linear(256, 16), nn.Linear(256, 1024)
        >>> measure_latency(small, torch.zeros(1, 256), against=big).ratio < 1
        True
    """
    inputs = as_forward_inputs(example_inputs)
    if batch_size is not None:
        inputs = first_rows(inputs, batch_size)
    result = interleaved_latency(module, inputs, against, seconds=1.0, least=40, most=200)
    return LatencyResult(**{**vars(result), "batch_size": batch_size})
