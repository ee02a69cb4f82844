"""Tensor parallelism: pairs of Linear layers, the first split by outputs, the second by inputs.

Between the two, each device computes its part of the features; one all-reduce after the second restores the whole. A
column-split layer without a row-split partner would pass partial features to the rest of the model.

References:
    Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optim.checkpoint import is_layer_class
from lightning_optim.sharding import local

__all__ = ["COLUMN_NAMES", "ROW_NAMES", "checked_plan", "find_pairs", "given_pairs", "split_pairs"]

COLUMN_NAMES = (
    *("q_proj", "k_proj", "v_proj", "wq", "wk", "wv", "query", "key", "value"),
    *("gate_proj", "up_proj", "w1", "w3", "fc1", "linear1", "gate", "up"),
)
"""Names of layers whose outputs are split over the devices."""
ROW_NAMES = ("o_proj", "out_proj", "wo", "down_proj", "w2", "fc2", "linear2", "down")
"""Names of layers whose inputs are split, and whose outputs are summed."""
STYLES = ("col", "row")


def checked_plan(plan: Any) -> Any:
    """Return a plan of layer name patterns, or "auto".

    Raises:
        ValueError: If it is neither.
    """
    if plan == "auto":
        return plan
    if not isinstance(plan, Mapping) or not plan or set(plan.values()) - {"col", "row"}:
        raise ValueError(f"`tensor_plan` must be 'auto' or map layer name patterns to 'col' or 'row', got {plan!r}.")
    return dict(plan)


def split_pairs(module: nn.Module, mesh: Any, plan: Literal["auto"] | Mapping[str, str]) -> str:
    """Split pairs of Linear layers over the devices of a mesh, in place.

    Args:
        module: The whole model.
        mesh: One dimension: the devices that share a layer.
        plan: The argument ``tensor_plan`` of :class:`~lightning_optim.strategies.OptimFSDP2`.

    Returns:
        A description for the log.

    Raises:
        MisconfigurationException: If "auto" finds no pair.
        ValueError: If a given plan does not fit.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = mesh.size()
    pairs = find_pairs(module, size) if isinstance(plan, str) else given_pairs(module, plan, size)
    if not pairs:
        raise MisconfigurationException(
            f"tensor parallelism over {size} devices found no pair of Linear layers in {type(module).__name__} to "
            "split: names such as q_proj, k_proj, v_proj with o_proj, fc1 with fc2, or Linear, activation, Linear in a "
            "Sequential. Name them with OptimFSDP2(tensor_plan={'*.in': 'col', '*.out': 'row'}), or use 'optim_fsdp'."
        )
    styles = {"col": ColwiseParallel, "row": RowwiseParallel}
    for name, style in pairs.items():
        layer = module.get_submodule(name)
        parallelize_module(layer, mesh, styles[style]())
        for buffer_name, buffer in layer.named_buffers(recurse=False):  # ranges, the same on each rank
            layer._buffers[buffer_name] = local(buffer)
    split = sum(module.get_parameter(f"{name}.weight").numel() for name in pairs)
    share = split / sum(parameter.numel() for parameter in module.parameters())
    return f"{len(pairs)} layers with {share:.0%} of the parameters split by features"


def find_pairs(module: nn.Module, size: int) -> dict[str, str]:
    """Find the layers that can be split over devices without a change of the model.

    Inside one parent: layers named in :data:`COLUMN_NAMES` and one named in :data:`ROW_NAMES` that reads their outputs,
    or Linear, activation, Linear in a Sequential; never ``nn.MultiheadAttention`` or fused projections. Attention must
    infer its number of heads from the data (``view(..., -1, head_dim)``).

    Args:
        module: The whole model.
        size: Number of devices that share a layer; the split features must be a multiple.

    Returns:
        Layer name -> ``"col"`` or ``"row"``; empty if there is no pair.
    """
    plan: dict[str, str] = {}
    for name, parent in module.named_modules():
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            continue  # their fast paths and fused projections read the weights themselves
        pair = _in_sequence(parent, size) if isinstance(parent, nn.Sequential) else _by_name(parent, size)
        plan |= {f"{name}.{child}".lstrip("."): style for child, style in pair.items()}
    return plan


def _by_name(parent: nn.Module, size: int) -> dict[str, str]:
    linear = {name: child for name, child in parent.named_children() if _is_linear(child)}
    columns = [name for name in linear if name in COLUMN_NAMES]
    rows = [name for name in linear if name in ROW_NAMES]
    if not columns or len(rows) != 1:
        return {}
    row = linear[rows[0]]
    produced = {linear[name].out_features for name in columns}
    divisible = all(features % size == 0 for features in {*produced, row.in_features})
    if not divisible or row.in_features not in produced:
        return {}
    return {**dict.fromkeys(columns, "col"), rows[0]: "row"}


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes as torch's Linear, rounded or not; a subclass may do otherwise."""
    return type(layer) is nn.Linear or (isinstance(layer, nn.Linear) and is_layer_class(type(layer)))


def _in_sequence(parent: nn.Sequential, size: int) -> dict[str, str]:
    plan: dict[str, str] = {}
    children = list(parent.named_children())
    place = 0
    while place + 2 < len(children):
        (first_name, first), (_, between), (second_name, second) = children[place : place + 3]
        if _is_pair(first, between, second, size):
            plan |= {first_name: "col", second_name: "row"}
            place += 3
        else:
            place += 1
    return plan


def _is_pair(first: nn.Module, between: nn.Module, second: nn.Module, size: int) -> bool:
    if not (_is_linear(first) and _is_linear(second)) or any(True for _ in between.parameters()):
        return False
    elementwise = type(between).__module__ == "torch.nn.modules.activation" and not isinstance(
        between, _NOT_ELEMENTWISE
    )
    return elementwise and first.out_features == second.in_features and first.out_features % size == 0


_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)


def given_pairs(module: nn.Module, plan: Mapping[str, str], size: int) -> dict[str, str]:
    """Return the layers that match a plan of glob patterns.

    Args:
        module: The whole model.
        plan: Glob pattern of layer names -> ``"col"`` or ``"row"``; the first that matches counts.
        size: Number of devices that share a layer.

    Raises:
        ValueError: If a pattern matches no Linear layer, or a layer's features are no multiple of ``size``.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in plan:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(
                f"tensor_plan: {pattern!r} matches no Linear layer. Linear layers: {', '.join(linear) or 'none'}."
            )
    chosen: dict[str, str] = {}
    for name, layer in linear.items():
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style is None:
            continue
        features = layer.out_features if style == "col" else layer.in_features
        if features % size:
            raise ValueError(
                f"tensor_plan: {name} has {features} {'outputs' if style == 'col' else 'inputs'}, which is not a "
                f"multiple of the {size} devices that would share them."
            )
        chosen[name] = style
    return chosen
