"""A teacher's head, called by us: its logits are computed for the rows that count, some at a time.

The teacher runs up to its head, a Linear, whose input is kept. The head then multiplies one position of each sample
only, so that the forward ends as usual. In the first batch that position proves that what the teacher returns is the
head's output, or the head's output scaled or capped as the model's config says; otherwise its logits are taken whole.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.chunks import RowPlaces
from lightning_optim.modules import LINEARS, is_compiled
from lightning_optim.sharding import is_sharded

__all__ = [
    "Answer",
    "Head",
    "HeadAnswer",
    "find_head",
    "is_hugging_face",
    "outputs_of",
    "proven",
    "rows_of_answer",
    "stopped_at",
    "without_labels",
]

Tail = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class HeadAnswer:
    """Logits that are not computed yet.

    Attributes:
        hidden: The head's input, ``[rows, positions..., width]``.
        shape: Shape of the logits, ``[rows, positions..., classes]``.
        of: Computes the logits of some rows of ``hidden``, ``[n, width] -> [n, classes]``.
    """

    hidden: Tensor
    shape: tuple[int, ...]
    of: Callable[[Tensor], Tensor]

    def whole(self) -> Tensor:
        """Return all logits."""
        return self.of(self.hidden)

    def like(self) -> Tensor:
        """Return a tensor of the logits' shape: one zero, expanded."""
        return self.hidden.new_zeros(()).expand(self.shape)

    def take(self, places: RowPlaces, part: slice) -> Tensor:
        """Return the logits of some rows, ``[n, classes]``; the classes are the last dimension."""
        return self.of(places.take(self.hidden, part))


Answer = Tensor | HeadAnswer
"""What a teacher answers: its logits, or what they are computed from."""


def rows_of_answer(answer: Answer, places: RowPlaces, part: slice) -> Tensor:
    """Return some rows of what a teacher answers, ``[n, classes]``."""
    return answer.take(places, part) if isinstance(answer, HeadAnswer) else places.take(answer, part)


@dataclass(frozen=True, eq=False)
class Head:
    """The last layer of a teacher.

    Attributes:
        layer: A Linear.
        tail: What the teacher does with its output, entry by entry.
    """

    layer: nn.Module
    tail: Tail

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of rows of the head's input."""
        return self.tail(self.layer(hidden))


def find_head(network: nn.Module, classes: int, whole: Collection[str] = ()) -> nn.Module | None:
    """Return the Linear that may compute a teacher's logits: the last one with enough outputs; None if there is none.

    Args:
        network: The teacher. The head of a compiled or divided one cannot be called alone.
        classes: The least number of outputs.
        whole: Names of layers whose outputs are needed: none of them may be the head, or hold it.
    """
    if is_compiled(network) or is_sharded(network):
        return None
    models: list[Any] = [module for module in network.modules() if is_hugging_face(module)]
    named = [model.get_output_embeddings() for model in models]
    chosen: list[Any] = [layer for layer in named if isinstance(layer, LINEARS)]
    layers = chosen or [layer for layer in network.modules() if isinstance(layer, LINEARS)]
    head = next((layer for layer in reversed(layers) if outputs_of(layer) >= classes), None)
    for name, layer in network.named_modules(remove_duplicate=False):
        if layer is head and (_is_compiled_in(network, name) or any(_holds(other, name) for other in whole)):
            return None
    return head


def _holds(outer: str, inner: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _is_compiled_in(network: nn.Module, name: str) -> bool:
    """Whether a layer or one around it was compiled in place: hooks would be compiled too, anew in each step."""
    parts = name.split(".")
    around = (network.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in around)


def outputs_of(layer: nn.Module) -> int:
    """Return the number of outputs of a Linear, also of one that stores its weight ``[in, out]``."""
    return int(getattr(layer, "out_features", 0) or getattr(layer, "nf", 0))


@contextmanager
def stopped_at(network: nn.Module, head: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let a head compute one position of each sample while a teacher runs, and models of Hugging Face no loss.

    Yields:
        The head's calls: its whole input, and its output for the first position.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    inputs: list[Tensor] = []

    def shorten(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        return (args[0][..., :1, :], *args[1:])

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((inputs.pop(), output.clone()))  # some models change it in place

    def unlabeled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, without_labels(model, kwargs)

    hooks = [head.register_forward_pre_hook(shorten), head.register_forward_hook(note)]
    hooks += [model.register_forward_pre_hook(unlabeled, with_kwargs=True) for model in _outermost(network)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def proven(network: nn.Module, head: nn.Module, output: Tensor, logits: Tensor) -> Head | None:
    """Return the head with what a teacher does with its output; None if that is not known.

    Args:
        network: The teacher.
        head: Its last Linear.
        output: What that returned for some positions.
        logits: What the teacher returned for them.
    """
    for tail in (_unchanged, *_tails(network)):
        expected = tail(output)
        if expected.shape == logits.shape and torch.equal(expected.float(), logits.float()):
            return Head(head, tail)
    return None


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told by the name of its base class."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _outermost(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the Hugging Face models in a network that are in no other; they pass no labels on."""
    if is_hugging_face(network):
        yield network
        return
    for child in network.children():
        yield from _outermost(child)


def without_labels(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model without labels, for which it would compute a loss.

    A model with encoder and decoder makes the decoder's input of them: it gets that, or keeps the labels.
    """
    arguments = dict(kwargs)
    labels = arguments.get("labels")
    if labels is None:
        return arguments
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        told = any(arguments.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds"))
        if not told and prepare is None:
            return arguments
        if not told and prepare is not None:
            arguments["decoder_input_ids"] = prepare(labels=labels)
    del arguments["labels"]
    return arguments


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _tails(network: nn.Module) -> Iterator[Tail]:
    """Yield what models of Hugging Face do with logits, by the names of their configs."""
    for module in network.modules():
        config = module.__dict__.get("config")
        for name, tail in _OF_CONFIG.items():
            value = getattr(config, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield tail(float(value))


def _capped(limit: float) -> Tail:
    return lambda logits: torch.tanh(logits / limit) * limit


def _multiplied(factor: float) -> Tail:
    return lambda logits: logits * factor


def _divided(divisor: float) -> Tail:
    return lambda logits: logits / divisor


_OF_CONFIG: dict[str, Callable[[float], Tail]] = {
    "final_logit_softcapping": _capped,
    "logit_scale": _multiplied,
    "logits_scaling": _divided,
}
"""Gemma 2 and 3; Cohere; Granite. A name that means something else in another model is not proven there."""
