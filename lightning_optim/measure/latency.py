"""How long one call of a model takes, as a ratio that holds on a busy machine.

Calls of the models take turns, in CPU time of the thread on a CPU and in synchronised wall time on a GPU, over rounds
in each of which the weights lie elsewhere in memory (:mod:`lightning_optim.measure.rounds`). In a round each model's
time is the mean of its faster calls (the 5th to the 40th hundredth). The slow half is what neighbours on the machine
do; the single fastest call is luck when two models push each other out of the cache (two of 12.7 MB: the ratio of
minima of equal models spread by 8 %, that of these means by 1 %).
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
    """Time a model, in turns with another one where given.

    Both are measured in eval mode, without gradients, on one thread; their flags, the RNG and the thread count are
    restored, and nothing of theirs is changed.

    Args:
        module: The model.
        inputs: What its forward receives.
        against: The model to compare with.
        against_inputs: What that one receives; default the same.
        seconds: Time to spend: it decides on the number of pairs.
        least: Pairs at least; never fewer than rounds.
        most: Pairs at most.
        twin: Whether ``against`` is timed a second time, at another place: what it differs from itself is noise that
            ``low`` and ``high`` then hold too.
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
    """Time several models in turns, in the same rounds; the first is the reference.

    Args:
        modules: The models, all on one device.
        batches: What their forwards receive, one after the other.
        seconds: Time to spend on a model and batch.
        least: Calls at least.
        most: Calls at most.

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
    """Time one function, or two in turns; what they read stays where it is in memory.

    Args:
        calls: The function, and the one to compare with.
        clock: Gives seconds.
        seconds: Time to spend: it decides on the number of pairs.
        least: Pairs at least; never fewer than rounds.
        most: Pairs at most.
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
        module: The model; it is measured as it is, in eval mode on one thread, and left as it was.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments, on the model's device.
        against: A model that takes the same inputs, measured in turns with the first.
        batch_size: Rows that the inputs are cut (or repeated) to; None takes them as given (ragged inputs).

    Returns:
        Milliseconds, and with ``against`` the ratio with its range over eight rounds. In every round the weights of
        both are copied to new places, as far as memory allows; a difference must clear that of ``against`` from itself.

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
    result = interleaved_latency(module, inputs, against, seconds=1.0, least=40, most=200, twin=True)
    return replace(result, batch_size=batch_size)
