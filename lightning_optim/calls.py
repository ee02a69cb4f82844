"""Calls of a module's forward, whose failures name the argument that was wrong and what it passed."""

from typing import Any

from torch import Tensor, nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.target import ForwardInputs

__all__ = ["describe_inputs", "try_forward"]


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
