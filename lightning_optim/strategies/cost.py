"""What a strategy holds on a device, on paper: functions of numbers.

A strategy is a :class:`Layout`: the devices split into ``replicate`` x ``shard`` x ``tensor``. DDP is
``Layout(replicate=n)``, FSDP ``Layout(shard=n)``, hybrid sharding ``Layout(replicate=nodes, shard=devices)``, tensor
parallelism ``Layout(tensor=n)``, 2-D ``Layout(shard=n // 4, tensor=4)``. The same formulas then hold for all of them.
:mod:`lightning_optim.strategies.traffic` says what is sent and how long a step takes. Which numbers were counted and
which come from sources: ``docs/recommend.md``.
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
    "gathered_parameters",
    "held_bytes",
    "share",
]

REACHED = 0.8
"""Share of a link's data-sheet rate that collectives reach: 360 of NVLink's 450 GB/s on an H100."""

FILLED = 0.85
"""Share of the memory that may be planned: the rest is the CUDA context (1 GB) and fragmentation (10 %)."""

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends in one call (``bucket_cap_mb``)."""

SPLIT_ACTIVATIONS = 24 / 34
"""Share of a transformer block's activations that tensor parallelism splits (Korthikanti et al. 2022, section 4)."""


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    Attributes:
        half_tflops: Dense peak in bfloat16 (float16 where it has none), in TFLOPS.
        single_tflops: Dense peak in float32 without TF32, in TFLOPS.
        node_bandwidth: Of its link within the node, one way, in GB/s.
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
"""NVIDIA's data sheets: boards with NVLink where there are such, else PCIe."""


@dataclass(frozen=True)
class Precision:
    """Bytes per number under a Trainer precision.

    Attributes:
        weight: Of a parameter as it is stored, and of its gradient and its optimizer states.
        compute: Of a weight as it is multiplied, and as a sharded strategy gathers it.
        reduce: Of a gradient as it is sent.
        cast: Of the copy of a weight that autocast makes where the strategy does not gather; 0 without autocast.
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
    """What an optimizer keeps per parameter.

    Attributes:
        tensors: States of the parameter's size.
        bytes: Of one number of them; None: as the parameter.
        switches: Options of the optimizer that add one more such tensor when they are on.
    """

    tensors: int
    bytes: float | None = None
    switches: tuple[str, ...] = ()

    def per_parameter(self, weight: int, options: Mapping[str, object] | None = None) -> float:
        """Return the bytes per parameter.

        Args:
            weight: Bytes of a parameter.
            options: The optimizer's, as in its ``param_groups``.

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
"""Class name -> what it keeps; its counters and a few bytes per tensor are left out."""


@dataclass(frozen=True)
class Model:
    """What of a model the cost depends on; all counts are parameters.

    Attributes:
        parameters: All; a shared one counts once.
        trainable: Those that have gradients.
        multiplied: Those that a forward multiplies with: all but embeddings that are looked up.
        largest_unit: Of the largest unit that a sharded strategy gathers at once.
        outside_units: In no unit: gathered with the root, for all of the step.
        units: Number of units.
        split: Share of the parameters that tensor parallelism splits, in [0, 1].
        split_layers: Number of layers that it splits.
        row_features: Numbers per token that it adds up over the devices in the forward: the outputs of layers that are
            split by inputs.
        column_features: The same in the backward: the input gradients of layers that are split by outputs.
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


@dataclass(frozen=True)
class Layout:
    """How the devices divide the work.

    Attributes:
        replicate: Groups that each hold the whole state.
        shard: Devices that share one state.
        tensor: Devices that share each split layer.
        reshard: Whether gathered weights are freed after the forward and gathered again for the backward.
        wire: Bytes of a gradient as it is sent; None: the precision's.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    reshard: bool = True
    wire: int | None = None

    @property
    def data(self) -> int:
        """Number of different batches in a step."""
        return self.replicate * self.shard

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.tensor


@dataclass(frozen=True)
class Cluster:
    """Devices and links; the rates are those reached, in GB/s.

    Attributes:
        devices: Per node.
        nodes: Number of nodes.
        node_bandwidth: Of one device within its node, one way.
        bandwidth: Of one node to the others, one way: the sum of its network cards.
        latency: Seconds per collective and doubling of the devices.
        overlap: Share of the shorter of compute and communication that hides behind the longer.
        jitter: What waiting for the slowest adds where there are several nodes.
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
        """Number of devices in all nodes."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Held:
    """Bytes on one device.

    Attributes:
        weights: Parameters as they are stored.
        gradients: Of the trainable ones.
        optimizer: Its states.
        units: Weights in the precision they are multiplied in, beside the stored ones, and what gathers and sends.
        activations: What the forward keeps for the backward; None: not counted.
    """

    weights: float
    gradients: float
    optimizer: float
    units: float
    activations: float | None = None

    @property
    def total(self) -> float:
        """The sum, without activations where they were not counted."""
        return self.weights + self.gradients + self.optimizer + self.units + (self.activations or 0.0)


def share(model: Model, tensor: int) -> float:
    """Return the share of a model that is left on each of ``tensor`` devices.

    Examples:
        >>> share(Model(100, 100, 100, 10, split=0.5), 4)  # one half is whole, the other quartered
        0.625
    """
    return 1.0 - model.split + model.split / tensor


def held_bytes(
    model: Model, layout: Layout, precision: Precision, optimizer: float = 8.0, activations: float | None = None
) -> Held:
    """Return what one device holds at the peak of a step.

    Args:
        model: The model.
        layout: The strategy.
        precision: Bytes per number.
        optimizer: Bytes per trainable parameter that the optimizer keeps; 8 for Adam in float32.
        activations: Bytes for one device's batch without tensor parallelism.

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
    )


def _unit_bytes(model: Model, layout: Layout, precision: Precision) -> float:
    """Return what a device holds beside its part of the state: gathered units, or copies that autocast makes."""
    left = share(model, layout.tensor)
    if layout.shard > 1:
        gathered = gathered_parameters(model, layout.reshard) * precision.compute
        gradient = model.largest_unit * (precision.compute + precision.reduce)  # of one unit, and as it is sent
        return left * (gathered + gradient)
    bucket = 0 if layout.wire is None else min(model.trainable, BUCKET // precision.weight) * layout.wire
    return left * model.multiplied * precision.cast + bucket


def gathered_parameters(model: Model, reshard: bool) -> int:
    """Return how many parameters are gathered at one time: the unit in use, the next one and those in no unit; or all.

    Examples:
        >>> model = Model(100, 100, 100, largest_unit=20, outside_units=10)
        >>> gathered_parameters(model, reshard=True), gathered_parameters(model, reshard=False)
        (50, 100)
    """
    if not reshard:
        return model.parameters
    return min(2 * model.largest_unit + model.outside_units, model.parameters)
