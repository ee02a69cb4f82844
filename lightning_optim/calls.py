"""Calls of a module's forward, whose failures name the argument that was wrong and what it passed."""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.target import ForwardInputs, as_forward_inputs, batch_inputs, move_inputs

__all__ = ["batch_calls", "batch_count", "describe_inputs", "try_batch", "try_forward"]


def batch_calls(
    model: nn.Module,
    dataloader: Iterable[Any],
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
) -> Iterator[ForwardInputs]:
    """Yield the arguments of forward for each batch, on the model's device.

    Args:
        model: The module to call.
        dataloader: Its batches.
        inputs: Returns the arguments for a batch; default as :func:`~lightning_optim.target.batch_inputs` reads it.
        batches: How many; default all.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in islice(dataloader, batches):
        received = batch_inputs(model, batch) if inputs is None else as_forward_inputs(inputs(batch))
        yield move_inputs(received, device)


def batch_count(dataloader: Any, batches: int | None) -> int | None:
    """Return how many batches will come, None where that is unknown."""
    known = len(dataloader) if isinstance(dataloader, Sized) else None
    return min((n for n in (known, batches) if n is not None), default=None)


def try_batch(model: nn.Module, received: ForwardInputs, inputs: Callable[[Any], Any] | None) -> Any:
    """Call a module with what :func:`batch_calls` made of a batch, and return its output.

    Raises:
        ValueError: If the call fails.
    """
    argument = "the arguments taken from a batch of `dataloader`"
    advice = (
        "pass inputs=..., a function that returns a tensor, a tuple of arguments or a dict of keyword arguments for a "
        "batch, for example inputs=lambda batch: batch[0]."
    )
    if inputs is not None:
        argument = "what `inputs` returns for a batch"
    return try_forward(model, received, argument=argument, advice=advice)


def try_forward(module: nn.Module, inputs: ForwardInputs, *, argument: str, advice: str) -> Any:
    """Call a module, and return its output.

    Args:
        module: Any module.
        inputs: Arguments of its forward.
        argument: The user's argument they come from, for the message.
        advice: A sentence on what to pass instead.

    Raises:
        ValueError: If the call fails.
    """
    try:
        return inputs.call(module)
    except FAILURES as error:
        raise ValueError(
            f"forward of {type(module).__name__} fails with {argument} ({first_line(error).rstrip('.')}). They pass "
            f"{describe_inputs(inputs)}; {advice}"
        ) from error


def describe_inputs(inputs: ForwardInputs) -> str:
    """Describe the arguments of a call by types and shapes.

    Examples:
        >>> import torch
        >>> describe_inputs(ForwardInputs((torch.zeros(2, 3), 4), {"mask": None}))
        'float32 (2, 3), int, mask=NoneType'
    """

    def described(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    named = [f"{name}={described(value)}" for name, value in (inputs.kwargs or {}).items()]
    return ", ".join([*map(described, inputs.args), *named]).replace("torch.", "") or "nothing"
