"""What a forward pass reaches: the layers that it calls, and the parameters that lead to its outputs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_optim.outputs import output_tensors

__all__ = ["called_layers", "differentiable", "parameters_behind"]


@contextmanager
def called_layers(module: nn.Module) -> Iterator[set[str]]:
    """Note the names of all layers that are called inside."""
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in module.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def parameters_behind(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Return the leaf tensors from which outputs were computed."""
    seen: set[Any] = set()
    waiting = [output.grad_fn for output in outputs]
    leaves = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return leaves


def differentiable(module: nn.Module, output: Any) -> list[Tensor]:
    """Return the tensors of an output that its layers can be traced from.

    Raises:
        ValueError: If the module has parameters and no output leads to one.
    """
    tensors = output_tensors(output)
    traced = [tensor for tensor in tensors if tensor.requires_grad]
    if traced or not any(True for _ in module.parameters()):
        return traced
    if not tensors:
        found = "returns no tensor"
    elif not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        found = f"returns only {' and '.join(sorted({_dtype(tensor) for tensor in tensors}))} tensors"
    else:
        found = "returns only tensors without a gradient (detached, sampled, or computed under no_grad)"
    raise ValueError(
        f"the forward of {type(module).__name__} {found}, from which its layers cannot be traced. Let it return "
        "differentiable outputs as well, such as logits, or prune the part that gives them: `module='the part'`"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
