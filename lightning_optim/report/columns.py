"""Columns of a report's tables, and the tables in a terminal and in Markdown."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_optim.export.runtimes import RUNTIMES

__all__ = [
    "ENGINES",
    "Column",
    "Row",
    "formatted",
    "is_net",
    "label_of",
    "markdown_table",
    "markdown_text",
    "parts_of",
    "terminal_table",
    "titled_parts",
    "with_values",
]

ENGINES: Mapping[str, str] = {
    "torch": "PyTorch",
    **{name: getattr(runtime, "title", name) for name, runtime in RUNTIMES.items()},
}
"""Names of engines in tables."""

Row = dict[str, Any]

ACRONYMS: Mapping[str, str] = {
    **{name: name.upper() for name in ("auc", "auroc", "bleu", "f1", "mae", "mrr", "mse", "ndcg", "rmse")},
    **{"iou": "IoU", "miou": "mIoU", "map": "mAP", "r2": "R²"},
}
_AT = re.compile(r"(?P<name>\w+)_at_(?P<place>\d+)")


def label_of(metric: str) -> str:
    """Return a metric's name as the field writes it; other names stay.

    Examples:
        >>> label_of("val_auc"), label_of("recall_at_20"), label_of("val_acc")
        ('val AUC', 'recall@20', 'val_acc')
    """
    at = _AT.fullmatch(metric)
    if at is not None:
        return f"{label_of(at['name'])}@{at['place']}"
    parts = metric.split("_")
    return " ".join(ACRONYMS.get(part, part) for part in parts) if ACRONYMS.keys() & set(parts) else metric


def formatted(value: Any, form: str) -> str:
    """Return a formatted number, a string as it is, and a dash for None."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else form.format(value)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Its key in a row.
        title: Title of the column.
        form: Format string of the value, or a function of the whole row.
        begins_part: Whether a table that is too wide for the terminal breaks before it.
        part: Title of the part of the table that begins with it; such parts are separate tables.
    """

    key: str
    title: str
    form: str | Callable[[Row], str] = "{}"
    begins_part: bool = False
    part: str = ""

    def cell(self, row: Row) -> str:
        """Return a row's value as a string; a dash without one."""
        value = row.get(self.key)
        if callable(self.form) and value is not None and not isinstance(value, str):
            return self.form(row)
        return formatted(value, "{}" if callable(self.form) else self.form)


def parts_of(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[list[Column]]:
    """Distribute columns over tables that fit into a width if possible; each begins with the first column."""

    def fits(part: Sequence[Column]) -> bool:
        return sum(_width(column, rows) for column in part) < width

    name, *others = columns
    parts = [[name]]
    for column in others:
        is_full = not fits([*parts[-1], column]) or (column.begins_part and not fits(columns))
        if is_full and len(parts[-1]) > 1:
            parts.append([name])
        parts[-1].append(column)
    return parts


def titled_parts(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Distribute columns over the parts they name; the first part has no title, each begins with the first column."""
    name, *others = columns
    parts: list[tuple[str, list[Column]]] = [("", [name])]
    for column in others:
        if column.part:
            parts.append((column.part, [name]))
        parts[-1][1].append(column)
    return [(title, part) for title, part in parts if len(part) > 1] or parts


def _width(column: Column, rows: Sequence[Row]) -> int:
    """Width of a column with frame and padding, if its title breaks between words and its cells do not."""
    return max(len(text) for text in (*column.title.split(), *map(column.cell, rows))) + 3


def with_values(columns: Sequence[Column], rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have a value in any of the columns after the first."""
    return [row for row in rows if any(row.get(column.key) is not None for column in columns[1:])]


def terminal_table(columns: Sequence[Column], rows: Sequence[Row], room: int, title: str = "") -> Table:
    """Make a terminal table; rows without a value in any column after the first are left out.

    Args:
        columns: Columns of this table.
        rows: All rows.
        room: Width of the terminal; titles break between words if they would not fit otherwise.
        title: Title above the table.
    """
    shown = with_values(columns, rows)
    table = Table(title=Text(title, style="table.title") if title else None, title_justify="left")
    is_wide = sum(max(_width(column, rows), len(column.title) + 3) for column in columns) >= room
    for place, column in enumerate(columns):
        width = _width(column, rows) - 3 if is_wide else None
        table.add_column(Text(column.title), justify="right" if place else "left", overflow="fold", width=width)
    for row, after in zip_longest(shown, shown[1:]):
        is_last_of_kind = after is not None and is_net(row) != is_net(after)
        table.add_row(*(Text(column.cell(row)) for column in columns), end_section=is_last_of_kind)
    return table


def is_net(row: Row) -> bool:
    """Whether a row belongs to a model; a baseline does not."""
    return row.get("kind") != "baseline"


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [_markdown_row(column.title for column in columns)]
    lines.append(_markdown_row("---:" if place else "---" for place in range(len(columns))))
    return lines + [_markdown_row(column.cell(row) for column in columns) for row in rows]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_text(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """Return a string on one line, with its tags escaped for Markdown."""
    return escape(" ".join(text.split("\n")).replace("\r", ""), quote=False)
