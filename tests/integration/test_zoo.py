"""docs/support.md says of every architecture and technique what happens; here it happens."""

import re

import pytest
import zoo


def shown() -> dict[tuple[str, str], str]:
    """Read the page's table: "yes", or the reason that the cell's number stands for."""
    _, _, rest = zoo.PAGE.read_text(encoding="utf-8").partition(zoo.BEGIN)
    text = rest.partition(zoo.END)[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    techniques = rows[0][1:]
    return {
        (row[0], technique): reasons[cell.strip("()")] if cell.startswith("(") else cell
        for row in rows[2:]
        for technique, cell in zip(techniques, row[1:], strict=True)
    }


SHOWN = shown()


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
