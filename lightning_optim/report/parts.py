"""Parts of a report: cards on top of a page, and sections below its main table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_optim.report.columns import Column, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Card", "Section"]


@dataclass(frozen=True)
class Card:
    """What is worth knowing first, on top of a page.

    Attributes:
        title: Of the card; the name of a row gives it that row's colour.
        facts: Pairs of a number, as text, and what it is.
    """

    title: str
    facts: Sequence[tuple[str, str]]


@dataclass
class Section:
    """A part of a report below the main table.

    Attributes:
        title: Of the section.
        text: One paragraph, may be empty.
        figures: Name (of the file), caption, figure.
        columns: Of its table; none without one.
        rows: Of its table.
        code: Text to copy, as it is.
    """

    title: str
    text: str = ""
    figures: "list[tuple[str, str, Figure]]" = field(default_factory=list)
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    code: str = ""
