"""A report: a table with notes, figures and sections, as terminal text, Markdown and one page."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from lightning_optim.files import replace_files
from lightning_optim.report.columns import (
    Column,
    Row,
    markdown_table,
    markdown_text,
    parts_of,
    terminal_table,
    titled_parts,
    with_values,
)
from lightning_optim.report.page import page_of
from lightning_optim.report.parts import Card, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Card", "Documented", "Report", "Section", "as_json", "environment", "svg_file"]


def environment() -> str:
    """Return date, processor, threads and versions in one line."""
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    return f"{date.today()}, {_processor()}, {cores}, {platform.system()}; {versions}"


def _processor() -> str:
    """Return the processor's name and architecture, as far as the system says them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(dict.fromkeys([*named[:1], platform.machine()]))


@dataclass
class Report:
    """A table with notes and figures.

    Attributes:
        title: Of the whole.
        summary: One paragraph: what was run on what.
        columns: Of the table, in order; the first names the row.
        rows: One dict per row; ``kind`` says how it is drawn.
        notes: Sentences that say how to read the numbers.
        notes_title: Above them, on the page.
        figures: Name (of the file), caption, figure.
        sections: What follows, each under a title.
        verdict: Sentences that say it all in words; they come first.
        cards: What a page shows next.
        footer: Last line; default versions and machine.
    """

    title: str
    summary: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    figures: "list[tuple[str, str, Figure]]" = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    notes_title: str = "How to read it"
    verdict: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    footer: str = field(default_factory=environment)

    def as_rich(self, width: int) -> Group:
        """Return title, table and notes for rich, the table in parts where it is wider than that."""
        tables = [
            terminal_table(part, self.rows, width, title if place == 0 else "")
            for title, titled in titled_parts(self.columns)
            for place, part in enumerate(parts_of(titled, self.rows, width))
        ]
        verdict = [Text(sentence, style="bold") for sentence in self.verdict]
        return Group(Text(self.title, style="italic"), *verdict, *tables, *(Text(f"- {note}") for note in self.notes))

    def print(self) -> None:
        """Print table and notes to the terminal."""
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a log file has no width of its own
        console.print(self.as_rich(console.width))

    def all_figures(self) -> "list[tuple[str, str, Figure]]":
        """Return the figures of the report and of its sections."""
        return [*self.figures, *(picture for section in self.sections for picture in section.figures)]

    def write(self, folder: str | Path, others: Mapping[str, str] | None = None) -> Path:
        """Write ``report.md`` with its figures as files, and ``report.html``, which holds everything in one file.

        All contents are made before anything is written, and all files are written beside their places before any is
        moved there: what fails leaves an earlier report as it was.

        Args:
            folder: Made where it is missing.
            others: Name -> content of further files of the report.

        Returns:
            The path of the HTML file.
        """
        folder = Path(folder)
        files: dict[str, str | bytes] = {f"{name}.svg": svg_file(figure) for name, _, figure in self.all_figures()}
        files |= {**(others or {}), "report.md": self.to_markdown(), "report.html": self.to_html()}
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({folder / name: content for name, content in files.items()})
        return folder / "report.html"

    def to_markdown(self) -> str:
        """Return the report as Markdown; the figures are files beside it."""
        lines = [f"# {markdown_text(self.title)}", "", *([self.summary, ""] if self.summary else [])]
        lines += [line for sentence in self.verdict for line in (f"**{markdown_text(sentence)}**", "")]
        lines += _markdown_tables(self.columns, self.rows)
        lines += [*(f"- {note}" for note in self.notes), ""]
        lines += _markdown_figures(self.figures)
        for section in self.sections:
            lines += [f"## {section.title}", "", *([section.text, ""] if section.text else [])]
            lines += ["```yaml", section.code.rstrip(), "```", ""] if section.code else []
            lines += _markdown_figures(section.figures)
            lines += _markdown_tables(section.columns, section.rows) if section.columns else []
        return "\n".join([*lines, self.footer, ""])

    def to_html(self) -> str:
        """Return the report as one HTML page that needs no other file and runs no script."""
        return page_of(self)


class Documented:
    """A result that is shown as a report: in a terminal, as Markdown, as a page and in a notebook."""

    def as_document(self, *, figures: bool = False) -> Report:
        """Return the report, with its figures if asked for."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the tables as wide as the console is."""
        yield self.as_document().as_rich(options.max_width)

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def to_markdown(self) -> str:
        """Return tables and notes as Markdown."""
        return self.as_document().to_markdown()

    def to_html(self, path: str | Path | None = None) -> str:
        """Return one self-contained page with tables, notes and figures, and write it where a path is given.

        Raises:
            ImportError: If matplotlib is missing; the text names the extra.
        """
        page = self.as_document(figures=True).to_html()
        if path is not None:
            replace_files({Path(path): page})
        return page

    def _repr_html_(self) -> str:
        """Return the page for a notebook."""
        return f'<iframe srcdoc="{escape(self.to_html())}" style="width:100%;height:40rem;border:0"></iframe>'


def _markdown_tables(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    lines = []
    for title, part in titled_parts(columns):
        shown = with_values(part, rows) if title else list(rows)
        lines += [*([f"**{title}**", ""] if title else []), *markdown_table(part, shown), ""]
    return lines


def _markdown_figures(figures: "Sequence[tuple[str, str, Figure]]") -> list[str]:
    lines = []
    for name, caption, _ in figures:
        words = re.sub(r"([\[\]*])", r"\\\1", markdown_text(caption))
        lines += [f"![{words}]({name}.svg)", "", f"*{words}*", ""]
    return lines


def svg_file(figure: "Figure") -> bytes:
    """Return a figure as an SVG file, without the time it was made."""
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def as_json(value: Any) -> str:
    """Return plain values as JSON; numbers that are not finite are null."""
    return json.dumps(_finite(value), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
