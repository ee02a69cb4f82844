"""Inputs of a recommendation: sizes of a module, its optimizer, a device's data sheet, bytes of a forward pass."""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optim.modules import EMBEDDINGS
from lightning_optim.strategies.cost import DEVICES, OPTIMIZERS, Cluster, Model, OptimizerState
from lightning_optim.strategies.tensor import find_pairs
from lightning_optim.strategies.traffic import compute_seconds, duration
from lightning_optim.strategies.units import find_units
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows, map_inputs

__all__ = [
    "Board",
    "of_a_count",
    "optimizer_bytes",
    "read_board",
    "read_cluster",
    "read_compute",
    "read_memory",
    "read_module",
    "saved_bytes",
    "with_split",
]

ONE_CARD = 50.0
"""Default GB/s between nodes: one 400 Gb/s card, a cautious guess (a DGX H100 has eight)."""

UNITS_OF_A_COUNT = 16
"""If only a parameter count is known, the largest unit is 1/16 of it: in Llama 3.1 8B the embedding is 6.5 %."""

SPLIT_OF_A_COUNT = 0.87
"""Fraction that tensor parallelism splits, for a count: Llama 3.1 8B without embedding and head, 6.98 of 8.03 B."""

WIDTH_OVER_DEPTH = 128
"""Width over depth of a transformer, if only a count is known: 4096 / 32 in Llama 3.1 8B, 12288 / 96 in GPT-3."""


def read_module(module: nn.Module) -> Model:
    """Return the sizes of a module, without tensor parallelism.

    Raises:
        ValueError: If it has nothing to train, or a lazy layer without a shape.
    """
    parameters = list(module.parameters())
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet: run one forward pass first.")
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if not trainable:
        has = "only frozen parameters" if parameters else "no parameters"
        raise ValueError(
            f"{type(module).__name__} has {has}, so there is nothing to train. If its layers are created in "
            "`configure_model`, call that first; or pass the number of parameters."
        )
    total = sum(parameter.numel() for parameter in parameters)
    sizes = [sum(unit) for unit in _unit_sizes(module, Tensor.numel)]
    beside, gathered = _beside(module)
    return Model(
        parameters=total,
        trainable=trainable,
        multiplied=total - _looked_up(module),
        largest_unit=max(sizes, default=total),
        outside_units=total - sum(sizes) if sizes else 0,
        units=len(sizes),
        beside=beside,
        beside_gathered=gathered,
    )


def _unit_sizes(module: nn.Module, size: Callable[[Tensor], int]) -> list[list[int]]:
    """Return the sizes of the parameters of each unit, without those of units inside it."""
    taken: set[int] = set()
    sizes = []
    for _, unit in find_units(module).named:
        own = {id(parameter): size(parameter) for parameter in unit.parameters() if id(parameter) not in taken}
        taken.update(own)
        sizes.append(list(own.values()))
    return sizes


def _beside(module: nn.Module) -> tuple[int, int | None]:
    """Return the bytes of the parameters of frozen networks beside a module, and of those that are gathered at a time.

    None for the latter: they stay whole.
    """
    ask: Any = getattr(type(module), "frozen_beside", None)  # a DistillationModule's
    networks, divides = ([], False) if ask is None else ask(module)
    held = gathered = 0
    for network in networks:
        total = sum(map(_bytes_of, network.parameters()))
        held += total
        units = [sum(unit) for unit in _unit_sizes(network, _bytes_of)] if total else []
        gathered = max(gathered, min(total, 2 * max(units, default=total) + total - sum(units)))
    return held, gathered if divides else None


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _looked_up(module: nn.Module) -> int:
    """Number of parameters that are only looked up: embeddings whose weight no other layer multiplies with."""
    embeddings: dict[int, int] = {}
    others: set[int] = set()
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            if isinstance(layer, EMBEDDINGS):
                embeddings[id(parameter)] = parameter.numel()
            else:
                others.add(id(parameter))
    return sum(number for key, number in embeddings.items() if key not in others)


def of_a_count(count: int, split_share: float | None) -> Model:
    """Return a transformer with that many parameters: 12 * depth * width^2 split, six split layers per block."""
    split = SPLIT_OF_A_COUNT if split_share is None else split_share
    width = round((split * count * WIDTH_OVER_DEPTH / 12) ** (1 / 3))
    depth = max(round(width / WIDTH_OVER_DEPTH), 1)
    return Model(
        parameters=count,
        trainable=count,
        multiplied=count,
        largest_unit=math.ceil(count / UNITS_OF_A_COUNT),
        units=UNITS_OF_A_COUNT,
        split=split,
        split_layers=6 * depth,
        row_features=2 * depth * width,
        column_features=4 * depth * width,
    )


def with_split(model: Model, subject: nn.Module | int, tensor: int) -> Model | None:
    """Return the model with the part that tensor parallelism splits over ``tensor`` devices; None if it splits none."""
    if not isinstance(subject, nn.Module):
        return model
    pairs = find_pairs(subject, tensor)
    if not pairs:
        return None
    split, rows, columns = 0, 0, 0
    for name, kind in pairs.items():
        layer: Any = subject.get_submodule(name)
        column = kind == "col"  # its bias is split too
        split += sum(each.numel() for leaf, each in layer.named_parameters() if column or leaf == "weight")
        columns += layer.in_features if column else 0
        rows += 0 if column else layer.out_features
    return replace(
        model,
        split=split / model.parameters,
        split_layers=len(pairs),
        row_features=rows,
        column_features=columns,
    )


def optimizer_bytes(subject: nn.Module | int, model: Model, optimizer: Any, weight: int) -> tuple[float, str]:
    """Return the optimizer's bytes per trainable parameter, and a description of their source.

    Raises:
        ValueError: If the size of the optimizer's state is unknown, or the module does not tell its optimizer.
    """
    if optimizer is None and hasattr(subject, "configure_optimizers"):
        made = _made_by(subject)
        kept = sum(_kept_by(each, weight) for each in made) / model.trainable
        return kept, f"{', '.join(type(each).__name__ for each in made)} of configure_optimizers: {kept:.3g} B each"
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool):
        if not (math.isfinite(optimizer) and optimizer >= 0):
            raise ValueError(f"`optimizer` as a number is bytes per parameter and at least 0, got {optimizer}.")
        return float(optimizer), f"an optimizer that keeps {optimizer:.3g} B each"
    if isinstance(optimizer, Optimizer):
        kept = _kept_by(optimizer, weight) / model.trainable
        return kept, f"{type(optimizer).__name__}: {kept:.3g} B each"
    name = "Adam" if optimizer is None else optimizer if isinstance(optimizer, str) else optimizer.__name__
    kept = _state(name).per_parameter(weight)
    return kept, f"{name}{' (assumed)' if optimizer is None else ''}: {kept:.3g} B each"


def _state(name: str) -> OptimizerState:
    found = next((state for known, state in OPTIMIZERS.items() if known.casefold() == name.casefold()), None)
    if found is None:
        raise ValueError(
            f"the state of the optimizer {name!r} is unknown. Known: {', '.join(OPTIMIZERS)}. For others pass "
            "`optimizer=` as the bytes of state per parameter (8 for two float32 states)."
        )
    return found


def _kept_by(optimizer: Optimizer, weight: int) -> float:
    state = _state(type(optimizer).__name__)
    return math.fsum(
        state.per_parameter(weight, group) * parameter.numel()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    )


def _made_by(module: Any) -> list[Optimizer]:
    """Return the optimizers that a LightningModule's ``configure_optimizers`` creates."""
    try:
        made = module.configure_optimizers()
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"`configure_optimizers` of {type(module).__name__} cannot be called without a Trainer ({error}). "
            'Pass `optimizer=`: its class, its name ("Adam"), or its bytes of state per parameter.'
        ) from error
    found = list(_optimizers_in(made))
    if not found:
        raise ValueError(
            f"`configure_optimizers` of {type(module).__name__} returns no optimizer, got {made!r}. Pass `optimizer=`."
        )
    return found


def _optimizers_in(made: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(made, Optimizer):
        yield made
    elif isinstance(made, Mapping):
        yield from _optimizers_in(made.get("optimizer"))
    elif isinstance(made, (list, tuple)):
        for each in made:
            yield from _optimizers_in(each)


@dataclass(frozen=True)
class Board:
    """Data sheet of a device; None for unknown numbers."""

    half_tflops: float | None = None
    single_tflops: float | None = None
    node_bandwidth: float | None = None


def read_board(device: str | None) -> tuple[Board, str]:
    """Return the data sheet of the named device, of the local GPU, or of an H100, and a description of which.

    Raises:
        ValueError: For an unknown name.
    """
    if device is not None and device not in DEVICES:
        raise ValueError(
            f"`device` must be one of {', '.join(DEVICES)}, got {device!r}. For others pass `node_bandwidth` and "
            "`step_seconds`."
        )
    if device is None and torch.cuda.is_available():
        named = torch.cuda.get_device_name(0)
        # an "H100 PCIe" has neither NVLink nor the clocks of the board in the table
        device = next((name for name in DEVICES if name in re.split(r"[ -]", named) and "PCIe" not in named), None)
        if device is None:
            return Board(), f" ({named}, no data sheet here)"
    name = device or "H100"
    return Board(**vars(DEVICES[name])), f" ({name}{'' if device else ' assumed'})"


def read_cluster(
    devices: int, nodes: int, bandwidth: float | None, node_bandwidth: float | None, reached: float, board: Board
) -> tuple[Cluster, str]:
    """Return the devices and their links, and a description of where the numbers come from.

    Raises:
        ValueError: If the bandwidth within a node is unknown.
    """
    inside = node_bandwidth or board.node_bandwidth
    if inside is None and devices > 1:
        raise ValueError(
            "the bandwidth between the GPUs of a node is unknown: pass `node_bandwidth` in GB/s, one way (16 for "
            "PCIe 3 x16, 32 for PCIe 4, 64 for PCIe 5), or `device`."
        )
    between = bandwidth or ONE_CARD
    words = f"{inside or 0:.4g} GB/s within a node"
    if nodes > 1:
        words += f", {between:.4g} between nodes{'' if bandwidth else ' (one 400 Gb/s card assumed)'}"
    # one device per node: its only link leaves the node
    within = between if inside is None or devices == 1 else inside
    return Cluster(devices, nodes, within * reached, between * reached), f"{words}, of which {reached:.0%} are reached"


def read_memory(memory_gb: float | None) -> float:
    """Return the memory of one device in bytes: the given number, else that of the local GPU.

    Raises:
        ValueError: If there is no GPU.
    """
    if memory_gb is not None:
        return memory_gb * 1e9
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)  # initialises CUDA, as the GPU's name does
    raise ValueError("there is no local GPU whose memory could be read: pass `memory_gb`, of one device.")


def read_compute(
    model: Model,
    batch_size: int,
    tokens_per_sample: int | None,
    step_seconds: float | None,
    mfu: float,
    board: Board,
    precision: str,
) -> tuple[float | None, str]:
    """Return the seconds of a step on one device, and a description of where they come from."""
    if step_seconds is not None:
        return step_seconds, f"a step of one device takes {duration(step_seconds)}, as given"
    tflops = board.single_tflops if precision == "32-true" else board.half_tflops
    if tokens_per_sample is None or tflops is None:
        need = "`step_seconds`" if tflops is None else "`step_seconds` or `tokens_per_sample`"
        return None, f"the computation of a step is unknown, so times are those of communication alone: pass {need}"
    tokens = batch_size * tokens_per_sample
    seconds = compute_seconds(model.multiplied, tokens, tflops, mfu)
    return seconds, (
        f"a step of one device takes {duration(seconds)} = 6 * {model.multiplied:,} * {tokens:,} tokens / "
        f"({tflops:.4g} TFLOPS * {mfu:.2g})"
    )


# Activations.

_COPIES = frozenset({"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0"})


def saved_bytes(module: nn.Module, example_inputs: Any, *, batch_size: int, precision: str = "32-true") -> int:
    """Count the bytes that a forward pass saves for the backward pass.

    Runs one forward pass with gradients, on the module's device and in its mode (train or eval), and sums the tensors
    that autograd saves, each storage once. Exact for eager mode. Not included: the parameters, the copies of weights
    that autocast makes (units in the cost model), the loss (cross-entropy saves the logits once more), the inputs of
    blocks under non-reentrant checkpointing, and temporary memory of operations. The module is left as it was: buffers
    and the RNG are restored.

    Args:
        module: Its ``forward`` is called.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.
        batch_size: Rows that the inputs are cut (or repeated) to.
        precision: The Trainer's. On a CPU autocast keeps a few more operations in float32 than on a GPU.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> saved_bytes(net, torch.zeros(1, 8), batch_size=10)  # 4 B * 10 * (8 inputs + 16 outputs of the ReLU)
        960
    """
    inputs = first_rows(as_forward_inputs(example_inputs), batch_size)
    device = next(module.parameters()).device
    if precision == "bf16-true":
        module, inputs = _in_half(module, inputs)
    cast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    kept = {tensor.untyped_storage().data_ptr(): 0 for tensor in (*module.parameters(), *buffers.values())}
    held: list[Any] = []  # storages stay alive, so that no address is used twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        held.append(storage)
        kept.setdefault(storage.data_ptr(), 0 if _copies_a_parameter(tensor) else storage.nbytes())

    autocast = torch.autocast(device.type, cast) if cast else nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda _: _)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), hooks, autocast:
        torch.func.functional_call(module, buffers, inputs.args, inputs.kwargs)
    return sum(kept.values())


def _in_half(module: nn.Module, inputs: ForwardInputs) -> tuple[nn.Module, ForwardInputs]:
    """Return a copy of the module, and the inputs, in bfloat16."""
    half = copy.deepcopy(module).bfloat16()
    return half, map_inputs(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor, inputs)


def _copies_a_parameter(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter in another precision or shape, as autocast makes them."""
    node = tensor.grad_fn
    while node is not None and node.name() in _COPIES:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
