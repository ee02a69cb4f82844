"""Communication model of the strategies: traffic and step time, as pure functions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_optim.strategies.cost import BUCKET, Cluster, Layout, Model, Precision, share

__all__ = ["MFU", "Collective", "collectives", "compute_seconds", "duration", "efficiency", "overlapped_seconds"]

MFU = 0.4
"""Fraction of the peak FLOPS that a training step reaches; Megatron reports 0.42 to 0.47 on H100."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        kind: ``"all-gather"``, ``"reduce-scatter"`` or ``"all-reduce"``.
        what: Description of the tensors.
        bytes: Size of the full tensors, summed over the calls.
        ranks: Number of ranks that take part.
        calls: Number of calls per step.
        crosses: Whether it crosses node boundaries.
        beside: Number of groups that share a node's network cards at the same time.
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
        """Bytes that each rank sends in a ring; an all-reduce takes two rounds.

        Examples:
            >>> Collective("all-reduce", "gradients", bytes=400, ranks=4).sent
            600.0
        """
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks

    def rate(self, cluster: Cluster) -> float:
        """Return the bytes per second of each ring."""
        inside = cluster.node_bandwidth * 1e9
        return min(inside, cluster.bandwidth * 1e9 / self.beside) if self.crosses else inside

    def seconds(self, cluster: Cluster) -> float:
        """Return the total time of the calls, run one after the other.

        Examples:
            >>> one_card = Cluster(devices=8, nodes=2, bandwidth=40, latency=0)
            >>> Collective("all-reduce", "gradients", bytes=32e9, ranks=16, crosses=True).seconds(one_card)  # 60 / 40
            1.5
        """
        return self.sent / self.rate(cluster) + self.calls * cluster.latency * math.log2(self.ranks)


def collectives(
    model: Model, layout: Layout, precision: Precision, cluster: Cluster, tokens: int = 1
) -> tuple[Collective, ...]:
    """Return the collectives of a step.

    Args:
        model: The model.
        layout: The strategy. Ranks that split a layer are adjacent, then those that share one copy of the state.
        precision: Bytes per value.
        cluster: The devices.
        tokens: Rows of one device's batch as the split layers receive them.

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
    # The root is gathered twice in any case: its forward pass ends inside the `training_step` that calls it.
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
    # Input gradients have the precision of the inputs; behind a norm, under autocast, that of the weights.
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
    """Return ``6 * parameters * tokens / (FLOPS * MFU)``, the time of a step's matrix products on one device.

    Args:
        parameters: Parameters in matrix products: 2 FLOPs per token in the forward pass, 4 in the backward pass.
        tokens: Tokens in one device's batch.
        tflops: Peak of the device in the compute precision.
        mfu: Fraction of the peak that is reached.

    Examples:
        >>> round(compute_seconds(8 * 10**9, 16384, 989), 2)
        1.99
    """
    return 6 * parameters * tokens / (tflops * 1e12 * mfu)


def overlapped_seconds(compute: float, hidden: float, waiting: float, cluster: Cluster) -> float:
    """Return ``max(C, M) + (1 - overlap) * min(C, M) + W``, times ``1 + jitter`` on several nodes.

    Args:
        compute: C, seconds of computation.
        hidden: M, seconds of communication that can overlap with computation.
        waiting: W, seconds of communication that the computation waits for.
        cluster: Gives overlap and jitter.

    Examples:
        >>> round(overlapped_seconds(1.99, 1.5, 0.0, Cluster(8)), 2)
        2.29
    """
    seconds = max(compute, hidden) + (1 - cluster.overlap) * min(compute, hidden) + waiting
    return seconds * (1 + cluster.jitter if cluster.nodes > 1 else 1)


def efficiency(compute: float, step: float, data: int, devices: int) -> float:
    """Return the throughput as a fraction of ``devices`` times that of one device.

    Args:
        compute: Seconds that one device takes for one batch.
        step: Seconds per step.
        data: Number of distinct batches per step.
        devices: Number of devices.

    Examples:
        >>> efficiency(1.0, 1.25, data=8, devices=8), efficiency(1.0, 0.5, data=2, devices=8)
        (0.8, 0.5)
    """
    return data * compute / (devices * step)


def duration(seconds: float) -> str:
    """Format a duration in seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
