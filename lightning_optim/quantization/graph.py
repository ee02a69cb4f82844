"""What follows each convolution, read from the graph of ``torch.export``, which is used for nothing else.

An engine runs an integer convolution only if its output is quantized too. The output is quantized by the layers that
read it, or, if something else reads it (a residual addition, a concatenation, a pooling), by a quantizer of its own.
Which of the two, and which BatchNorm and ReLU come in between, only the graph tells.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_optim._upstream import BatchNorm as _BatchNorm
from lightning_optim._upstream import OpOverload
from lightning_optim.errors import FAILURES
from lightning_optim.modules import copy_module, without_fast_path
from lightning_optim.outputs import output_tensors
from lightning_optim.quantization.failures import export_failure, quiet_export
from lightning_optim.target import ForwardInputs

__all__ = ["GraphFacts", "read_graph"]

_CONVOLUTION, _BATCH_NORM, _RELU = ("aten::conv1d", "aten::conv2d", "aten::conv3d"), "aten::batch_norm", "aten::relu"


@dataclass(frozen=True)
class GraphFacts:
    """What follows the convolutions of a graph.

    Attributes:
        batch_norms: Convolution -> the BatchNorm that is the only reader of its output, by names below the module. A
            convolution or BatchNorm that is called more than once is not included.
        outputs: Layer whose output needs a quantizer of its own (a convolution, or its BatchNorm) -> True if it is
            followed by one ReLU only: the quantizer then comes after the ReLU, and its range begins at 0.
    """

    batch_norms: dict[str, str]
    outputs: dict[str, bool]


def read_graph(
    module: nn.Module, inputs: ForwardInputs, convolutions: Collection[str], readers: Collection[str]
) -> GraphFacts:
    """Read what follows each convolution.

    Args:
        module: The module. It is not changed: a float copy of it in eval mode is exported.
        inputs: Arguments of its forward.
        convolutions: Names of the convolutions whose weight and input are quantized.
        readers: Names of all layers whose input is quantized.

    Raises:
        ValueError: If ``torch.export`` cannot export the module.
    """
    if not convolutions:
        return GraphFacts({}, {})
    nodes = _exported_nodes(module, inputs)
    _use_first_names(module, nodes)
    calls = Counter(_layer_of(node) for node in nodes if _operator(node) in (*_CONVOLUTION, _BATCH_NORM))
    batch_norms: dict[str, str] = {}
    relus: dict[str, bool] = {}
    elsewhere: set[str] = set()
    for node in nodes:
        name = _layer_of(node)
        if _operator(node) not in _CONVOLUTION or name not in convolutions:
            continue
        last = node
        follower = _only_user(node, _BATCH_NORM)
        if follower is not None and _folds(module, name, _layer_of(follower), calls):
            batch_norms[name], last = _layer_of(follower), follower
        relu = _only_user(last, _RELU)
        place = _layer_of(last)
        relus[place] = relu is not None and relus.get(place, True)  # if a layer is called twice: after both calls
        if _is_read_elsewhere(last if relu is None else relu, readers):
            elsewhere.add(place)
    return GraphFacts(batch_norms, {place: relu for place, relu in relus.items() if place in elsewhere})


def _exported_nodes(module: nn.Module, inputs: ForwardInputs) -> list[Any]:
    copy = copy_module(module, rounded=False)
    copy.register_forward_hook(
        lambda layer, args, output: tuple(output_tensors(output))
    )  # the only outputs that export knows
    try:
        with quiet_export() as printed, without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.export.export(copy, inputs.args, inputs.kwargs or {}, strict=False)
    except FAILURES as error:
        raise ValueError(
            f"{export_failure(module, error, printed.getvalue())} Without the graph, it is unknown which outputs "
            "of convolutions need a range, and which BatchNorms fold into them."
        ) from error
    return list(program.graph.nodes)


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


def _folds(module: nn.Module, convolution: str, name: str, calls: Counter[str]) -> bool:
    layer = module.get_submodule(name)
    return (
        isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and len(layer.running_mean) == module.get_submodule(convolution).out_channels
        and calls[convolution] == calls[name] == 1
    )


def _is_read_elsewhere(node: Any, readers: Collection[str]) -> bool:
    others = [user for user in node.users if _layer_of(user) not in readers]
    return bool(others) and not all(user.op == "output" for user in node.users)
