"""What a strategy sends in a step, and how long the step takes, on paper: functions of numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_optim.strategies.cost import BUCKET, Cluster, Layout, Model, Precision, share

__all__ = ["MFU", "Collective", "collectives", "compute_seconds", "duration", "efficiency", "overlapped_seconds"]

MFU = 0.4
"""Share of the peak FLOPS that a training step reaches: a little under the 0.42 to 0.47 of Megatron on H100."""


@dataclass(frozen=True)
class Collective:
    """The calls of one kind in a step.

    Attributes:
        kind: ``"all-gather"``, ``"reduce-scatter"`` or ``"all-reduce"``.
        what: In words.
        bytes: Of the whole tensors, summed over the calls.
        ranks: That take part.
        calls: In a step.
        crosses: Whether it leaves the node.
        beside: Groups that do the same at the same time over the same node's network cards.
        waits: Whether the computation waits for it.
    """

    kind: str
    what: str
    bytes: float
    ranks: int
    calls: int = 1
    crosses: bool = False
    beside: int = 1
    waits: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring; an all-reduce goes around twice.

        Examples:
            >>> Collective("all-reduce", "gradients", bytes=400, ranks=4).sent
            600.0
        """
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks

    def rate(self, cluster: Cluster) -> float:
        """Return the bytes per second that each of its rings reaches."""
        inside = cluster.node_bandwidth * 1e9
        return min(inside, cluster.bandwidth * 1e9 / self.beside) if self.crosses else inside

    def seconds(self, cluster: Cluster) -> float:
        """Return how long the calls take, one after the other.

        Examples:
            >>> one_card = Cluster(devices=8, nodes=2, bandwidth=40, latency=0)
            >>> Collective("all-reduce", "gradients", bytes=32e9, ranks=16, crosses=True).seconds(one_card)  # 60 / 40
            1.5
        """
        return self.sent / self.rate(cluster) + self.calls * cluster.latency * math.log2(self.ranks)


def collectives(
    model: Model, layout: Layout, precision: Precision, cluster: Cluster, tokens: int = 1
) -> tuple[Collective, ...]:
    """Return what a strategy sends in a step.

    Args:
        model: The model.
        layout: The strategy. Ranks that split a layer are neighbours, then those that share a state.
        precision: Bytes per number.
        cluster: The devices.
        tokens: In one device's batch: rows that the split layers see.

    Examples:
        >>> from lightning_optim.strategies.cost import PRECISIONS
        >>> one = Model(1, 1, 1, 1)
        >>> for each in collectives(one, Layout(shard=4), PRECISIONS["bf16-mixed"], Cluster(4)):
        ...     print(each.kind, each.bytes)
        all-gather 4.0
        reduce-scatter 4.0
    """
    found = (
        *_sharding(model, layout, precision, cluster),
        *_replicas(model, layout, precision, cluster),
        *_split_layers(model, layout, precision, tokens),
    )
    return tuple(each for each in found if each.ranks > 1)


def _sharding(model: Model, layout: Layout, precision: Precision, cluster: Cluster) -> Iterable[Collective]:
    left = share(model, layout.tensor)
    crosses = layout.shard * layout.tensor > cluster.devices
    # the root is gathered twice in any case: its forward ends inside `training_step`, which calls it
    again = model.parameters if layout.reshard else model.outside_units
    gathered = left * (model.parameters + again) * precision.compute
    calls = model.units + 1
    yield Collective(
        "all-gather",
        "weights, for the forward and again for the backward" if layout.reshard else "weights, once",
        gathered,
        layout.shard,
        2 * calls if layout.reshard else calls + 1,
        crosses,
        layout.tensor,
    )
    scattered = left * model.trainable * precision.reduce
    yield Collective("reduce-scatter", "gradients", scattered, layout.shard, calls, crosses, layout.tensor)


def _replicas(model: Model, layout: Layout, precision: Precision, cluster: Cluster) -> Iterable[Collective]:
    wire = precision.reduce if layout.wire is None else layout.wire
    numbers = share(model, layout.tensor) * model.trainable / layout.shard
    buckets = math.ceil(numbers * precision.weight / BUCKET)
    groups = layout.shard * layout.tensor
    yield Collective(
        "all-reduce",
        "gradients" if layout.shard == 1 else "sharded gradients between the groups",
        numbers * wire,
        layout.replicate,
        buckets if layout.shard == 1 else model.units + 1,
        crosses=layout.replicate * groups > cluster.devices,
        beside=min(groups, cluster.devices),
    )


def _split_layers(model: Model, layout: Layout, precision: Precision, tokens: int) -> Iterable[Collective]:
    # gradients of inputs come in the inputs' precision, which behind a norm is that of the weights under autocast
    each = model.row_features * precision.compute + model.column_features * precision.weight
    yield Collective(
        "all-reduce",
        "activations of the split layers",
        tokens * each,
        layout.tensor,
        model.split_layers,
        waits=True,
    )


def compute_seconds(parameters: int, tokens: int, tflops: float, mfu: float = MFU) -> float:
    """Return ``6 * parameters * tokens / (FLOPS * MFU)``: a step of one device that does only matrix products.

    Args:
        parameters: That each token is multiplied with; twice for the forward, four times for the backward.
        tokens: In one device's batch.
        tflops: The device's peak in the precision that is multiplied in.
        mfu: Share of it that is reached.

    Examples:
        >>> round(compute_seconds(8 * 10**9, 16384, 989), 2)
        1.99
    """
    return 6 * parameters * tokens / (tflops * 1e12 * mfu)


def overlapped_seconds(compute: float, hidden: float, waiting: float, cluster: Cluster) -> float:
    """Return ``max(C, M) + (1 - overlap) * min(C, M) + W``, and the jitter on top where there are several nodes.

    Args:
        compute: C, seconds.
        hidden: M, seconds of communication that goes on beside the computation.
        waiting: W, seconds of communication that the computation waits for.
        cluster: Overlap and jitter.

    Examples:
        >>> round(overlapped_seconds(1.99, 1.5, 0.0, Cluster(8)), 2)
        2.29
    """
    seconds = max(compute, hidden) + (1 - cluster.overlap) * min(compute, hidden) + waiting
    return seconds * (1 + cluster.jitter if cluster.nodes > 1 else 1)


def efficiency(compute: float, step: float, data: int, devices: int) -> float:
    """Return the samples per second as a share of ``devices`` times those of one device.

    Args:
        compute: Seconds of one device for one batch.
        step: Seconds of a step.
        data: Different batches in a step.
        devices: Number of devices.

    Examples:
        >>> efficiency(1.0, 1.25, data=8, devices=8), efficiency(1.0, 0.5, data=2, devices=8)
        (0.8, 0.5)
    """
    return data * compute / (devices * step)


def duration(seconds: float) -> str:
    """Return seconds or milliseconds with their unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
