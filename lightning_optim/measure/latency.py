"""Latency of a call, as a ratio that is reliable on a busy machine.

Calls of the models alternate: in CPU time of the thread on a CPU, in synchronized wall time on a GPU. The weights are
moved to another place in memory in each round (:mod:`lightning_optim.measure.rounds`). A model's time in a round is the
mean of its faster calls (5th to 40th percentile). Slower calls show the load of the machine; the fastest single call is
luck if two models evict each other from the cache (two of 12.7 MB: the ratio of the minima of equal models spread by
8 %, that of these means by 1 %).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_optim.measure.rounds import (
    LatencyResult,
    ModuleSubject,
    Subject,
    compared,
    places_in_memory,
    time_in_rounds,
)
from lightning_optim.modules import evaluating
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows

__all__ = [
    "LatencyResult",
    "against_first",
    "interleaved_latency",
    "latencies",
    "measure_latency",
    "time_in_turns",
]


@contextmanager
def _inference(*modules: nn.Module) -> Iterator[None]:
    """Set eval mode, no_grad, one thread and a forked RNG; restore them and the buffers afterwards."""
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    threads = torch.get_num_threads()
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    torch.set_num_threads(1)
    try:
        with evaluating(*modules), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
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
    twin: bool = False,
) -> LatencyResult:
    """Time a model, alternating with another one if it is given.

    Both are measured in eval mode, without gradients, on one thread; modes, the RNG and the thread count are restored.

    Args:
        module: The model.
        inputs: Arguments of its forward.
        against: The model to compare with.
        against_inputs: Arguments of that model's forward; default the same.
        seconds: Time to spend, which determines the number of pairs.
        least: Minimum number of pairs; never fewer than rounds.
        most: Maximum number of pairs.
        twin: Whether to time ``against`` a second time at another place. Its difference from itself is noise, and
            ``low`` and ``high`` then include it.
    """
    modules = [module] if against is None else [module, *[against] * (2 if twin else 1)]
    places = places_in_memory(modules)
    subjects = [ModuleSubject(module, places=places)]
    subjects += [ModuleSubject(other, against_inputs, places=places) for other in modules[1:]]
    with _inference(*modules):
        times, calls = time_in_rounds(subjects, [inputs], _clock(module), seconds=seconds, least=least, most=most)
    return compared(*times[0], calls=calls)


def latencies(
    modules: Sequence[nn.Module], batches: Sequence[ForwardInputs], *, seconds: float, least: int, most: int
) -> list[list[LatencyResult]]:
    """Time several models alternately, in the same rounds; the first is the reference.

    Args:
        modules: The models, all on one device.
        batches: Arguments of their forwards, one batch after the other.
        seconds: Time to spend on a model and batch.
        least: Minimum number of calls.
        most: Maximum number of calls.

    Returns:
        ``[batch][model]``; the first model's is its time against itself at another place.
    """
    timed = (*modules, modules[0])
    places = places_in_memory(timed)
    subjects = [ModuleSubject(module, places=places) for module in timed]
    with _inference(*modules):
        times, calls = time_in_rounds(
            subjects, batches, _clock(modules[0]), seconds=seconds * len(subjects), least=least, most=most
        )
    return [against_first(rows, calls) for rows in times]


def against_first(times: Sequence[Sequence[float]], calls: int) -> list[LatencyResult]:
    """Compare each model's times with those of the first; the last ones are the first model's at another place."""
    reference, *others, twin = times
    own = compared(twin, reference, calls=calls)
    return [own, *(compared(rows, reference, twin, calls=calls) for rows in others)]


def time_in_turns(
    calls: Sequence[Callable[[], Any]],
    clock: Callable[[], float] = time.thread_time,
    *,
    seconds: float = 0.2,
    least: int = 10,
    most: int = 100,
) -> LatencyResult:
    """Time one function, or two alternately; their data stay in place in memory.

    Args:
        calls: The function, and the one to compare with.
        clock: Returns seconds.
        seconds: Time to spend, which determines the number of pairs.
        least: Minimum number of pairs; never fewer than rounds.
        most: Maximum number of pairs.
    """
    subjects = [Subject(_of_any_case(call)) for call in calls]
    times, pairs = time_in_rounds(subjects, [None], clock, seconds=seconds, least=least, most=most)
    return compared(*times[0], calls=pairs)


def _of_any_case(call: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda case: call()


def measure_latency(
    module: nn.Module, example_inputs: Any, *, against: nn.Module | None = None, batch_size: int | None = 1
) -> LatencyResult:
    """Measure the time of one call, alone or as a ratio against another model.

    Args:
        module: The model; measured in eval mode on one thread, and left unchanged.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments, on the model's device.
        against: A model with the same inputs, measured alternately with the first.
        batch_size: Number of rows that the inputs are cut (or repeated) to; None keeps them as given (ragged inputs).

    Returns:
        Milliseconds and, with ``against``, the ratio and its range over eight rounds. In every round the weights of
        both are copied to new places, as far as memory allows; a difference must exceed that of ``against`` from
        itself.

    Raises:
        ValueError: If the tensors have different sizes in dimension 0, so the batch size is ambiguous.

    Examples:
        >>> small, big = nn.Linear(256, 16), nn.Linear(256, 1024)
        >>> measure_latency(small, torch.zeros(1, 256), against=big).ratio < 1
        True
    """
    inputs = as_forward_inputs(example_inputs)
    if batch_size is not None:
        inputs = first_rows(inputs, batch_size)
    result = interleaved_latency(module, inputs, against, seconds=1.0, least=40, most=200, twin=True)
    return replace(result, batch_size=batch_size)
