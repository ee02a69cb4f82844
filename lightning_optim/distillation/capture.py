"""What layers receive and return while other code runs."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.distillation.places import plain_name
from lightning_optim.modules import evaluating, without_compiler
from lightning_optim.outputs import output_tensors
from lightning_optim.target import ForwardInputs

__all__ = ["Capture", "find_layer", "observe", "tensor_of"]


def find_layer(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the layer with a dotted name; the empty name is ``root``, ``"layers.-1"`` the last block of a stack.

    Args:
        root: The student or a teacher.
        name: The layer's name.
        argument: Where the name comes from, for the error ("feature", "logits_from").

    Raises:
        ValueError: If there is no such layer; the closest names are listed.
    """
    name = plain_name(root, name, argument)
    try:
        return root.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in root.named_modules() if known]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"{argument}: {type(root).__name__} has no layer {name!r}. Closest: {', '.join(near) or 'there are none'}."
        ) from None


class Capture:
    """Record the inputs and outputs of layers; its hooks live as long as the ``with`` block.

    Hooks are registered anew in each step: they then work on a layer that was replaced, are not in copies of the
    module, and do not fire again when activations are recomputed in the backward pass.

    Args:
        root: The module.
        names: Dotted names of its layers.
        argument: Where the names come from, for errors.
        trains: Skip calls without gradients while the surrounding code records gradients, such as a metric in the
            training step that calls the model again.
        watch: Called with the output of each call of the first layer that is recorded.

    Raises:
        ValueError: If there is no such layer.
        MisconfigurationException: If a layer is inside a compiled one, where hooks do not fire.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Iterable[str],
        argument: str = "feature",
        *,
        trains: bool = False,
        watch: Callable[[Any], None] | None = None,
    ) -> None:
        self.trains = trains and torch.is_grad_enabled()
        self.without_gradient = 0
        self.layers = {name: find_layer(root, name, argument) for name in names}
        for name in self.layers:
            _refuse_compiled(root, plain_name(root, name, argument))
        self.calls: dict[str, list[tuple[ForwardInputs, Any]]] = {name: [] for name in self.layers}
        self._watch = watch
        self._watched = next(iter(self.calls.values()), None)
        self._restore: list[Callable[[], object]] = []

    def __enter__(self) -> "Capture":
        for name, layer in self.layers.items():
            compiled = getattr(layer, "_compiled_call_impl", None)
            if compiled is not None:  # a hook would be traced into the graph, and later hooks would never run
                self._wrap_compiled(layer, compiled, self.calls[name])
            else:
                handle = layer.register_forward_hook(self._hook(self.calls[name]), with_kwargs=True)
                self._restore.append(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        for restore in self._restore:
            restore()
        self._restore = []

    def _record(self, calls: list[tuple[ForwardInputs, Any]], args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.trains and not torch.is_grad_enabled():
            self.without_gradient += 1
        else:
            calls.append((ForwardInputs(args, dict(kwargs)), output))
            if self._watch is not None and calls is self._watched:
                self._watch(output)

    def _hook(self, calls: list[tuple[ForwardInputs, Any]]) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._record(calls, args, kwargs, output)

        return hook

    def _wrap_compiled(self, layer: Any, compiled: Callable[..., Any], calls: list[tuple[ForwardInputs, Any]]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            self._record(calls, args, kwargs, output)
            return output

        layer._compiled_call_impl = call
        self._restore.append(lambda: setattr(layer, "_compiled_call_impl", compiled))

    def clear(self) -> None:
        """Forget the calls up to now."""
        for calls in self.calls.values():
            calls.clear()

    def outputs(self, name: str) -> list[Tensor]:
        """Return the tensors that a layer returned, one per call."""
        return [tensor_of(output) for _, output in self.calls[name]]


def _refuse_compiled(root: nn.Module, name: str) -> None:
    parts = name.split(".") if name else []
    for depth in range(len(parts)):
        above = root.get_submodule(".".join(parts[:depth]))
        if getattr(above, "_compiled_call_impl", None) is not None or without_compiler(above) is not above:
            raise MisconfigurationException(
                f"layer {name!r} is inside {'.'.join(parts[:depth]) or type(root).__name__!r}, which is compiled: "
                "its output cannot be seen from outside. Compile the parts below or beside it instead."
            )


def tensor_of(output: Any) -> Tensor:
    """Return the first tensor in a layer's output.

    Raises:
        TypeError: If it holds none.
    """
    for tensor in output_tensors(output):
        return tensor
    raise TypeError(f"a layer used as a feature must return a tensor, got {type(output).__name__}.")


def observe(root: nn.Module, call: nn.Module, inputs: ForwardInputs, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the features of one dry forward pass in eval mode; the modes are restored.

    Args:
        root: The module that ``names`` refer to.
        call: The part of it to call.
        inputs: The arguments of that call.
        names: Names of the layers.

    Raises:
        ValueError: If a layer is not called.
    """
    with evaluating(root), Capture(root, names) as captured:
        inputs.call(call)
    for name in captured.layers:
        if not captured.calls[name]:
            raise ValueError(f"feature {name!r} of {type(root).__name__} is not called by its forward.")
    return {name: captured.outputs(name)[0] for name in captured.layers}
