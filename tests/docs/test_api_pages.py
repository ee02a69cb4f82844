"""Every public name is on a page of docs/api/, and its docstring has an example and says what it raises."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import lightning_optim

FOLDER = Path(lightning_optim.__file__).parents[1] / "docs" / "api"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md")))
NAMES = re.findall(r"^::: ([\w.]+)$", TEXT, re.MULTILINE)
HOLD_RESULTS = {
    "ComparisonReport",
    "ExportReport",
    "FactorizationReport",
    "LatencyResult",
    "PretrainedReport",
    "SearchReport",
    "Solution",
    "SparsityReport",
    "Trial",
}
"""Plain results: nobody constructs them, so there is nothing to raise; their methods say what they raise."""
NEVER_RAISE = {"IndexedCollate", "follow", "solve"}


def public(name: str):
    """Find the object that a page names; a function that is called as its module counts before the module."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)


OBJECTS = {name: found for name in NAMES if not inspect.ismodule(found := public(name))}


def test_every_public_name_is_on_a_page():
    on_pages = {name.rpartition(".")[2] for name in NAMES}
    assert set(lightning_optim.__all__) - {"__version__", "strategies"} <= on_pages
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", OBJECTS)
def test_the_docstring_has_an_example(name):
    doc = inspect.getdoc(OBJECTS[name]) or ""
    example = re.search(r"^Examples?:\n(.*)", doc, re.MULTILINE | re.DOTALL)
    assert example is not None
    assert ">>> " in example[1]


@pytest.mark.parametrize(
    "name", [name for name in OBJECTS if name.rpartition(".")[2] not in HOLD_RESULTS | NEVER_RAISE]
)
def test_the_docstring_says_what_it_raises(name):
    doc = inspect.getdoc(OBJECTS[name]) or ""
    assert re.search(r"^Raises:\n    (\w+)", doc, re.MULTILINE)
