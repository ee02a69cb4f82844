"""What follows each convolution, read from the graph of ``torch.export``, which is used for nothing else.

An engine runs an integer convolution only if its output is quantized too. The output is quantized by those that read
it, quantized layers and functions with rounded operands, or, if something else reads it, by a quantizer of its own.
Which of the two, and which BatchNorm and ReLU come in between, only the graph tells.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim._upstream import BatchNorm as _BatchNorm
from lightning_optim._upstream import OpOverload
from lightning_optim.errors import FAILURES
from lightning_optim.modules import copy_module, without_fast_path
from lightning_optim.outputs import output_tensors
from lightning_optim.quantization.failures import export_failure, quiet_export
from lightning_optim.quantization.functions import FunctionCalls, can_hold
from lightning_optim.quantization.integers import Readers, integer_functions
from lightning_optim.target import ForwardInputs

__all__ = ["GraphFacts", "read_graph"]

_CONVOLUTION = tuple(f"aten::conv{kind}{size}d" for kind in ("", "_transpose") for size in (1, 2, 3))
_BATCH_NORM, _RELU = "aten::batch_norm", "aten::relu"
_LINEAR, _MARK = "aten::linear", "lightning_optim::named"


@torch.library.custom_op("lightning_optim::named", mutates_args=())
def _named(x: Tensor, function: str) -> Tensor:
    """Return a copy: stands in a graph behind a function that has a name."""
    return x.clone()


@_named.register_fake
def _(x: Tensor, function: str) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class GraphFacts:
    """What follows the convolutions of a graph.

    Attributes:
        batch_norms: Convolution or Linear -> the BatchNorm that is the only reader of its output, by names below the
            module. A layer or BatchNorm that is called more than once is not included.
        outputs: Layer whose output needs a quantizer of its own (a convolution, or its BatchNorm) -> True if it is
            followed by one ReLU only: the quantizer then comes after the ReLU, and its range begins at 0.
        functions: Module -> the functions that its forward calls and whose operands are integers, by the names of
            :mod:`lightning_optim.quantization.functions`.
        function_calls: The same modules -> how many functions with a name their forward calls.
        returned: Convolutions whose output is only returned, so that nothing rounds it.
    """

    batch_norms: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, bool] = field(default_factory=dict)
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    function_calls: dict[str, int] = field(default_factory=dict)
    returned: frozenset[str] = frozenset()


def read_graph(
    module: nn.Module, inputs: ForwardInputs, products: Collection[str], readers: Collection[str]
) -> GraphFacts:
    """Read what follows each convolution.

    Args:
        module: The module. It is not changed: a float copy of it in eval mode is exported.
        inputs: Arguments of its forward.
        products: Names of the convolutions and Linear layers whose weight and input are quantized.
        readers: Names of all layers whose input is quantized.

    Raises:
        ValueError: If ``torch.export`` cannot export the module.
    """
    if not products:
        return GraphFacts()
    nodes, function_calls = _exported_nodes(module, inputs)
    _use_first_names(module, nodes)
    calls = Counter(_layer_of(node) for node in nodes if _operator(node) in (*_CONVOLUTION, _LINEAR, _BATCH_NORM))
    batch_norms: dict[str, str] = {}
    last: dict[Any, Any] = {}
    for node in nodes:
        name = _layer_of(node)
        if _operator(node) not in (*_CONVOLUTION, _LINEAR) or name not in products:
            continue
        last[node] = node
        follower = _only_user(node, _BATCH_NORM)
        if follower is not None and _folds(module, node, follower, calls):
            batch_norms[name], last[node] = _layer_of(follower), follower
    flat = {node: made for node, made in last.items() if _operator(node) in _CONVOLUTION or _is_matrix(node)}
    rounding = Readers(nodes, readers, calls, {made: _layer_of(made) for made in flat.values()})
    functions = integer_functions(rounding, function_calls)
    relus: dict[str, bool] = {}
    elsewhere: set[str] = set()
    returned: set[str] = set()
    for node, made in last.items():
        if _operator(node) not in _CONVOLUTION:
            continue
        relu = _only_user(made, _RELU)
        place = _layer_of(made)
        relus[place] = relu is not None and relus.get(place, True)  # if a layer is called twice: after both calls
        if rounding.is_returned(made):
            returned.add(_layer_of(node))
        if rounding.is_read_elsewhere(made):
            elsewhere.add(place)
    return GraphFacts(
        batch_norms,
        {place: relu for place, relu in relus.items() if place in elsewhere},
        functions,
        {owner: function_calls[owner] for owner in functions},
        frozenset(returned),
    )


class _Naming(FunctionCalls):
    """Writes the names of functions into a graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # torch.export calls proxies of the modules, which have their dictionaries.
        self._names = {id(vars(layer)): name for name, layer in reversed(list(module.named_modules()))}
        self.calls = {name: -1 for name, layer in module.named_modules() if not can_hold(layer)}

    def call(self, frame: Any, name: str, function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        owner = self._names.get(id(vars(frame.f_locals["self"])))
        if owner is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return _named(result, f"{owner}:{name}")

    def __exit__(self, *error: Any) -> None:
        for frame, counts in self._counts.items():
            owner = self._names.get(id(vars(frame.f_locals["self"])))
            if owner is not None and self.calls.setdefault(owner, counts.total()) != counts.total():
                self.calls[owner] = -1
        super().__exit__(*error)


def _exported_nodes(module: nn.Module, inputs: ForwardInputs) -> tuple[list[Any], dict[str, int]]:
    """Return the nodes of a module's graph, and how many functions with a name each module calls in its forward.

    The number is -1 where it differs from call to call, or the module cannot hold ranges.
    """
    copy = copy_module(module, rounded=False)
    naming = _Naming(copy)

    entered = [0]

    def begin(layer: nn.Module, args: Any) -> None:
        naming.__enter__()  # type: ignore[no-untyped-call]
        entered[0] += 1

    def leave() -> None:
        entered[0] -= 1
        naming.__exit__(None, None, None)

    def end(layer: nn.Module, args: Any, output: Any) -> Any:
        leave()
        return tuple(output_tensors(output))  # the only outputs that export knows

    copy.register_forward_pre_hook(begin)
    copy.register_forward_hook(end, always_call=True)
    try:
        with quiet_export() as printed, without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.export.export(copy, inputs.args, inputs.kwargs or {}, strict=False)
    except FAILURES as error:
        raise ValueError(
            f"{export_failure(module, error, printed.getvalue())} Without the graph, it is unknown which outputs "
            "of convolutions need a range, and which BatchNorms fold into them."
        ) from error
    finally:
        while entered[0]:  # torch.export ended inside forward without calling the hook, and left a mode of its own
            leave()
    return list(program.graph.nodes), naming.calls


def _use_first_names(module: nn.Module, nodes: Sequence[Any]) -> None:
    """Attribute the calls of a layer that is registered under several names to its first name."""
    first = {id(layer): name for name, layer in module.named_modules()}
    names = {name: first[id(layer)] for name, layer in module.named_modules(remove_duplicate=False)}
    for node in nodes:
        called = _called_path(node)
        node.meta["layer"] = names.get(called, called)


def _operator(node: Any) -> str:
    """Return the operator without its overload and the underscore of an in-place one; empty for other nodes."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return ""  # Python's, such as the getitem after a pooling that returns two tensors
    return str(node.target.name()).partition(".")[0].rstrip("_")  # type: ignore[no-untyped-call]


def _layer_of(node: Any) -> str:
    """Return the first name of the innermost module whose forward creates the node."""
    return str(node.meta.get("layer", ""))


def _called_path(node: Any) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]).partition("@")[0] if stack else ""


def _only_user(node: Any, operator: str) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 and _operator(users[0]) == operator else None


def _is_matrix(node: Any) -> bool:
    return getattr(node.meta.get("val"), "ndim", 0) == 2


def _outputs_of(product: nn.Module) -> int:
    """Return the number of output channels of a convolution or Linear."""
    weight: Any = product._parameters["weight"]
    return int(getattr(product, "out_channels", len(weight)))


def _folds(module: nn.Module, node: Any, follower: Any, calls: Counter[str]) -> bool:
    layer, name = _layer_of(node), _layer_of(follower)
    norm, product = module.get_submodule(name), module.get_submodule(layer)
    return (
        isinstance(norm, _BatchNorm)
        and (_operator(node) != _LINEAR or _is_matrix(node))
        and norm.running_mean is not None
        and len(norm.running_mean) == _outputs_of(product)
        and calls[layer] == calls[name] == 1
    )
