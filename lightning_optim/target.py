"""Which module and which parameters the callbacks act on, and what that module's forward receives.

Every technique asks here, so that ``module``, ``include`` and ``exclude`` mean the same everywhere.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_optim.modules import (
    CONVOLUTIONS,
    LINEARS,
    RECURRENT,
    TRANSPOSED,
    expert_weights,
    is_inside_compiled,
    matrices_of,
    without_compiler,
)
from lightning_optim.patterns import Pattern, Selector, matches
from lightning_optim.sharding import own_class

__all__ = [
    "ForwardInputs",
    "Pattern",
    "Selection",
    "as_forward_calls",
    "averaged_copies",
    "batch_inputs",
    "catch_forward_inputs",
    "find_target",
    "first_rows",
    "is_computed",
    "is_redirected",
    "lightning_class",
    "matches",
    "named_layers",
    "select_weights",
]

_LINEAR_AND_CONV = (*LINEARS, nn.Bilinear, *CONVOLUTIONS, *TRANSPOSED)
# Layers whose weights are pruned by default, and the names those weights begin with.
_PRUNED_BY_DEFAULT: tuple[tuple[tuple[type, ...], str], ...] = (
    (_LINEAR_AND_CONV, "weight"),
    ((nn.MultiheadAttention,), "in_proj_weight"),
    ((nn.MultiheadAttention,), "q_proj_weight"),
    ((nn.MultiheadAttention,), "k_proj_weight"),
    ((nn.MultiheadAttention,), "v_proj_weight"),
    (RECURRENT, "weight_"),
)


COMPUTED = "computed by a parametrization (weight_norm, spectral_norm, prune, ...): remove that first"
"""Why such a weight is left out: a change of it would be undone at the next forward pass."""


@dataclass(frozen=True)
class ForwardInputs:
    """What one call of a module's ``forward`` received."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    further: tuple["ForwardInputs", ...] = ()
    """Other calls, that reach other layers."""

    def call(self, module: nn.Module) -> Any:
        """Call ``module`` with these inputs."""
        return module(*self.args, **(self.kwargs or {}))

    def call_each(self, module: nn.Module) -> list[Any]:
        """Call ``module`` with these inputs, then with each of the further ones."""
        return [self.call(module), *(inputs.call(module) for inputs in self.further)]


@dataclass(frozen=True)
class Weight:
    """One selected parameter: its name as in ``state_dict()``, the layer that holds it, the parameter."""

    name: str
    layer: nn.Module
    parameter: nn.Parameter

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Return views ``[out, in, ...]`` of a tensor of the weight's shape: one, or of experts one each."""
        return matrices_of(self.layer, self.name.rpartition(".")[2], tensor)

    @property
    def is_plain(self) -> bool:
        """Whether the layer stores it as ``[out, in, ...]``, as one matrix or kernel."""
        tensor = self._emptied()
        return self.matrices(tensor)[0] is tensor

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the matrices."""
        return [matrix.shape for matrix in self.matrices(self._emptied())]

    def _emptied(self) -> Tensor:
        """Return a tensor of the shape of the whole weight, of which a process may hold a part."""
        return torch.empty(self.parameter.shape, device="meta")


@dataclass(frozen=True)
class Selection:
    """The selected weights by name, and every other parameter with the reason why it was left out."""

    chosen: dict[str, Weight]
    left_out: dict[str, str]


def lightning_class(module: object) -> type | None:
    """Return the LightningModule class that a module is of, of ``lightning`` or of ``pytorch_lightning``; else None."""
    return next((cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule"), None)


def find_target(pl_module: nn.Module, module: str | None = None) -> tuple[str, nn.Module]:
    """Return the module that a technique acts on, and the prefix of its names in ``pl_module.state_dict()``.

    The first that applies: the dotted name ``module``; what the LightningModule declares as ``optim_target`` (a
    distillation module answers with its student); the LightningModule itself.

    Args:
        pl_module: The LightningModule.
        module: A dotted name below it.

    Returns:
        ``(prefix, target)``; the prefix is empty or ends in a dot.

    Raises:
        ValueError: If there is no module of that name (the nearest level that exists is listed), or
            ``optim_target`` is no module below ``pl_module``.
    """
    if module is not None:
        return f"{module}.", _submodule(pl_module, module)
    declared = getattr(pl_module, "optim_target", None)
    if declared is None or declared is pl_module:
        return "", pl_module
    for name, child in pl_module.named_modules():
        if child is declared:
            return f"{name}.", child
    raise ValueError(
        f"`optim_target` of {type(pl_module).__name__} must be a module below it, got "
        f"{type(declared).__name__}. Register it as an attribute of the module."
    )


def _submodule(root: nn.Module, dotted: str) -> nn.Module:
    module = root
    for part in dotted.split("."):
        children = dict(module.named_children())
        if part not in children:
            children = dict(without_compiler(module).named_children())
        if part not in children:
            raise ValueError(
                f"module={dotted!r} names no module of {type(root).__name__}: there is no {part!r} among "
                f"{', '.join(sorted(children)) or 'no submodules'}."
            )
        module = children[part]
    return module


def named_layers(target: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the target's modules in registration order, without metrics and what is below them.

    Args:
        target: The module to walk.
        prefix: What the names begin with; empty or ending in a dot.
    """
    metrics: set[nn.Module] = set()
    for name, layer in target.named_modules(prefix=prefix.rstrip(".")):
        if _is_metric(layer):
            metrics.update(layer.modules())
        elif layer not in metrics:
            yield name, layer


def _is_metric(layer: nn.Module) -> bool:
    return any(base.__name__ == "Metric" and "torchmetrics" in base.__module__ for base in type(layer).__mro__)


def select_weights(
    target: nn.Module,
    prefix: str = "",
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
) -> Selection:
    """Select the weights that pruning acts on.

    By default these are the matrices and kernels of Linear, Conv1D, Bilinear, Conv, ConvTranspose, MultiheadAttention
    and RNN layers (and of their subclasses) and of experts, except the last Linear/Conv in registration order. Norms,
    biases, embeddings and a user's own parameters are left alone unless ``include`` names them. A shared parameter is
    taken once, under its first name.

    Args:
        target: The module whose parameters are walked.
        prefix: What ``target``'s names begin with in the ``state_dict()`` of the LightningModule.
        include: Patterns of exactly what is selected, instead of the default (see
            :func:`~lightning_optim.patterns.matches`).
        exclude: Patterns of what is left out; they win.

    Returns:
        The selection; ``chosen`` may be empty.

    Raises:
        ValueError: If a pattern of ``include`` or ``exclude`` matches nothing.
    """
    selector = Selector(include, exclude, prefix)
    chosen: dict[str, Weight] = {}
    left_out: dict[str, str] = {}
    seen: dict[int, str] = {}
    last = _last_layer(target)
    for name, layer, parameter in _named_weights(target, prefix):
        if id(parameter) in seen:
            left_out[name] = f"shared with {seen[id(parameter)]}"
            continue
        seen[id(parameter)] = name
        reason = selector.judge(name, layer).reason
        if reason is None and include is None:
            reason = _default_reason(name, layer, layer is last)
        if reason is not None:
            left_out[name] = reason
        elif not isinstance(parameter, nn.Parameter):
            left_out[name] = COMPUTED
        else:
            chosen[name] = Weight(name, layer, parameter)
    selector.check_all_matched(name for name in (*chosen, *left_out) if "weight" in name)
    return Selection(chosen, left_out)


def is_computed(layer: nn.Module) -> bool:
    """Tell whether a layer's weight is computed from other parameters at each forward pass."""
    return bool(_computed(layer))


def _computed(layer: nn.Module) -> set[str]:
    """Return the tensors that a parametrization, or the hooks of weight_norm, spectral_norm and prune, compute."""
    if is_parametrized(layer):
        return set(layer.parametrizations)  # type: ignore[arg-type]
    sources = (name[: -len(end)] for name in layer._parameters for end in ("_g", "_v", "_orig") if name.endswith(end))
    return {
        name for name in sources if name not in layer._parameters and isinstance(getattr(layer, name, None), Tensor)
    }


def _named_weights(target: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield every parameter, and in the place of a parametrized one the tensor that is computed from it."""
    for layer_name, layer in named_layers(target, prefix):
        if isinstance(layer, nn.utils.parametrize.ParametrizationList):
            continue
        dot = f"{layer_name}." if layer_name else ""
        computed = _computed(layer)
        for leaf in sorted(computed):
            yield dot + leaf, layer, getattr(layer, leaf)
        for leaf, parameter in layer.named_parameters(recurse=False):
            if not any(leaf in (f"{name}_g", f"{name}_v", f"{name}_orig") for name in computed):
                yield dot + leaf, layer, parameter


def _last_layer(target: nn.Module) -> nn.Module | None:
    layers = [layer for _, layer in named_layers(target) if isinstance(layer, _LINEAR_AND_CONV)]
    return layers[-1] if layers else None


def _default_reason(name: str, layer: nn.Module, is_last: bool) -> str | None:
    """Return why a parameter is left out by default, None where it is selected."""
    leaf = name.rpartition(".")[2]
    if leaf in expert_weights(layer):
        return None
    if not any(isinstance(layer, classes) and leaf.startswith(start) for classes, start in _PRUNED_BY_DEFAULT):
        return f"{own_class(layer).__name__} {leaf}"
    return "last layer" if is_last else None


def averaged_copies(trainer: Any) -> list[nn.Module]:
    """Return the averaged copies of the LightningModule that the Trainer's callbacks keep.

    WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging keep theirs as ``_average_model`` (Lightning
    2.6); what changes in the model must change there too.
    """
    copies = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
    return [getattr(copy, "module", copy) for copy in copies if isinstance(copy, nn.Module)]


class catch_forward_inputs:
    """Catch what a module's ``forward`` receives while other code runs.

    Used around a LightningModule's own step. When ``module`` itself is not called (a step that calls
    ``self.net(x)``), the one module directly called inside the block is caught instead.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with catch_forward_inputs(net) as caught:
        ...     _ = net(torch.zeros(4, 2))
        >>> caught.calls[0][1].args[0].shape
        torch.Size([4, 2])
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[nn.Module, ForwardInputs]] = []
        self._module = module
        self._depth = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "catch_forward_inputs":
        for name, layer in named_layers(self._module):
            if is_inside_compiled(name):  # inside a compiled module, where a hook would be traced
                continue
            self._handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_redirected(layer):
            return
        if self._depth == 0:
            self.calls.append((layer, detached(ForwardInputs(args, kwargs))))
        self._depth += 1

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)

    def result(self) -> tuple[nn.Module, ForwardInputs]:
        """Return the module that was called and its inputs.

        Raises:
            ValueError: If nothing was called, or several modules were and none of them is the target.
        """
        own = [call for call in self.calls if call[0] is self._module]
        called = {id(layer): layer for layer, _ in self.calls if any(True for _ in layer.parameters())}
        if own:
            return own[0]
        if len(called) == 1:
            layer = next(iter(called.values()))
            return next(call for call in self.calls if call[0] is layer)
        names = [type(layer).__name__ for layer in called.values()]
        raise ValueError(
            f"the training step calls {', '.join(names) or 'no module with parameters'} and never "
            f"{type(self._module).__name__}'s own forward, so what is deployed cannot be told. Pass `example_inputs` "
            "for the LightningModule's forward (or set its `example_input_array`)."
        )


def is_redirected(layer: nn.Module) -> bool:
    """DDP calls a LightningModule's step through its ``forward``, which Lightning patches for that one call."""
    return getattr(layer.__dict__.get("forward"), "__qualname__", "").startswith("_ForwardRedirection")


def detached(inputs: ForwardInputs) -> ForwardInputs:
    """Return the inputs with every tensor detached and cloned, so that training cannot change them."""
    return map_inputs(lambda tensor: tensor.detach().clone(), inputs)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: ForwardInputs) -> ForwardInputs:
    """Apply a function to every tensor in the inputs, in tuples, dicts and dataclasses too."""
    args, kwargs = apply_to_collection((inputs.args, inputs.kwargs or {}), Tensor, function)
    return ForwardInputs(args, kwargs, tuple(map_inputs(function, each) for each in inputs.further))


def as_forward_inputs(example_inputs: Any) -> ForwardInputs:
    """Read example inputs as Lightning reads ``example_input_array``: a tensor, a tuple, or a dict of keywords."""
    if isinstance(example_inputs, ForwardInputs):
        return example_inputs
    if isinstance(example_inputs, Mapping):  # a tokenizer's BatchEncoding too
        return ForwardInputs((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return ForwardInputs(tuple(example_inputs))
    return ForwardInputs((example_inputs,))


def as_forward_calls(example_inputs: Any) -> ForwardInputs:
    """Read example inputs of one call as :func:`as_forward_inputs` does, or a list of those of several calls.

    Raises:
        ValueError: If the list is empty.
    """
    if not isinstance(example_inputs, list):
        return as_forward_inputs(example_inputs)
    if not example_inputs:
        raise ValueError("`example_inputs` must hold the inputs of one call or more, got an empty list.")
    first, *further = (as_forward_inputs(each) for each in example_inputs)
    return ForwardInputs(first.args, first.kwargs, tuple(further))


def batch_inputs(module: nn.Module, batch: Any) -> ForwardInputs:
    """Return what a module's ``forward`` takes of a batch, where no step is at hand that says it.

    A tensor as it is, a dict as keywords, and of a tuple or list as many leading items as forward has required
    arguments (at least one): ``(images, labels)`` gives ``images`` to ``forward(self, images)``.
    """
    if not isinstance(batch, (tuple, list)):
        return as_forward_inputs(batch)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    required = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    return ForwardInputs(tuple(batch[: max(required, 1)]))


def first_rows(inputs: ForwardInputs, rows: int) -> ForwardInputs:
    """Cut (or repeat) the batch in ``inputs`` to a number of rows.

    Args:
        inputs: Caught inputs; all their tensors share dimension 0, the batch.
        rows: Rows wanted; when the batch has fewer they are repeated.

    Raises:
        ValueError: If the tensors have different sizes in dimension 0, so the batch size is ambiguous.
    """
    tensors: list[Tensor] = []
    map_inputs(lambda tensor: tensors.append(tensor) or tensor, inputs)  # type: ignore[func-returns-value]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim}
    if len(sizes) > 1:
        raise ValueError(
            f"the inputs of forward have {sorted(sizes)} rows in dimension 0, so one sample cannot be cut from the "
            "batch. Pass `example_inputs`: what forward receives, as it is to be called."
        )

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        index = torch.arange(rows, device=tensor.device) % tensor.shape[0]
        return tensor.index_select(0, index)

    return map_inputs(cut, inputs)


def move_inputs(inputs: ForwardInputs, device: torch.device) -> ForwardInputs:
    """Return the inputs on another device."""
    return map_inputs(lambda tensor: tensor.to(device), inputs)
