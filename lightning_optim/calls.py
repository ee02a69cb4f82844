"""A call of a module's forward that fails is told by what was passed, and by the argument that passed it."""

from typing import Any

from torch import Tensor, nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.target import ForwardInputs

__all__ = ["describe_inputs", "try_forward"]


def try_forward(module: nn.Module, inputs: ForwardInputs, *, argument: str, advice: str) -> Any:
    """Call a module, and return what it returns.

    Args:
        module: Any module.
        inputs: What its forward receives.
        argument: What the user passed, for the message.
        advice: What to pass instead, a sentence.

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
    """Return what a call passes, in words.

    Examples:
        >>> import torch
        >>> describe_inputs(ForwardInputs((torch.zeros(2, 3), 4), {"mask": None}))
        'float32 (2, 3), int, mask=NoneType'
    """

    def word(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    named = [f"{name}={word(value)}" for name, value in (inputs.kwargs or {}).items()]
    return ", ".join([*map(word, inputs.args), *named]).replace("torch.", "") or "nothing"
