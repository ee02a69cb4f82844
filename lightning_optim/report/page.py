"""A report as one HTML page: no other file, no script, for phones and desks, light and dark."""

import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Protocol

from lightning_optim.report.columns import Column, Row, titled_parts, with_values
from lightning_optim.report.parts import Card, Section
from lightning_optim.report.styles import DARK, KINDS, styles_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page_of"]


class Content(Protocol):
    """What a page is made of: a :class:`~lightning_optim.report.Report`."""

    title: str
    summary: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    notes_title: str
    figures: "list[tuple[str, str, Figure]]"
    sections: list[Section]
    verdict: list[str]
    cards: list[Card]
    footer: str


def page_of(report: Content) -> str:
    """Return the page of a report."""
    return PAGE.format(
        title=escape(report.title),
        summary=f'<p class="lead">{escape(report.summary)}</p>' if report.summary else "",
        colours=_declared(),
        marks=_marks(),
        verdict="".join(f'<p class="verdict">{escape(sentence)}</p>' for sentence in report.verdict),
        cards=_cards(report.cards, report.rows),
        tables=_tables(report.columns, report.rows),
        notes=_notes(report.notes_title, report.notes),
        figures=_figures(report.figures),
        sections="".join(map(_section, report.sections)),
        footer=escape(report.footer),
    )


# Colours: each is a variable, whose value is the scheme's.


def _variable(colour: str) -> str:
    return f"--c{colour.removeprefix('#')}"


def _declared() -> str:
    light = "".join(f"{_variable(colour)}:{colour};" for colour in DARK)
    dark = "".join(f"{_variable(colour)}:{other};" for colour, other in DARK.items())
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _marks() -> str:
    return "".join(f'tr.{name} td:first-child::before{{content:"{kind.sign}"}}' for name, kind in KINDS.items())


def _row_colour(name: str, rows: Sequence[Row]) -> str:
    style = styles_of(rows).get(name)
    return "" if style is None else f' style="--mark:var({_variable(style["color"])})"'


# Cards, tables, notes.


def _cards(cards: Sequence[Card], rows: Sequence[Row]) -> str:
    if not cards:
        return ""
    return f'<div class="cards">{"".join(_card(card, rows) for card in cards)}</div>'


def _card(card: Card, rows: Sequence[Row]) -> str:
    facts = "".join(f"<div><dt>{escape(words)}</dt><dd>{escape(number)}</dd></div>" for number, words in card.facts)
    return (
        f'<section class="card"{_row_colour(card.title, rows)}><h2>{escape(card.title)}</h2><dl>{facts}</dl></section>'
    )


def _tables(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    tables = []
    for title, part in titled_parts(columns):
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        tables.append(heading + _table(part, with_values(part, rows) if title else rows, rows))
    return "".join(tables)


def _table(columns: Sequence[Column], shown: Sequence[Row], rows: Sequence[Row] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in columns)
    colours = {row.get("name"): _row_colour(row.get("name", ""), rows) for row in rows}
    body = "".join(
        f'<tr class="{escape(row.get("kind", ""))}"{colours.get(row.get("name"), "")}>'
        + "".join(f"<td>{_cell(column.cell(row))}</td>" for column in columns)
        + "</tr>"
        for row in shown
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_RANGE = re.compile(r"(?P<number>\S+) (?P<range>\[[^\]]+\]|± \S+)(?P<same> no difference)?")


def _cell(text: str) -> str:
    """Return a cell in which the number stands out from its range."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return escape(text)
    same = f' <span class="same">{found["same"].strip()}</span>' if found["same"] else ""
    return f'{escape(found["number"])} <span class="range">{escape(found["range"])}</span>{same}'


def _notes(title: str, notes: Sequence[str]) -> str:
    if not notes:
        return ""
    points = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>{escape(title)}</h2><ul class="notes">{points}</ul>'


# Figures and sections.


def _figures(figures: "Sequence[tuple[str, str, Figure]]") -> str:
    if not figures:
        return ""
    return f'<div class="figures">{"".join(_figure(*picture) for picture in figures)}</div>'


def _figure(name: str, caption: str, figure: "Figure") -> str:
    return f"<figure>{inline_svg(name, caption, figure)}<figcaption>{escape(caption)}</figcaption></figure>"


def inline_svg(name: str, caption: str, figure: "Figure") -> str:
    """Return a figure as SVG for a page: letters are text in the page's font, colours are the scheme's.

    Args:
        name: Begins the ids within, so that figures of one page have none in common.
        caption: Read aloud instead of the figure.
        figure: What is drawn.
    """
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found[0]}{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    for colour in DARK:
        text = text.replace(colour, f"var({_variable(colour)})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    text += f"<pre>{escape(section.code)}</pre>" if section.code else ""
    table = ""
    if section.columns:
        table = f"<details><summary>All as a table</summary>{_table(section.columns, section.rows)}</details>"
        table = table if section.figures else _table(section.columns, section.rows)
    return (
        f'<section class="section"><h2>{escape(section.title)}</h2>{text}{_figures(section.figures)}{table}</section>'
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{colours}
:root {{ color-scheme: light dark; --back: #ffffff; --raised: #f6f8fa; --line: #dde2e7; --text: #1c2024;
  --quiet: #59636e; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0f1317; --raised: #171c22; --line: #2a313a; --text: #e6eaee;
  --quiet: #9aa5b1; }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 82rem; padding: 2.5rem 1.5rem 3rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 var(--font); overflow-wrap: break-word; }}
h1 {{ font-size: clamp(1.5rem, 1.2rem + 1.4vw, 2.1rem); line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .6rem; }}
h2 {{ font-size: 1.15rem; line-height: 1.3; margin: 2.25rem 0 .6rem; }}
p, ul {{ max-width: 48rem; margin: 0 0 1rem; }}
.verdict {{ font-size: 1.1rem; font-weight: 600; max-width: 60rem; }}
.lead {{ font-size: 1.05rem; color: var(--quiet); }}
.cards {{ display: grid; gap: .75rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }}
.card {{ background: var(--raised); border: 1px solid var(--line); border-top: 3px solid var(--mark, var(--line));
  border-radius: .5rem; padding: .8rem 1rem .9rem; }}
.card h2 {{ font-size: .95rem; margin: 0 0 .5rem; }}
.card dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .5rem .75rem;
  margin: 0; }}
.card div {{ display: flex; flex-direction: column-reverse; justify-content: flex-end; }}
.card dt {{ color: var(--quiet); font-size: .8rem; line-height: 1.3; }}
.card dd {{ margin: 0; font-size: 1.15rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; scrollbar-width: thin; /* a shadow at the edge where more columns follow */
  background: linear-gradient(to left, var(--back) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--quiet), transparent) right / .75rem 100% no-repeat scroll;
  margin: .75rem 0 1.25rem; border: 1px solid var(--line); border-radius: .5rem; }}
header + .scroll {{ margin-top: 1.5rem; }}
.scroll:focus-visible {{ outline: 2px solid var(--c0072b2); outline-offset: 2px; }}
table {{ border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem; line-height: 1.375rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .5rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ background: var(--raised); font-weight: 600; font-size: .82rem; line-height: 1.125rem; vertical-align: bottom;
  white-space: normal; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--back); text-align: left; }}
th:first-child {{ background: var(--raised); }}
tr:last-child td {{ border-bottom: 0; }}
tr td:first-child::before {{ color: var(--mark); display: inline-block; width: 1.25em; font-size: .85em; }}
tr.dense td:first-child {{ font-weight: 600; }}
tr.control td:first-child, tr.baseline td:first-child {{ font-style: italic; }}
tr.baseline td {{ color: var(--quiet); }}
tr:not(.baseline) + tr.baseline td {{ border-top: 2px solid var(--line); }}
.range, .same {{ color: var(--quiet); font-size: .88em; line-height: 1; }}
.same {{ display: block; font-style: italic; line-height: 1rem; }}
.notes {{ padding-left: 1.2rem; font-size: .92rem; }}
.notes li {{ margin-bottom: .35rem; }}
.figures {{ display: grid; gap: 2rem 2.5rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }}
figure {{ margin: 0; max-width: 42rem; }}
figure svg {{ display: block; width: 100%; height: auto; }}
.section figure {{ display: flex; flex-direction: column-reverse; justify-content: flex-end; }}
.section figcaption {{ margin: 0 0 .4rem; }}
figcaption {{ color: var(--quiet); font-size: .9rem; line-height: 1.45; margin-top: .4rem; }}
pre {{ overflow-x: auto; padding: .8rem 1rem; background: var(--raised); border: 1px solid var(--line);
  border-radius: .5rem; font-size: .85rem; user-select: all; }}
details {{ margin: 1rem 0; }}
summary {{ cursor: pointer; color: var(--quiet); font-size: .92rem; }}
footer {{ margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--quiet);
  font-size: .85rem; }}
{marks}
@media (max-width: 40rem) {{ body {{ padding: 1.5rem 1rem 2rem; }} th, td {{ padding: .5rem .625rem; }}
  th:first-child, td:first-child {{ white-space: normal; min-width: 7.5rem; max-width: 10rem; }} }}
@media print {{ .scroll {{ overflow: visible; }} figure, .card {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<header><h1>{title}</h1>{verdict}{summary}{cards}</header>
{tables}
{notes}
{figures}
{sections}
<footer>{footer}</footer>
</body>
</html>
"""
