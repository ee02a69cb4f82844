"""Tables for logs, drawn by rich, and the figure of a report that draws itself."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Listed", "Listing", "Plotted", "by_reason", "by_stack", "new_figure", "render", "size_in_words"]

SHORTEST_RUN = 3
"""Smallest number of equal rows of a stack that are merged into one."""


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as plain text.

    Args:
        title: Title above the table.
        columns: Column names.
        rows: Cells of each row, one per column.
    """
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue().rstrip()


def size_in_words(size: int) -> str:
    """Return a number of bytes with its unit.

    Examples:
        >>> size_in_words(900), size_in_words(1500), size_in_words(2_500_000)
        ('900 B', '1.5 kB', '2.50 MB')
    """
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.2f} MB"


@dataclass(frozen=True)
class Listing:
    """A table with sentences, as text and as HTML.

    Attributes:
        columns: Column names.
        rows: Cells of each row, one per column.
        title: Title above the table.
        before: Sentences above it.
        after: Sentences below it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    before: Sequence[str] = ()
    after: Sequence[str] = ()

    def __str__(self) -> str:
        table = [render(self.title, self.columns, self.rows)] if self.columns else []
        return "\n".join([*self.before, *table, *self.after])

    def as_html(self) -> str:
        """Return it for a notebook; whatever the names hold is text."""
        before, after = ("".join(f"<p>{escape(line)}</p>" for line in lines) for lines in (self.before, self.after))
        if not self.columns:
            return before + after
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in self.rows)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"{before}<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}"


class Listed:
    """A result that is shown as a table with sentences: by ``print`` and in a notebook."""

    def listing(self) -> Listing:
        """Return the table and its sentences."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.listing())

    def _repr_html_(self) -> str:
        return self.listing().as_html()


class Plotted:
    """A result that draws itself; the class says what the figure shows."""

    def plot(self, path: str | PathLike[str] | None = None) -> "Figure":
        """Draw it.

        Args:
            path: Where to write the figure, with an ending that matplotlib knows (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The figure of matplotlib.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed; the text names the extra.
        """
        figure = self._figure()
        if path is not None:
            figure.savefig(path)
        return figure

    def _figure(self) -> "Figure":
        raise NotImplementedError


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of matplotlib, which loads when one is drawn.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots are drawn by matplotlib: pip install 'lightning-optim[report]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def by_stack(rows: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Merge equal rows of consecutive blocks of a stack into one row.

    Args:
        rows: Cells of each row; the first is the dotted name of a layer or parameter. Rows are equal if all other cells
            are; names of other layers count as equal if they differ only in the same block number.

    Returns:
        The rows; a run of three or more is merged at the place of its first row. Names with several numbers (experts in
        blocks) are merged one number after the other.

    Examples:
        >>> by_stack([("blocks.0.up", "64"), ("blocks.1.up", "64"), ("blocks.2.up", "64"), ("head", "64")])
        [('blocks.0-2.up', '64'), ('head', '64')]
    """
    gathered = [tuple(row) for row in rows]
    deepest = max((row[0].count(".") for row in gathered), default=-1)
    for place in range(deepest + 1):
        gathered = _runs_at(place, gathered)
    return gathered


def _runs_at(place: int, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Merge rows whose names differ only in one component, with consecutive numbers."""
    runs: dict[tuple[Any, ...], list[list[tuple[Any, ...]]]] = {}
    ordered: list[list[tuple[Any, ...]]] = []
    for row in rows:
        parts = row[0].split(".")
        if place >= len(parts) or not parts[place].isdecimal():
            ordered.append([row])
            continue
        alike = runs.setdefault(_renamed(row, place, "*"), [])
        if alike and int(parts[place]) == int(alike[-1][-1][0].split(".")[place]) + 1:
            alike[-1].append(row)
        else:
            alike.append([row])
            ordered.append(alike[-1])
    return [row for run in ordered for row in ([_as_one(place, run)] if len(run) >= SHORTEST_RUN else run)]


def _as_one(place: int, run: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    first, last = (row[0].split(".")[place] for row in (run[0], run[-1]))
    return _renamed(run[0], place, f"{first}-{last}")


def _renamed(row: tuple[Any, ...], place: int, number: str) -> tuple[Any, ...]:
    """Replace a row's block number, in its name and in the names of other layers of its block."""
    parts = row[0].split(".")
    own, other = (".".join([*parts[:place], written]) + "." for written in (parts[place], number))
    others = [cell.replace(own, other) if isinstance(cell, str) else cell for cell in row[1:]]
    return f"{row[0]}.".replace(own, other, 1)[:-1], *others


def by_reason(left_out: Mapping[str, str], shown: int = 3) -> list[tuple[str, str]]:
    """Group names that were left out for the same reason; blocks of a stack are merged.

    Args:
        left_out: Name -> reason.
        shown: Number of names that are written out per reason.

    Returns:
        ``(names, reason)``, in order of each reason's first appearance.

    Examples:
        >>> by_reason({"a": "norm", "b": "last layer", "c": "norm", "d": "norm"}, shown=2)
        [('a, c and 1 more', 'norm'), ('b', 'last layer')]
    """
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    rows = []
    for reason, same in names.items():
        written = [name for (name,) in by_stack((name,) for name in same)]
        more = f" and {len(written) - shown} more" if len(written) > shown else ""
        rows.append((", ".join(written[:shown]) + more, reason))
    return rows
