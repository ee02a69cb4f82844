"""Which preset to take: memory, traffic and step time of each on paper, ranked, with the arithmetic shown."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_optim.strategies.common import SHARDED_PRECISIONS
from lightning_optim.strategies.cost import (
    FILLED,
    MFU,
    PRECISIONS,
    REACHED,
    Cluster,
    Collective,
    Held,
    Layout,
    Model,
    collectives,
    efficiency,
    held_bytes,
    overlapped_seconds,
    share,
)
from lightning_optim.strategies.presets import PRESETS
from lightning_optim.strategies.reading import (
    duration,
    of_a_count,
    optimizer_bytes,
    read_board,
    read_cluster,
    read_compute,
    read_memory,
    read_module,
    saved_bytes,
    with_split,
)
from lightning_optim.tables import by_reason, render

__all__ = ["Recommendation", "Row", "recommend", "saved_bytes"]

SAME = 1.02
"""Times nearer than this count as equal: the model is not more exact."""

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
"""Preset -> its layout. At equal times the earlier one is taken: the simpler, holding less, changing no gradient."""

VARIANTS: Mapping[str, str] = {
    "optim_ddp_static": "optim_ddp where every parameter takes part in every step",
    "optim_ddp_notebook": "optim_ddp for notebooks",
}
"""Presets of the same figures as another."""


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
        """Bytes per device that may be planned."""
        return FILLED * self.memory


@dataclass(frozen=True)
class Row:
    """One preset.

    Attributes:
        preset: Its name.
        layout: How the devices divide the work.
        model: With what tensor parallelism splits of it.
        held: Bytes on one device.
        collectives: What is sent in a step.
        compute: Seconds of computation in a step; None: not known.
        hidden: Seconds of communication beside the computation.
        waiting: Seconds of communication that the computation waits for.
        step_seconds: Predicted; only communication where ``compute`` is None.
        seconds_per_sample: What the rows are ranked by: the step over the samples of all devices in it.
        efficiency: Samples per second as a share of all devices times those of one; None where ``compute`` is None.
        fits: Whether ``held`` is at most 0.85 of the memory.
        reason: In words.
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


COLUMNS = ("preset", "weights", "grads", "optim", "units", "activ", "total", "sent", "step", "effic.", "fits")


@dataclass(frozen=True)
class Recommendation:
    """The presets, the best first; those that do not fit at the end.

    Attributes:
        rows: One per preset.
        question: What was asked.
        assumptions: Where its numbers come from, a line each.
        notes: What to know beside the table, a line each.
        left_out: Presets that have no row, and why.
    """

    rows: tuple[Row, ...]
    question: Question
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def best(self) -> Row | None:
        """The first row, None when nothing fits."""
        return self.rows[0] if self.rows[0].fits else None

    def row(self, name: str) -> Row:
        """Return the row of a preset.

        Raises:
            ValueError: If it has none; says why.
        """
        found = next((row for row in self.rows if row.preset == name), None)
        if found is None:
            why = self.left_out.get(name) or VARIANTS.get(name) or "there is no such preset"
            raise ValueError(f"no row {name!r}: {why}. Rows: {', '.join(row.preset for row in self.rows)}.")
        return found

    def strategy(self, name: str | None = None) -> Strategy:
        """Return the strategy object of the best row, or of a named preset, with its sizes set.

        Args:
            name: A preset; one that does not fit is built too.

        Raises:
            ValueError: If nothing fits and no name is given, or the name is of no row.
        """
        if name is not None and name in VARIANTS:
            return PRESETS[name].build()
        row = self.best if name is None else self.row(name)
        if row is None:
            nearest = self.rows[0]
            raise ValueError(
                f"nothing fits: {nearest.preset} is nearest and {nearest.reason}. Take more devices, a smaller batch, "
                "activation checkpointing or an optimizer with less state; strategy(name) builds one all the same."
            )
        return PRESETS[row.preset].build(**row.options)

    def table(self) -> str:
        """Return the rows as a text table."""
        unit, word = _unit(self.rows)
        title = f"{word} per device and step; {self.question.usable / 1e9:.4g} GB may be used"
        return render(title, COLUMNS, (_cells(row, unit) for row in self.rows))

    def to_markdown(self) -> str:
        """Return assumptions, table, reasons and notes as Markdown."""
        unit, word = _unit(self.rows)
        lines = [f"- {line}" for line in self.assumptions]
        lines += ["", f"Sizes in {word}.", "", f"| {' | '.join((*COLUMNS, 'why'))} |"]
        lines += [f"| {' | '.join('---' for _ in range(len(COLUMNS) + 1))} |"]
        lines += [f"| {' | '.join((*_cells(row, unit), row.reason))} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {line}" for line in self._remarks())])

    def __str__(self) -> str:
        reasons = (f"{row.preset}: {row.reason}" for row in self.rows)
        return "\n".join([*self.assumptions, "", self.table(), "", *reasons, "", *self._remarks()]).rstrip()

    def _remarks(self) -> list[str]:
        return [*self.notes, *(f"Left out: {names}: {reason}." for names, reason in by_reason(self.left_out))]

    def explain(self, name: str | None = None) -> str:
        """Return the formulas of a row with its numbers put in.

        Args:
            name: A preset; default the first row.
        """
        row = self.rows[0] if name is None else self.row(name)
        unit, word = _unit([row])
        lines = [
            f"{row.preset}: {row.layout.data} batches at a time, state over {row.layout.shard}, "
            f"layers over {row.layout.tensor}",
            *_explain_held(row, self.question, unit, word),
            *(_explain_sent(each, self.question.cluster, unit, word) for each in row.collectives),
            *_explain_time(row, self.question),
        ]
        return "\n".join(lines)


def _unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Return the unit in which the largest total has at least two digits before the point."""
    largest = max(row.held.total for row in rows)
    return next(((size, word) for size, word in ((1e9, "GB"), (1e6, "MB")) if largest >= 2 * size), (1e3, "kB"))


def _cells(row: Row, unit: float) -> tuple[str, ...]:
    held = row.held
    parts = (held.weights, held.gradients, held.optimizer, held.units, held.activations, held.total, row.sent)
    return (
        row.preset,
        *("?" if part is None else f"{part / unit:.4g}" for part in parts),
        ("sends " if row.compute is None else "") + duration(row.step_seconds),
        "?" if row.efficiency is None else f"{row.efficiency:.0%}",
        "yes" if row.fits else "no",
    )


def _explain_held(row: Row, question: Question, unit: float, word: str) -> Iterator[str]:
    precision, model, layout, held = PRECISIONS[question.precision], row.model, row.layout, row.held
    left = share(model, layout.tensor)
    split = f" * ({1 - model.split:.3g} + {model.split:.3g} / {layout.tensor})" if layout.tensor > 1 else ""
    over = f"{split} / {layout.shard}" if layout.shard > 1 else split
    for what, each, number, bytes_ in (
        ("weights", precision.weight, model.parameters, held.weights),
        ("gradients", precision.weight, model.trainable, held.gradients),
        ("optimizer", question.optimizer, model.trainable, held.optimizer),
    ):
        yield f"  {what}: {each:.3g} B * {number:,}{over} = {bytes_ / unit:.4g} {word}"
    if layout.shard > 1:
        gathered = (
            f"2 * {model.largest_unit:,} + {model.outside_units:,}" if layout.reshard else f"{model.parameters:,}"
        )
        yield (
            f"  units: ({precision.compute} B * ({gathered}) + {precision.compute + precision.reduce} B * "
            f"{model.largest_unit:,}){split} = {held.units / unit:.4g} {word}: gathered weights; one unit's gradient, "
            "and as it is sent"
        )
    elif held.units:
        yield (
            f"  units: {precision.cast} B * {model.multiplied * left:,.0f} that autocast copies"
            f"{' and one bucket' if layout.wire else ''} = {held.units / unit:.4g} {word}"
        )
    if held.activations is None:
        yield "  activations: not counted"
    else:
        yield f"  activations: {held.activations / unit:.4g} {word}"
    verdict = "<=" if row.fits else ">"
    yield (
        f"  total: {held.total / unit:.4g} {word} {verdict} {FILLED} * {question.memory / unit:.4g} = "
        f"{question.usable / unit:.4g} {word}"
    )


def _explain_sent(each: Collective, cluster: Cluster, unit: float, word: str) -> str:
    twice = "2 * " if each.kind == "all-reduce" else ""
    rate = each.rate(cluster) / 1e9
    shared = f" (shared by {each.beside})" if each.crosses and each.beside > 1 else ""
    return (
        f"  {each.kind} of {each.what}: {twice}{each.bytes / unit:.4g} {word} * {each.ranks - 1}/{each.ranks} = "
        f"{each.sent / unit:.4g} {word} at {rate:.4g} GB/s{shared} + {each.calls} * {cluster.latency * 1e6:.3g} us * "
        f"log2 {each.ranks} = {duration(each.seconds(cluster))}"
    )


def _explain_time(row: Row, question: Question) -> Iterator[str]:
    cluster = question.cluster
    names = f"M = {duration(row.hidden)}, W = {duration(row.waiting)}"
    if row.compute is None:
        yield f"  step: C is not known, communication alone is M + W: {names}"
        return
    jitter = f" * {1 + cluster.jitter}" if cluster.nodes > 1 and row.layout.devices > 1 else ""
    yield (
        f"  step: (max(C, M) + {1 - cluster.overlap:.2g} * min(C, M) + W){jitter} = {duration(row.step_seconds)} "
        f"with C = {duration(row.compute)}, {names}"
    )
    yield (
        f"  efficiency: {row.layout.data} * {duration(question.compute or 0)} / ({cluster.world} * "
        f"{duration(row.step_seconds)}) = {row.efficiency:.1%}; {duration(row.seconds_per_sample)} per sample"
    )


def recommend(
    module_or_parameter_count: nn.Module | int,
    /,
    *,
    devices: int,
    batch_size: int,
    nodes: int = 1,
    memory_gb: float | None = None,
    bandwidth: float | None = None,
    node_bandwidth: float | None = None,
    reached: float = REACHED,
    device: str | None = None,
    precision: str = "bf16-mixed",
    optimizer: Optimizer | type[Optimizer] | str | float | None = None,
    tokens_per_sample: int | None = None,
    step_seconds: float | None = None,
    mfu: float = MFU,
    activation_bytes: float | None = None,
    example_inputs: Any = None,
    replicate: int | None = None,
    split_share: float | None = None,
) -> Recommendation:
    """Rank the presets for a model and a set of devices, by arithmetic.

    Nothing is run but, with ``example_inputs``, one forward; nothing of the module is changed. The formulas, their
    sources and what they leave out stand in ``docs/recommend.md``.

    Args:
        module_or_parameter_count: The LightningModule (or any module) as it is before ``fit``, or how many parameters
            it has.
        devices: Per node, as in the Trainer.
        batch_size: Samples per device and step.
        nodes: As the Trainer's ``num_nodes``.
        memory_gb: Of one device, in 1e9 bytes; default that of the GPU here.
        bandwidth: Of one node to the others, one way, in GB/s by data sheet: the sum of its network cards. Default
            50, one card of 400 Gb/s.
        node_bandwidth: Of one device within its node, one way, in GB/s by data sheet. Default the device's.
        reached: Share of both that collectives reach. Pass 1 with bus bandwidths that were measured.
        device: A name of ``cost.DEVICES``: peak FLOPS and the default of ``node_bandwidth``. Default the GPU here,
            else an H100.
        precision: The Trainer's: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` or ``"bf16-true"``.
        optimizer: A class, an instance, a name of ``cost.OPTIMIZERS``, or the bytes it keeps per parameter. Default
            what the module's ``configure_optimizers`` makes; Adam for a count or a module that has no such method.
        tokens_per_sample: Rows of a sample that a layer sees: the sequence length. Without it (and without
            ``step_seconds``) the time of a step is not known, only that of its communication; and there are no rows of
            tensor parallelism.
        step_seconds: Of one device for ``batch_size`` samples, measured; default ``6 P tokens / (FLOPS * mfu)``.
        mfu: Share of the peak FLOPS that is reached.
        activation_bytes: What the forward of ``batch_size`` samples keeps for the backward, on one device.
        example_inputs: What ``forward`` receives; then the bytes are counted in one forward of ``batch_size`` of its
            rows, see :func:`saved_bytes`.
        replicate: Groups of ``optim_hsdp``; default one per node.
        split_share: With a count: share of the parameters that tensor parallelism splits; default 0.87.

    Returns:
        The rows, the best first; ``Trainer(strategy=recommendation.strategy())`` takes it.

    Raises:
        ValueError: If an argument is out of range or unknown, the memory or the optimizer is not known, or the module
            has nothing to train.

    Examples:
        >>> found = recommend(8_000_000_000, devices=8, memory_gb=80, batch_size=2, tokens_per_sample=8192)
        >>> found.best.preset, f"{found.best.efficiency:.0%}"
        ('optim_fsdp', '98%')
    """
    _check(devices=devices, nodes=nodes, batch_size=batch_size, tokens_per_sample=tokens_per_sample)
    _check(memory_gb=memory_gb, bandwidth=bandwidth, node_bandwidth=node_bandwidth, step_seconds=step_seconds, mfu=mfu)
    _check(reached=reached, activation_bytes=activation_bytes, replicate=replicate, split_share=split_share)
    _check_arguments(module_or_parameter_count, precision, reached, mfu, split_share, activation_bytes, example_inputs)
    subject = module_or_parameter_count
    weight = PRECISIONS[precision].weight
    model = read_module(subject) if isinstance(subject, nn.Module) else of_a_count(subject, split_share)
    kept, optimizer_words = optimizer_bytes(subject, model, optimizer, weight)
    board, board_words = read_board(device)
    cluster, link_words = read_cluster(devices, nodes, bandwidth, node_bandwidth, reached, board)
    compute, compute_words = read_compute(model, batch_size, tokens_per_sample, step_seconds, mfu, board, precision)
    if isinstance(subject, nn.Module) and example_inputs is not None:
        activation_bytes = saved_bytes(subject, example_inputs, batch_size=batch_size, precision=precision)
    question = Question(
        model=model,
        cluster=cluster,
        memory=read_memory(memory_gb),
        precision=precision,
        optimizer=kept,
        batch_size=batch_size,
        tokens=None if tokens_per_sample is None else batch_size * tokens_per_sample,
        compute=compute,
        activations=activation_bytes,
    )
    rows, left_out = _rows(question, subject, replicate)
    assumptions = (
        f"{model.parameters:,} parameters, {model.trainable:,} trainable; {optimizer_words}; {precision}; "
        f"{batch_size} samples per device and step",
        f"{nodes} x {devices} devices of {question.memory / 1e9:.4g} GB{board_words}; {link_words}",
        compute_words,
        _activation_words(activation_bytes, example_inputs),
    )
    return Recommendation(rows, question, assumptions, tuple(_notes(rows, question)), left_out)


def _check(**values: float | None) -> None:
    """Check that numbers are positive, and those that count things whole."""
    whole = ("devices", "nodes", "batch_size", "tokens_per_sample", "replicate")
    for name, value in values.items():
        if value is None and name not in ("devices", "nodes", "batch_size", "mfu", "reached"):
            continue
        kinds, words = (int, "a whole number of at least 1") if name in whole else ((int, float), "a number above 0")
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"`{name}` must be {words}, got {value!r}.")


def _check_arguments(
    subject: nn.Module | int,
    precision: str,
    reached: float,
    mfu: float,
    split_share: float | None,
    activation_bytes: float | None,
    example_inputs: Any,
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    for name, given in (("reached", reached), ("mfu", mfu), ("split_share", split_share)):
        if given is not None and given > 1:
            raise ValueError(f"`{name}` is a fraction in (0, 1], got {given}.")
    if not isinstance(subject, nn.Module):
        if isinstance(subject, bool) or not isinstance(subject, int) or subject < 1:
            raise ValueError(f"expected a module, or a number of parameters of at least 1, got {subject!r}.")
        if example_inputs is not None:
            raise ValueError("`example_inputs` needs the module; with a number of parameters pass `activation_bytes`.")
    elif split_share is not None:
        raise ValueError("`split_share` belongs to a number of parameters; of a module it is read from its layers.")
    if activation_bytes is not None and example_inputs is not None:
        raise ValueError("pass `activation_bytes` or `example_inputs`, not both.")


def _activation_words(counted: float | None, example_inputs: Any) -> str:
    if counted is None:
        return "activations are NOT counted: pass `activation_bytes`, or the module and `example_inputs`"
    how = "as given" if example_inputs is None else "counted in one forward, without the loss"
    return f"activations take {counted / 1e9:.4g} GB per device, {how}"


# The rows


def _rows(
    question: Question, subject: nn.Module | int, replicate: int | None
) -> tuple[tuple[Row, ...], dict[str, str]]:
    """Return the ranked rows, and the presets without one."""
    rows, left_out = [], {}
    for name in PLANS:
        reason = _out_of_place(name, question, replicate)
        if reason is not None:
            left_out[name] = reason
            continue
        candidates = [
            _row(name, replace(question, model=model), replicate or question.cluster.nodes, tensor)
            for tensor in _tensor_sizes(name, question.cluster)
            if (model := with_split(question.model, subject, tensor) if tensor > 1 else question.model) is not None
        ]
        if candidates:
            rows.append(_ranked(candidates)[0])
        else:
            left_out[name] = "no pair of layers can be split over devices of one node"
    ranked = _ranked(rows)
    return tuple(replace(row, reason=_reason(row, ranked[0], question)) for row in ranked), left_out


def _out_of_place(name: str, question: Question, replicate: int | None) -> str | None:
    """Return why a preset has no row, None where it has one."""
    cluster, precision = question.cluster, question.precision
    several, timed = cluster.world > 1, question.compute is not None
    groups = replicate or cluster.nodes
    uneven = cluster.world % groups != 0 or cluster.world // groups < 2
    single, compressed = name == "optim_single", name in ("optim_ddp_bf16", "optim_ddp_fp16")
    hybrid, tensor = name == "optim_hsdp", name in ("optim_tp", "optim_2d")
    sharded = PRESETS[name].sharded
    reasons = {
        "there is one device": not several and not single,
        "what one device does cannot be compared while its time for a step is not known": several
        and single
        and not timed,
        f"trains in {', '.join(SHARDED_PRECISIONS)}": sharded and precision not in SHARDED_PRECISIONS,
        "needs a loss scale, precision 16-mixed": name == "optim_ddp_fp16" and precision != "16-mixed",
        "float16 has the loss scale it needs and more digits": name == "optim_ddp_bf16" and precision == "16-mixed",
        "gradients are bfloat16 already": name == "optim_ddp_bf16" and precision == "bf16-true",
        "whether rounding gradients pays cannot be told while the time of a step is not known": compressed
        and not timed,
        f"there is one {'group' if replicate else 'node'}": hybrid and groups == 1,
        f"{cluster.world} devices make no {groups} groups of at least two": hybrid and uneven,
        "layers are split within a node; optim_2d takes several": name == "optim_tp" and cluster.nodes > 1,
        "what split layers send is not known: pass `tokens_per_sample` (1 where a sample is one row)": tensor
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
    """Sort by time per sample, the simpler first where times are equal, and what does not fit at the end by bytes."""
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
        parts |= {"units": row.held.units, "activations": row.held.activations or 0.0}
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
        yield f"sends for {duration(row.hidden + row.waiting)}"
    elif row.hidden > row.compute:
        yield f"the devices wait for the links: {duration(row.hidden)} against {duration(row.compute)} of computation"
    else:
        yield f"{duration(row.hidden)} of sending beside {duration(row.compute)} of computation"
    if row.layout.tensor > 1:
        yield f"{row.layout.tensor} devices share a batch"
    if row.waiting:
        yield f"and {duration(row.waiting)} in which the computation waits for activations"
    if row.layout.wire is not None:
        yield "gradients are rounded to 16 bits: pays on slow links only"


def _notes(rows: Sequence[Row], question: Question) -> Iterator[str]:
    cluster = question.cluster
    if cluster.world == 1:
        yield "There is one device: nothing distributed is needed."
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
