"""What MkDocs is told: the result files of the benchmarks are pages too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the result files, under ``benchmarks/``."""
    for path in sorted(BENCHMARKS.rglob("*.md")):
        uri = f"benchmarks/{path.relative_to(BENCHMARKS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **words: Any) -> str:
    """Point links at them from the pages, which in the repository lie beside the folder."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")


def on_page_content(html: str, **words: Any) -> str:
    """Write the roles of docstrings (``:class:`` and the like) as code alone."""
    return ROLE.sub(r"<code>\1</code>", html)
