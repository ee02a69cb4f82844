"""Memory model of the strategies: bytes per device, as pure functions.

A strategy is a :class:`Layout`: the devices split into ``replicate`` x ``shard`` x ``tensor``. DDP is
``Layout(replicate=n)``, FSDP ``Layout(shard=n)``, hybrid sharding ``Layout(replicate=nodes, shard=devices)``, tensor
parallelism ``Layout(tensor=n)``, 2-D ``Layout(shard=n // 4, tensor=4)``, so the same formulas apply to all of them.
:mod:`lightning_optim.strategies.traffic` models communication and step time. ``docs/recommend.md`` tells which numbers
were measured and which come from sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "DEVICES",
    "OPTIMIZERS",
    "PRECISIONS",
    "SHARDED_PRECISIONS",
    "Cluster",
    "Device",
    "Held",
    "Layout",
    "Model",
    "OptimizerState",
    "Precision",
    "divides_beside",
    "gathered_parameters",
    "held_bytes",
    "share",
]

REACHED = 0.8
"""Fraction of a link's data-sheet rate that collectives reach: 360 of NVLink's 450 GB/s on an H100."""

FILLED = 0.85
"""Usable fraction of the memory; the rest covers the CUDA context (1 GB) and fragmentation (10 %)."""

BUCKET = 25 * 2**20
"""Bytes of gradients per all-reduce of DDP (``bucket_cap_mb``)."""

SPLIT_ACTIVATIONS = 24 / 34
"""Fraction of a transformer block's activations that tensor parallelism splits (Korthikanti et al. 2022, section 4)."""


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of a device.

    Attributes:
        half_tflops: Dense peak in bfloat16 (float16 on devices without bfloat16), in TFLOPS.
        single_tflops: Dense peak in float32 without TF32, in TFLOPS.
        node_bandwidth: One-way bandwidth of its link within the node, in GB/s.
    """

    half_tflops: float
    single_tflops: float
    node_bandwidth: float


DEVICES: Mapping[str, Device] = {
    "B200": Device(2250, 75, 900),
    "H200": Device(989, 67, 450),
    "H100": Device(989, 67, 450),
    "A100": Device(312, 19.5, 300),
    "L4": Device(121, 30.3, 32),
    "T4": Device(65, 8.1, 16),
    "V100": Device(125, 15.7, 150),
}
"""NVIDIA's data sheets; NVLink boards where they exist, else PCIe."""


@dataclass(frozen=True)
class Precision:
    """Bytes per number under a Trainer precision.

    Attributes:
        weight: A stored parameter, its gradient and each of its optimizer states.
        compute: A weight in a matrix product, and as sharded strategies gather it.
        reduce: A gradient as it is sent.
        cast: Autocast's copy of a weight, under strategies that do not gather; 0 without autocast.
    """

    weight: int
    compute: int
    reduce: int
    cast: int = 0


PRECISIONS: Mapping[str, Precision] = {
    "32-true": Precision(weight=4, compute=4, reduce=4),
    "bf16-mixed": Precision(weight=4, compute=2, reduce=4, cast=2),
    "16-mixed": Precision(weight=4, compute=2, reduce=4, cast=2),
    "bf16-true": Precision(weight=2, compute=2, reduce=2),
}

SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""The precisions that OptimFSDP2 supports."""


@dataclass(frozen=True)
class OptimizerState:
    """State that an optimizer keeps per parameter.

    Attributes:
        tensors: Number of state tensors of the parameter's shape.
        bytes: Bytes per element of these tensors; None for those of the parameter.
        switches: Options of the optimizer that each add one such tensor when set.
    """

    tensors: int
    bytes: float | None = None
    switches: tuple[str, ...] = ()

    def per_parameter(self, weight: int, options: Mapping[str, object] | None = None) -> float:
        """Return the bytes per parameter.

        Args:
            weight: Bytes per parameter.
            options: Options of the optimizer, as in its ``param_groups``.

        Examples:
            >>> OPTIMIZERS["SGD"].per_parameter(4), OPTIMIZERS["SGD"].per_parameter(4, {"momentum": 0.9})
            (0, 4)
        """
        on = sum(bool((options or {}).get(switch)) for switch in self.switches)
        return (self.tensors + on) * (weight if self.bytes is None else self.bytes)


OPTIMIZERS: Mapping[str, OptimizerState] = {
    "SGD": OptimizerState(0, switches=("momentum",)),
    "SGD_momentum": OptimizerState(1),
    "Adam": OptimizerState(2, switches=("amsgrad",)),
    "AdamW": OptimizerState(2, switches=("amsgrad",)),
    "NAdam": OptimizerState(2),
    "RAdam": OptimizerState(2),
    "Adamax": OptimizerState(2),
    "SparseAdam": OptimizerState(2),
    "Adadelta": OptimizerState(2),
    "Adagrad": OptimizerState(1),
    "RMSprop": OptimizerState(1, switches=("momentum", "centered")),
    "Rprop": OptimizerState(2),
    "ASGD": OptimizerState(1),
    "Adafactor": OptimizerState(0),  # a row and a column per matrix
    "Muon": OptimizerState(1),
    "Lion": OptimizerState(1),
    "Adam8bit": OptimizerState(2, bytes=1),  # and 4 bytes per block of 256: under .04
    "AdamW8bit": OptimizerState(2, bytes=1),
    "PagedAdam8bit": OptimizerState(2, bytes=1),
    "PagedAdamW8bit": OptimizerState(2, bytes=1),
    "Lion8bit": OptimizerState(1, bytes=1),
    "SGD8bit": OptimizerState(1, bytes=1),
}
"""Class name -> state per parameter; step counters and other per-tensor values are not counted."""


@dataclass(frozen=True)
class Model:
    """Figures of a model that determine the cost; counts are in parameters.

    Attributes:
        parameters: All parameters; shared ones count once.
        trainable: Parameters with gradients.
        multiplied: Parameters used in matrix products of the forward pass: all except embedding lookups.
        largest_unit: Size of the largest unit that a sharded strategy gathers at once.
        outside_units: Parameters in no unit; they are gathered with the root, for the whole step.
        units: Number of units.
        split: Fraction of the parameters that tensor parallelism splits, in [0, 1].
        split_layers: Number of layers that it splits.
        row_features: Values per token that are all-reduced in the forward pass: outputs of layers split by inputs.
        column_features: Values per token that are all-reduced in the backward pass: input gradients of layers split
            by outputs.
        beside: Bytes of the parameters of frozen networks beside it (a teacher), in their own precision.
        beside_gathered: Bytes of them that are gathered at a time where they are divided; None if they never are.
    """

    parameters: int
    trainable: int
    multiplied: int
    largest_unit: int
    outside_units: int = 0
    units: int = 1
    split: float = 0.0
    split_layers: int = 0
    row_features: int = 0
    column_features: int = 0
    beside: int = 0
    beside_gathered: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a strategy divides state and work among the devices.

    Attributes:
        replicate: Number of groups that each hold the full state.
        shard: Number of devices that share one copy of the state.
        tensor: Number of devices that share each split layer.
        reshard: Whether gathered weights are freed after the forward pass and gathered again for the backward pass.
        wire: Bytes per gradient as sent; None for those of the precision.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    reshard: bool = True
    wire: int | None = None

    @property
    def data(self) -> int:
        """Number of distinct batches per step."""
        return self.replicate * self.shard

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.tensor


@dataclass(frozen=True)
class Cluster:
    """Devices and links; bandwidths are achieved rates in GB/s.

    Attributes:
        devices: Devices per node.
        nodes: Number of nodes.
        node_bandwidth: One-way bandwidth of a device within its node.
        bandwidth: One-way bandwidth of a node to the others, summed over its network cards.
        latency: Seconds per collective, for each doubling of the number of ranks.
        overlap: Fraction of the shorter of computation and communication that overlaps with the longer.
        jitter: Fraction that waiting for the slowest device adds to a step on several nodes.
    """

    devices: int
    nodes: int = 1
    node_bandwidth: float = 360.0
    bandwidth: float = 40.0
    latency: float = 8e-6
    overlap: float = 0.8
    jitter: float = 0.025

    @property
    def world(self) -> int:
        """Total number of devices."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Held:
    """Bytes on one device.

    Attributes:
        weights: Stored parameters.
        gradients: Gradients of the trainable parameters.
        optimizer: Optimizer states.
        units: Weights in the compute precision, in addition to the stored ones, and communication buffers.
        activations: Activations kept for the backward pass; None if not counted.
        beside: Frozen networks beside the model (a teacher).
    """

    weights: float
    gradients: float
    optimizer: float
    units: float
    activations: float | None = None
    beside: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts; activations that were not counted add nothing."""
        return self.weights + self.gradients + self.optimizer + self.units + (self.activations or 0.0) + self.beside


def share(model: Model, tensor: int) -> float:
    """Return the fraction of a model on each of ``tensor`` devices.

    Examples:
        >>> share(Model(100, 100, 100, 10, split=0.5), 4)  # half of it replicated, half split in four
        0.625
    """
    return 1.0 - model.split + model.split / tensor


def held_bytes(
    model: Model, layout: Layout, precision: Precision, optimizer: float = 8.0, activations: float | None = None
) -> Held:
    """Return the peak memory of one device in a step.

    Args:
        model: The model.
        layout: The strategy.
        precision: Bytes per value.
        optimizer: Bytes of optimizer state per trainable parameter; 8 for Adam in float32.
        activations: Bytes of activations for one device's batch, without tensor parallelism.

    Examples:
        >>> eight_billion = Model(8 * 10**9, 8 * 10**9, 8 * 10**9, largest_unit=5 * 10**8)
        >>> held = held_bytes(eight_billion, Layout(shard=8), PRECISIONS["bf16-mixed"])
        >>> (held.weights + held.gradients + held.optimizer) / 1e9  # 16 bytes * 8e9 / 8
        16.0
    """
    left = share(model, layout.tensor) / layout.shard
    trained = left * model.trainable
    if activations is not None:
        activations *= 1 - SPLIT_ACTIVATIONS + SPLIT_ACTIVATIONS / layout.tensor if layout.tensor > 1 else 1
    return Held(
        weights=left * model.parameters * precision.weight,
        gradients=trained * precision.weight,
        optimizer=trained * optimizer,
        units=_unit_bytes(model, layout, precision),
        activations=activations,
        beside=_beside_bytes(model, layout),
    )


def _beside_bytes(model: Model, layout: Layout) -> float:
    if not divides_beside(model, layout):
        return model.beside
    return model.beside / layout.shard + (model.beside_gathered or 0)


def divides_beside(model: Model, layout: Layout) -> bool:
    """Whether a layout divides the frozen networks beside a model: where it divides the model and frees its units."""
    return model.beside_gathered is not None and layout.shard > 1 and layout.reshard


def _unit_bytes(model: Model, layout: Layout, precision: Precision) -> float:
    """Return the bytes beyond a device's part of the state: gathered units, or autocast copies and a bucket."""
    left = share(model, layout.tensor)
    if layout.shard > 1:
        gathered = gathered_parameters(model, layout.reshard) * precision.compute
        gradient = model.largest_unit * (precision.compute + precision.reduce)  # of one unit, computed and as sent
        return left * (gathered + gradient)
    bucket = 0 if layout.wire is None else min(model.trainable, BUCKET // precision.weight) * layout.wire
    return left * model.multiplied * precision.cast + bucket


def gathered_parameters(model: Model, reshard: bool) -> int:
    """Return how many parameters are gathered at once: two units and those outside units, or all without resharding.

    Examples:
        >>> model = Model(100, 100, 100, largest_unit=20, outside_units=10)
        >>> gathered_parameters(model, reshard=True), gathered_parameters(model, reshard=False)
        (50, 100)
    """
    if not reshard:
        return model.parameters
    return min(2 * model.largest_unit + model.outside_units, model.parameters)
