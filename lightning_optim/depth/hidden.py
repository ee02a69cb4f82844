"""The hidden state that passes through the blocks of a stack."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_optim.modules import CONVOLUTIONS
from lightning_optim.outputs import output_tensors

__all__ = ["Call", "feature_dim", "hidden_in", "hidden_out", "skipping", "watching", "with_hidden"]


@dataclass
class Call:
    """One call of a block.

    Attributes:
        number: How many calls of watched blocks ended before it.
        hidden_in: Hidden state that it received, None if there was no tensor.
        hidden_out: Hidden state that it returned, None if there was none.
        output: All that it returned; None unless outputs are kept.
    """

    number: int
    hidden_in: Tensor | None
    hidden_out: Tensor | None
    output: Any = field(default=None, repr=False)


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden state among a block's arguments: the first float tensor."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def hidden_out(output: Any) -> Tensor | None:
    """Return the hidden state in a block's output: the tensor, or the first item of a tuple or list."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a block's output with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


def feature_dim(block: nn.Module, hidden: Tensor) -> int:
    """Return the dimension of a hidden state that holds the features: 1 behind convolutions, else the last."""
    return 1 if hidden.ndim > 2 and any(isinstance(layer, CONVOLUTIONS) for layer in block.modules()) else -1


@contextmanager
def watching(
    blocks: Mapping[str, nn.Module], *, hidden: bool = True, keep_bytes: int = 0
) -> Iterator[dict[str, list[Call]]]:
    """Note the calls of blocks inside the ``with`` block.

    Args:
        blocks: Blocks by name.
        hidden: Whether to keep the hidden states.
        keep_bytes: Keep all that they return as long as it is not larger; beyond that nothing is kept of any call.

    Yields:
        The calls of each block, in order.
    """
    calls: dict[str, list[Call]] = {name: [] for name in blocks}
    ended = held = 0

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal ended, held
        states = (hidden_in(args, kwargs), hidden_out(output)) if hidden else (None, None)
        if held < keep_bytes:
            held += sum(tensor.numel() * tensor.element_size() for tensor in output_tensors(output))
        if held >= keep_bytes:
            output = None
            for call in (call for own in calls.values() for call in own):
                call.output = None
        calls[name].append(Call(ended, *states, output))
        ended += 1

    handles = [
        block.register_forward_hook(
            lambda layer, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
        )
        for name, block in blocks.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipping(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks return the hidden state that they received, beside whatever else they return."""

    def skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        received = hidden_in(args, kwargs)
        return output if received is None else with_hidden(output, received)

    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
