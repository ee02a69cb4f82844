"""Pages of techniques have one form: the same headings in the same order, and a figure in the first part."""

import re
from pathlib import Path

import pytest

from lightning_optim.techniques import TECHNIQUES

FOLDER = Path(__file__).parents[2] / "docs"
FORM = ["What it does", "The smallest code", "Arguments", "Measured", "When it does not help", "Deployment"]
PAGES = [*TECHNIQUES, "distillation"]


@pytest.mark.parametrize("name", PAGES)
def test_a_technique_has_a_page_of_the_form(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[: len(FORM)] == FORM
    first = text.split("## The smallest code")[0]
    (figure,) = re.findall(r"!\[.+\]\((assets/\w+\.svg)\)", first)
    assert (FOLDER / figure).is_file()
    assert "(../benchmarks/" in text.split("## Measured")[1].split("## When it does not help")[0]
