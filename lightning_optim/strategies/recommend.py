"""Recommends a preset: predicted memory, traffic and step time of each, ranked, with the arithmetic shown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_optim.strategies.batch import batch_notes
from lightning_optim.strategies.cost import PRECISIONS, REACHED, Model
from lightning_optim.strategies.explain import cells, columns, formulas, unit_of
from lightning_optim.strategies.presets import PRESETS
from lightning_optim.strategies.ranking import VARIANTS, Question, Row, notes_on, rank
from lightning_optim.strategies.reading import (
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
from lightning_optim.strategies.traffic import MFU
from lightning_optim.tables import by_reason, render

__all__ = ["Recommendation", "Row", "recommend", "saved_bytes"]


@dataclass(frozen=True)
class Recommendation:
    """Ranking of the presets, best first; those that do not fit come last.

    Attributes:
        rows: One per preset.
        question: The inputs of the ranking.
        assumptions: Sources of the numbers, one line each.
        notes: Remarks on the table, one line each.
        left_out: Presets without a row -> reason.
    """

    rows: tuple[Row, ...]
    question: Question
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def best(self) -> Row | None:
        """The first row; None if no preset fits."""
        return self.rows[0] if self.rows[0].fits else None

    def row(self, name: str) -> Row:
        """Return the row of a preset.

        Raises:
            ValueError: If it has none; the message gives the reason.
        """
        found = next((row for row in self.rows if row.preset == name), None)
        if found is None:
            why = self.left_out.get(name) or VARIANTS.get(name) or "there is no such preset"
            raise ValueError(f"no row {name!r}: {why}. Rows: {', '.join(row.preset for row in self.rows)}.")
        return found

    def strategy(self, name: str | None = None) -> Strategy:
        """Build the strategy of the best row or of a named preset, with its sizes set.

        Args:
            name: A preset, whether it fits or not; default the best row.

        Raises:
            ValueError: If no preset fits and no name is given, or the name has no row.
        """
        if name is not None and name in VARIANTS:
            return PRESETS[name].build()
        row = self.best if name is None else self.row(name)
        if row is None:
            nearest = self.rows[0]
            raise ValueError(
                f"no preset fits; the closest, {nearest.preset}, {nearest.reason}. Use more devices, a smaller batch, "
                "activation checkpointing or an optimizer with less state; strategy(name) builds one regardless."
            )
        return PRESETS[row.preset].build(**row.options)

    def table(self) -> str:
        """Return the rows as a text table."""
        unit, word = unit_of(self.rows)
        title = f"{word} per device and step; {self.question.usable / 1e9:.4g} GB may be used"
        return render(title, columns(self.rows), (cells(row, unit) for row in self.rows))

    def to_markdown(self) -> str:
        """Return assumptions, table, reasons and notes in Markdown."""
        unit, word = unit_of(self.rows)
        lines = [f"- {line}" for line in self.assumptions]
        headings = (*columns(self.rows), "why")
        lines += ["", f"Sizes in {word}.", "", f"| {' | '.join(headings)} |"]
        lines += [f"| {' | '.join('---' for _ in headings)} |"]
        lines += [f"| {' | '.join((*cells(row, unit), row.reason))} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {line}" for line in self._remarks())])

    def __str__(self) -> str:
        reasons = (f"{row.preset}: {row.reason}" for row in self.rows)
        return "\n".join([*self.assumptions, "", self.table(), "", *reasons, "", *self._remarks()]).rstrip()

    def _remarks(self) -> list[str]:
        return [*self.notes, *(f"Left out: {names}: {reason}." for names, reason in by_reason(self.left_out))]

    def explain(self, name: str | None = None) -> str:
        """Return the formulas of a row with its numbers filled in.

        Args:
            name: A preset; default the first row.
        """
        row = self.rows[0] if name is None else self.row(name)
        return "\n".join(formulas(row, self.question))


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
    noise_scale: float | None = None,
) -> Recommendation:
    """Rank the presets for a model and a set of devices, from a cost model.

    Runs nothing except, with ``example_inputs``, one forward pass; the module is not modified. ``docs/recommend.md``
    gives the formulas, their sources and their limits.

    Args:
        module_or_parameter_count: The LightningModule (or any module) before ``fit``, or its number of parameters.
        devices: Devices per node, as in the Trainer.
        batch_size: Samples per device and step.
        nodes: Number of nodes, the Trainer's ``num_nodes``.
        memory_gb: Memory of one device, in units of 1e9 bytes; default that of the local GPU.
        bandwidth: One-way data-sheet bandwidth of a node to the others in GB/s, summed over its network cards. Default
            50, one card of 400 Gb/s.
        node_bandwidth: One-way data-sheet bandwidth of a device within its node in GB/s. Default that of ``device``.
        reached: Fraction of both bandwidths that collectives reach. Pass 1 with measured bus bandwidths.
        device: A name in ``cost.DEVICES``; gives the peak FLOPS and the default of ``node_bandwidth``. Default the
            local GPU, else an H100.
        precision: The Trainer's: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` or ``"bf16-true"``.
        optimizer: A class, an instance, a name in ``cost.OPTIMIZERS``, or the bytes of state per parameter. Default
            the result of the module's ``configure_optimizers``; Adam for a count or a module without that method.
        tokens_per_sample: Rows per sample that a layer receives, e.g. the sequence length. Without it (and without
            ``step_seconds``) only communication time is predicted, and tensor parallelism has no rows.
        step_seconds: Measured time of one device for ``batch_size`` samples; default
            ``6 P tokens / (FLOPS * mfu)``.
        mfu: Fraction of the peak FLOPS that is reached.
        activation_bytes: Activations that one device keeps for the backward pass of ``batch_size`` samples.
        example_inputs: Inputs of ``forward``; the activations are then counted in one forward pass of ``batch_size``
            of its rows, see :func:`saved_bytes`.
        replicate: Number of groups of ``optim_hsdp``; default one per node.
        split_share: With a parameter count: fraction that tensor parallelism splits; default 0.87.

        noise_scale: Gradient noise scale in samples, as :class:`~lightning_optim.GradientNoiseScale` measured it: the
            notes then say how large the global batch should be, and what more devices would gain.

    Returns:
        The ranking; ``Trainer(strategy=recommendation.strategy())`` uses its best row.

    Raises:
        ValueError: If an argument is out of range or unknown, the memory or the optimizer is unknown, or the module
            has no trainable parameters.

    Examples:
        >>> found = recommend(8_000_000_000, devices=8, memory_gb=80, batch_size=2, tokens_per_sample=8192)
        >>> found.best.preset, f"{found.best.efficiency:.0%}"
        ('optim_fsdp', '98%')
    """
    _check(devices=devices, nodes=nodes, batch_size=batch_size, tokens_per_sample=tokens_per_sample)
    _check(memory_gb=memory_gb, bandwidth=bandwidth, node_bandwidth=node_bandwidth, step_seconds=step_seconds, mfu=mfu)
    _check(reached=reached, activation_bytes=activation_bytes, replicate=replicate, split_share=split_share)
    _check(noise_scale=noise_scale)
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
    rows, left_out = rank(question, partial(with_split, model, subject), replicate)
    assumptions = (
        f"{model.parameters:,} parameters, {model.trainable:,} trainable; {optimizer_words}; {precision}; "
        f"{batch_size} samples per device and step",
        f"{nodes} x {devices} devices of {question.memory / 1e9:.4g} GB{board_words}; {link_words}",
        compute_words,
        _activation_words(activation_bytes, example_inputs),
        *([_beside_words(model)] if model.beside else []),
    )
    notes = list(notes_on(rows, question))
    if noise_scale is not None:
        notes += batch_notes(noise_scale, batch_size, devices * nodes)
    return Recommendation(rows, question, assumptions, tuple(notes), left_out)


def _check(**values: float | None) -> None:
    """Check that numbers are positive, and counts whole."""
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


def _beside_words(model: Model) -> str:
    how = (
        "whole on each device" if model.beside_gathered is None else "divided where the units are freed after their use"
    )
    return f"the teacher takes {model.beside / 1e9:.4g} GB, {how}; its own computation is not counted"


def _activation_words(counted: float | None, example_inputs: Any) -> str:
    if counted is None:
        return "activations are NOT counted: pass `activation_bytes`, or the module and `example_inputs`"
    how = "as given" if example_inputs is None else "counted in one forward, without the loss"
    return f"activations take {counted / 1e9:.4g} GB per device, {how}"
