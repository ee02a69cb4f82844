"""docs/support.md says of every architecture and technique what happens; here it happens."""

import re

import pytest
import shapes
import zoo

from helpers.pretrained import MODELS


def shown(begin: str = zoo.BEGIN, end: str = zoo.END) -> dict[tuple[str, str], str]:
    """Read a table of the page: "yes", or the reason that the cell's number stands for."""
    _, _, rest = zoo.PAGE.read_text(encoding="utf-8").partition(begin)
    text = rest.partition(end)[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    techniques = rows[0][1:]
    return {
        (row[0], technique): outcome(cell, reasons)
        for row in rows[2:]
        for technique, cell in zip(techniques, row[1:], strict=True)
    }


def outcome(cell: str, reasons: dict[str, str]) -> str:
    mark, _, number = cell.rstrip(")").rpartition("(")
    if "(" not in cell:
        return cell
    return f"{zoo.BUT if mark else ''}{reasons[number]}"


SHOWN = shown()
SHAPES = shown(shapes.BEGIN, shapes.END)


def test_the_page_shows_every_architecture_with_every_technique():
    assert set(SHOWN) == {(name, technique) for name in zoo.ARCHITECTURES for technique in zoo.TECHNIQUES}
    assert len(zoo.ARCHITECTURES) >= 20
    assert sum(cell == "yes" for cell in SHOWN.values()) > 0.9 * len(SHOWN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("technique", zoo.TECHNIQUES)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_it_is_as_the_page_says(tmp_path, name, technique):
    assert zoo.try_out(name, technique, tmp_path).replace("|", "/") == SHOWN[name, technique]


def test_the_page_shows_what_leaves_every_model_of_transformers():
    assert set(SHAPES) == {(name, what) for name in shapes.PATTERNS for what in shapes.WHAT}
    assert set(MODELS) == shapes.PATTERNS.keys()
    assert sum(cell.startswith("yes") for cell in SHAPES.values()) > 0.9 * len(SHAPES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", shapes.WHAT)
@pytest.mark.parametrize("name", shapes.PATTERNS)
def test_it_leaves_as_the_page_says(tmp_path, name, what):
    pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")
    assert shapes.shrink(name, what, tmp_path).replace("|", "/") == SHAPES[name, what]
