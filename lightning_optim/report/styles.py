"""How the rows of a report look: one colour and one mark per model, the same in every figure and table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_optim.report.columns import Row

__all__ = ["DARK", "INK", "KINDS", "Kind", "kind_of", "styles_of"]

INK = {"text": "#1c2024", "muted": "#59636e", "grid": "#e4e8ec", "front": "#a3acb5"}
"""Of what is no model."""


@dataclass(frozen=True)
class Kind:
    """How the rows of a kind are drawn.

    Attributes:
        colours: Of its rows, in their order.
        marker: Of a point, in matplotlib's letters.
        sign: The same mark in text.
        filled: Whether a point is.
        line: Style of a curve.
    """

    colours: tuple[str, ...]
    marker: str
    sign: str
    filled: bool = True
    line: str = "-"


_COMPRESSED = ("#0072b2", "#00876a", "#8e5aa8", "#2f8fc4", "#8c564b", "#5b6abf")

KINDS: Mapping[str, Kind] = {
    "dense": Kind(("#24292f", "#7a838c"), "s", "■"),
    "compressed": Kind(_COMPRESSED, "o", "●"),
    "pruned": Kind(_COMPRESSED, "o", "●"),
    "distilled": Kind(("#a87908", "#5f7f1f"), "P", "✚"),
    "integer": Kind(("#c2608f", "#117733", "#882255", "#848427"), "D", "◆"),
    "control": Kind(("#d55e00", "#b27b00"), "X", "✕", filled=False, line="--"),
    "baseline": Kind(("#6b7580",), "_", "-", line=":"),
}
"""Kind of a row -> its look: the model as it is, what was made of it, what it must beat, and what needs no net.

A comparison has "dense", "compressed", "control" and "baseline"; "pruned", "distilled" and "integer" tell what was made
more finely.
"""

DARK: Mapping[str, str] = {
    INK["text"]: "#e6eaee",
    INK["muted"]: "#9aa5b1",
    INK["grid"]: "#2a313a",
    INK["front"]: "#5d6873",
    "#24292f": "#f0f3f6",
    "#7a838c": "#a9b2bc",
    "#0072b2": "#4fb3f0",
    "#00876a": "#35c9a3",
    "#8e5aa8": "#c79be0",
    "#2f8fc4": "#8fd0f5",
    "#8c564b": "#d19a8d",
    "#5b6abf": "#9ba8f2",
    "#a87908": "#e3b341",
    "#5f7f1f": "#a9cc5c",
    "#c2608f": "#f08fbc",
    "#117733": "#5fca82",
    "#882255": "#d877a8",
    "#848427": "#cfcf6b",
    "#d55e00": "#ff9147",
    "#b27b00": "#f0b93a",
    "#6b7580": "#8e99a5",
}
"""Every colour on a light page -> the same on a dark one."""


def kind_of(row: Row) -> Kind:
    """Return the look of a row's kind; an unknown kind is drawn as "compressed"."""
    return KINDS.get(row.get("kind", ""), KINDS["compressed"])


def styles_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Give each row a colour, a marker and a line, as matplotlib's keywords."""
    styles: dict[str, dict[str, Any]] = {}
    used: dict[tuple[str, ...], int] = {}
    for row in rows:
        kind = kind_of(row)
        place = used.setdefault(kind.colours, 0)
        used[kind.colours] += 1
        styles[row["name"]] = {
            "color": kind.colours[place % len(kind.colours)],
            "linestyle": kind.line,
            "marker": kind.marker,
            "markerfacecolor": None if kind.filled else "none",
        }
    return styles
