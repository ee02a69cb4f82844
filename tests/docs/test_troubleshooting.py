"""The messages that docs/troubleshooting.md quotes are messages of the package."""

import ast
import re
from pathlib import Path

import pytest

import lightning_optim

PACKAGE = Path(lightning_optim.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
OTHERS = ("(Lightning", "(ONNX Runtime)", "(gloo)", "Lightning says", "or Lightning's")
"""Rows that quote messages of other packages."""
FILLED, RUN = "\0", 3
"""What stands for a filled-in value, and how many words in a row are compared."""


def literal(node: ast.AST) -> str:
    """A string or an f-string, with its filled-in values marked."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(part.value if isinstance(part, ast.Constant) else FILLED for part in node.values)


def words_of_the_package() -> set[tuple[str, ...]]:
    """Runs of words in the package's strings, without values; parts that are put together in code are apart."""
    found: set[tuple[str, ...]] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.update(runs(literal(node)))
    return found


def runs(text: str) -> list[tuple[str, ...]]:
    words = [word.strip(".,;:()`'") for word in text.split()]
    every = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return [run for run in every if not any(FILLED in word for word in run)]


def quoted() -> list[tuple[str, str]]:
    """Each row's messages, with the values that a run fills in marked."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| "))[0] for line in rows]
    cells = [cell for cell in cells if cell not in ("message", "---") and not any(other in cell for other in OTHERS)]
    return [(cell, message) for cell in cells for message in messages(cell)]


def messages(cell: str) -> list[str]:
    """The code spans of a cell."""
    spans = [first or second for first, second in re.findall(r"``(.+?)``(?!`)|(?<!`)`([^`].*?)`(?![a-z])", cell)]
    return [re.sub(r"\.\.\.|'[^']*'|`\w+`|\b\d[\d.,%]*|\b[A-Z]\w*", FILLED, span) for span in spans]


KNOWN = words_of_the_package()


@pytest.mark.parametrize(("cell", "message"), quoted(), ids=lambda text: text[:40])
def test_the_quoted_message_is_in_the_package(cell, message):
    missing = [" ".join(run) for run in runs(message) if run not in KNOWN]
    assert not missing, cell
