"""Ranks the presets: their costs, and the reasons as sentences."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_optim.strategies.cost import (
    FILLED,
    PRECISIONS,
    SHARDED_PRECISIONS,
    Cluster,
    Held,
    Layout,
    Model,
    held_bytes,
    share,
)
from lightning_optim.strategies.presets import PRESETS
from lightning_optim.strategies.traffic import Collective, collectives, duration, efficiency, overlapped_seconds

__all__ = ["PLANS", "VARIANTS", "Question", "Row", "notes_on", "rank"]

SAME = 1.02
"""Times closer than this factor count as equal: the cost model is not more accurate."""

PLANS: Mapping[str, Callable[[Cluster, int, int], Layout]] = {
    "optim_single": lambda cluster, replicate, tensor: Layout(),
    "optim_ddp": lambda cluster, replicate, tensor: Layout(replicate=cluster.world),
    "optim_fsdp": lambda cluster, replicate, tensor: Layout(shard=cluster.world),
    "optim_zero2": lambda cluster, replicate, tensor: Layout(shard=cluster.world, reshard=False),
    "optim_hsdp": lambda cluster, replicate, tensor: Layout(replicate=replicate, shard=cluster.world // replicate),
    "optim_ddp_bf16": lambda cluster, replicate, tensor: Layout(replicate=cluster.world, wire=2),
    "optim_ddp_fp16": lambda cluster, replicate, tensor: Layout(replicate=cluster.world, wire=2),
    "optim_tp": lambda cluster, replicate, tensor: Layout(tensor=tensor),
    "optim_2d": lambda cluster, replicate, tensor: Layout(shard=cluster.world // tensor, tensor=tensor),
}
"""Preset -> its layout. At equal times the earlier preset wins: it is simpler, or changes no gradients."""

VARIANTS: Mapping[str, str] = {
    "optim_ddp_static": "optim_ddp where every parameter takes part in every step",
    "optim_ddp_notebook": "optim_ddp for notebooks",
}
"""Presets with the same figures as another one."""


@dataclass(frozen=True)
class Question:
    """What was asked, read from the arguments, the module and the devices.

    Attributes:
        model: Without tensor parallelism.
        cluster: Devices and links.
        memory: Bytes per device.
        precision: The Trainer's.
        optimizer: Bytes per trainable parameter.
        batch_size: Samples per device and step.
        tokens: Rows per device and step that a layer sees; None: not known.
        compute: Seconds of a step on one device; None: not known.
        activations: Bytes per device; None: not counted.
    """

    model: Model
    cluster: Cluster
    memory: float
    precision: str
    optimizer: float
    batch_size: int
    tokens: int | None
    compute: float | None
    activations: float | None

    @property
    def usable(self) -> float:
        """Bytes per device that a plan may use."""
        return FILLED * self.memory


@dataclass(frozen=True)
class Row:
    """One preset.

    Attributes:
        preset: Its name.
        layout: How the devices divide the work.
        model: With what tensor parallelism splits of it.
        held: Bytes on one device.
        collectives: Communication of a step.
        compute: Seconds of computation in a step; None: not known.
        hidden: Seconds of communication that overlaps with computation.
        waiting: Seconds of communication that the computation waits for.
        step_seconds: Predicted; only communication where ``compute`` is None.
        seconds_per_sample: ``step_seconds`` over the samples of all devices; rows are ranked by it.
        efficiency: Samples per second, as a fraction of the number of devices times those of one; None without
            ``compute``.
        fits: Whether ``held`` is at most 0.85 of the memory.
        reason: Why the row has its place, as a sentence.
        options: Arguments of the preset that depend on the devices.
    """

    preset: str
    layout: Layout
    model: Model
    held: Held
    collectives: tuple[Collective, ...]
    compute: float | None
    hidden: float
    waiting: float
    step_seconds: float
    seconds_per_sample: float
    efficiency: float | None
    fits: bool
    reason: str
    options: Mapping[str, int]

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(each.sent for each in self.collectives)


def rank(
    question: Question, split: Callable[[int], Model | None], replicate: int | None
) -> tuple[tuple[Row, ...], dict[str, str]]:
    """Return one row per preset, the best first, and the reasons why other presets have none.

    Args:
        question: The question.
        split: The model as tensor parallelism over that many devices splits it; None where it splits nothing.
        replicate: Groups of hybrid sharding; None for one per node.
    """
    rows, left_out = [], {}
    for name in PLANS:
        reason = _out_of_place(name, question, replicate)
        if reason is not None:
            left_out[name] = reason
            continue
        candidates = [
            _row(name, replace(question, model=model), replicate or question.cluster.nodes, tensor)
            for tensor in _tensor_sizes(name, question.cluster)
            if (model := split(tensor) if tensor > 1 else question.model) is not None
        ]
        if candidates:
            rows.append(_ranked(candidates)[0])
        else:
            left_out[name] = "no pair of layers can be split over devices of one node"
    ranked = _ranked(rows)
    return tuple(replace(row, reason=_reason(row, ranked[0], question)) for row in ranked), left_out


def _out_of_place(name: str, question: Question, replicate: int | None) -> str | None:
    """Return why a preset has no row; None if it has one."""
    cluster, precision = question.cluster, question.precision
    several, timed = cluster.world > 1, question.compute is not None
    groups = replicate or cluster.nodes
    uneven = cluster.world % groups != 0 or cluster.world // groups < 2
    single, compressed = name == "optim_single", name in ("optim_ddp_bf16", "optim_ddp_fp16")
    hybrid, tensor = name == "optim_hsdp", name in ("optim_tp", "optim_2d")
    sharded = PRESETS[name].sharded
    reasons = {
        "there is one device": not several and not single,
        "a single device cannot be compared without the time of its step": several and single and not timed,
        f"trains in {', '.join(SHARDED_PRECISIONS)}": sharded and precision not in SHARDED_PRECISIONS,
        "needs a loss scale, precision 16-mixed": name == "optim_ddp_fp16" and precision != "16-mixed",
        "float16 has the loss scale it needs and more digits": name == "optim_ddp_bf16" and precision == "16-mixed",
        "gradients are bfloat16 already": name == "optim_ddp_bf16" and precision == "bf16-true",
        "whether rounding gradients pays is unknown without the time of a step": compressed and not timed,
        f"there is one {'group' if replicate else 'node'}": hybrid and groups == 1,
        f"{cluster.world} devices cannot form {groups} groups of at least two": hybrid and uneven,
        "layers are split within a node; optim_2d uses several": name == "optim_tp" and cluster.nodes > 1,
        "the traffic of split layers is unknown: pass `tokens_per_sample` (1 if a sample is one row)": tensor
        and question.tokens is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _tensor_sizes(name: str, cluster: Cluster) -> tuple[int, ...]:
    if name == "optim_tp":
        return (cluster.devices,)
    if name == "optim_2d":
        return tuple(size for size in (2, 4, 8) if cluster.devices % size == 0 and size < cluster.world)
    return (1,)


def _row(name: str, question: Question, replicate: int, tensor: int) -> Row:
    layout = PLANS[name](question.cluster, replicate, tensor)
    cluster = question.cluster if layout.devices > 1 else replace(question.cluster, nodes=1)
    precision, model = PRECISIONS[question.precision], question.model
    held = held_bytes(model, layout, precision, question.optimizer, question.activations)
    sent = collectives(model, layout, precision, cluster, question.tokens or 1)
    hidden, waiting = (sum(each.seconds(cluster) for each in sent if each.waits is waits) for waits in (False, True))
    compute = None if question.compute is None else question.compute * share(model, tensor)
    step = overlapped_seconds(compute or 0.0, hidden, waiting, cluster)
    return Row(
        preset=name,
        layout=layout,
        model=model,
        held=held,
        collectives=sent,
        compute=compute,
        hidden=hidden,
        waiting=waiting,
        step_seconds=step,
        seconds_per_sample=step / (layout.data * question.batch_size),
        efficiency=_efficiency(question, step, layout),
        fits=held.total <= question.usable,
        reason="",
        options=_options(name, layout),
    )


def _efficiency(question: Question, step: float, layout: Layout) -> float | None:
    if question.compute is None:
        return None
    return efficiency(question.compute, step, layout.data, question.cluster.world)


def _options(name: str, layout: Layout) -> dict[str, int]:
    if name == "optim_hsdp":
        return {"replicate": layout.replicate}
    return {"tensor": layout.tensor} if layout.tensor > 1 else {}


def _ranked(rows: Iterable[Row]) -> list[Row]:
    """Sort by time per sample, at equal times the simpler first; rows that do not fit come last, by bytes."""
    order = list(PLANS)
    left = sorted(rows, key=lambda row: row.seconds_per_sample)
    too_big = sorted((row for row in left if not row.fits), key=lambda row: row.held.total)
    fitting = [row for row in left if row.fits]
    ranked = []
    while fitting:
        near = [row for row in fitting if row.seconds_per_sample <= SAME * fitting[0].seconds_per_sample]
        ranked.append(min(near, key=lambda row: order.index(row.preset)))
        fitting.remove(ranked[-1])
    return ranked + too_big


def _reason(row: Row, best: Row, question: Question) -> str:
    if not row.fits:
        parts = {"weights": row.held.weights, "gradients": row.held.gradients, "optimizer states": row.held.optimizer}
        parts |= {"units": row.held.units, "activations": row.held.activations or 0.0, "teacher": row.held.beside}
        largest = max(parts, key=lambda part: parts[part])
        return (
            f"does not fit: {row.held.total / 1e9:.3g} GB of {question.usable / 1e9:.3g}, "
            f"{parts[largest] / 1e9:.3g} of them {largest}"
        )
    return "; ".join(_words(row, best, question.cluster.world))


def _words(row: Row, best: Row, world: int) -> Iterator[str]:
    if row is best:
        yield "fits, and none is faster by more than 2 %"
    elif best.seconds_per_sample > 0:
        slower = row.seconds_per_sample / best.seconds_per_sample
        near = f"fits, {slower:.2f}x the time per sample of {best.preset}"
        yield "fits, as fast and less simple" if slower <= SAME else near
    if row.layout.devices == 1:
        if world > 1:
            yield f"takes one of {world} devices"
        return
    if row.compute is None:
        yield f"{duration(row.hidden + row.waiting)} of communication"
    elif row.hidden > row.compute:
        yield f"the links are the bottleneck: {duration(row.hidden)} against {duration(row.compute)} of computation"
    else:
        yield f"{duration(row.hidden)} of communication overlap with {duration(row.compute)} of computation"
    if row.layout.tensor > 1:
        yield f"{row.layout.tensor} devices share a batch"
    if row.waiting:
        yield f"and {duration(row.waiting)} in which the computation waits for activations"
    if row.layout.wire is not None:
        yield "gradients are rounded to 16 bits, which pays on slow links only"


def notes_on(rows: Sequence[Row], question: Question) -> Iterator[str]:
    """Yield notes on the ranking, one sentence each."""
    cluster = question.cluster
    if cluster.world == 1:
        yield "There is one device: no distributed strategy is needed."
    elif rows[0].preset == "optim_single":
        yield f"One device alone is faster than {cluster.world} that wait for each other."
    elif rows[0].fits and rows[0].efficiency is not None:
        state = held_bytes(
            question.model, Layout(), PRECISIONS[question.precision], question.optimizer, question.activations
        )
        if state.total <= question.usable:
            yield (
                f"The model fits one device: {cluster.world} are not needed, they give "
                f"{rows[0].efficiency * cluster.world:.3g} times the samples per second."
            )
    if any(row.preset == "optim_ddp" for row in rows):
        yield "Same figures as optim_ddp: " + "; ".join(f"{name}, {words}" for name, words in VARIANTS.items()) + "."
    if not rows[0].fits:
        yield "Nothing fits: more devices, a smaller batch, activation checkpointing or an optimizer with less state."
