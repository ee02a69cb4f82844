"""Shows the rows of a recommendation: table cells, and the formulas with their numbers put in."""

from collections.abc import Iterator, Sequence

from lightning_optim.strategies.cost import FILLED, PRECISIONS, Cluster, divides_beside, share
from lightning_optim.strategies.ranking import Question, Row
from lightning_optim.strategies.traffic import Collective, duration

__all__ = ["cells", "columns", "formulas", "unit_of"]

_COLUMNS = ("preset", "weights", "grads", "optim", "units", "activ", "total", "sent", "step", "effic.", "fits")


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the headings of the table; a teacher has a column where there is one."""
    place = _COLUMNS.index("total")
    return (*_COLUMNS[:place], *(["teacher"] if _has_beside(rows) else []), *_COLUMNS[place:])


def _has_beside(rows: Sequence[Row]) -> bool:
    return any(row.model.beside for row in rows)


def unit_of(rows: Sequence[Row]) -> tuple[float, str]:
    """Return the unit in which the largest total has at least two digits before the point."""
    largest = max(row.held.total for row in rows)
    return next(((size, word) for size, word in ((1e9, "GB"), (1e6, "MB")) if largest >= 2 * size), (1e3, "kB"))


def cells(row: Row, unit: float) -> tuple[str, ...]:
    """Return one row of the table, a cell per column."""
    held = row.held
    beside = [held.beside] if _has_beside([row]) else []
    parts = (
        *(held.weights, held.gradients, held.optimizer, held.units, held.activations, *beside),
        *(held.total, row.sent),
    )
    return (
        row.preset,
        *("?" if part is None else f"{part / unit:.4g}" for part in parts),
        ("sends " if row.compute is None else "") + duration(row.step_seconds),
        "?" if row.efficiency is None else f"{row.efficiency:.0%}",
        "yes" if row.fits else "no",
    )


def formulas(row: Row, question: Question) -> Iterator[str]:
    """Yield the formulas of a row, with its numbers put in, line by line."""
    unit, word = unit_of([row])
    yield (
        f"{row.preset}: {row.layout.data} batches at a time, state over {row.layout.shard}, "
        f"layers over {row.layout.tensor}"
    )
    yield from _held(row, question, unit, word)
    for each in row.collectives:
        yield _sent(each, question.cluster, unit, word)
    yield from _time(row, question)


def _held(row: Row, question: Question, unit: float, word: str) -> Iterator[str]:
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
    if model.beside and divides_beside(model, layout):
        yield (
            f"  teacher: {model.beside / unit:.4g} {word} / {layout.shard} + "
            f"{(model.beside_gathered or 0) / unit:.4g} {word} gathered = {held.beside / unit:.4g} {word}"
        )
    elif model.beside:
        yield f"  teacher: {held.beside / unit:.4g} {word}, whole"
    verdict = "<=" if row.fits else ">"
    yield (
        f"  total: {held.total / unit:.4g} {word} {verdict} {FILLED} * {question.memory / unit:.4g} = "
        f"{question.usable / unit:.4g} {word}"
    )


def _sent(each: Collective, cluster: Cluster, unit: float, word: str) -> str:
    twice = "2 * " if each.kind == "all-reduce" else ""
    rate = each.rate(cluster) / 1e9
    shared = f" (shared by {each.beside})" if each.crosses and each.beside > 1 else ""
    return (
        f"  {each.kind} of {each.what}: {twice}{each.bytes / unit:.4g} {word} * {each.ranks - 1}/{each.ranks} = "
        f"{each.sent / unit:.4g} {word} at {rate:.4g} GB/s{shared} + {each.calls} * {cluster.latency * 1e6:.3g} us * "
        f"log2 {each.ranks} = {duration(each.seconds(cluster))}"
    )


def _time(row: Row, question: Question) -> Iterator[str]:
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
