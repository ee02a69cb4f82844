"""docs/strategies.md shows the presets as they are; ``python tests/strategies/test_strategies_page.py`` writes them."""

import re
from pathlib import Path

import pytest

from lightning_optim.strategies import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "strategies.md"
BEGIN, END = "<!-- presets: begin -->", "<!-- presets: end -->"
SUPPORT = ("<!-- support table: begin -->", "<!-- support table: end -->")


def presets_table():
    lines = ["| name | class and arguments | take it when |", "| --- | --- | --- |"]
    for name, preset in PRESETS.items():
        arguments = ", ".join(f"{key}={value!r}" for key, value in preset.options.items())
        lines.append(f"| `{name}` | `{preset.strategy.__name__}({arguments})` | {preset.use_when} |")
    return "\n".join(lines)


def with_table(text):
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{presets_table()}\n\n{END}{rest.split(END)[1]}"


def test_the_page_shows_the_presets_as_they_are():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python tests/strategies/test_strategies_page.py"


@pytest.mark.parametrize("file", ["docs/support.md", "docs/strategies.md"])
def test_the_support_table_has_its_place(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [text.count(mark) for mark in SUPPORT] == [1, 1]
    assert text.index(SUPPORT[0]) < text.index(SUPPORT[1])


def test_every_link_of_the_page_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_preset_named_on_the_page_exists():
    named = set(re.findall(r"\boptim_[a-z0-9_]+", PAGE.read_text(encoding="utf-8")))
    assert named - set(PRESETS) == set()


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
