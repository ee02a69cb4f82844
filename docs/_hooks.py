"""What MkDocs is told: the result files of the benchmarks and the notebooks are pages too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):<code>~?([\w.]+)</code>")
NOTEBOOK = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the result files and, with their stored outputs, the notebooks."""
    for path in sorted(BENCHMARKS.rglob("*.md")):
        uri = f"benchmarks/{path.relative_to(BENCHMARKS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(path))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources.get("outputs", {}).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **words: Any) -> str:
    """Point links at them from the pages, which in the repository lie beside the folders."""
    if page.file.src_uri.startswith("notebooks/"):  # beside docs/ in the repository, in it on the site
        return markdown.replace("](../docs/", "](../")
    return NOTEBOOK.sub(r"](notebooks/\1.md)", markdown).replace("](../benchmarks/", "](benchmarks/")


def on_page_content(html: str, **words: Any) -> str:
    """Write the roles of docstrings (``:class:`` and the like) as code alone."""
    return ROLE.sub(r"<code>\1</code>", html)
