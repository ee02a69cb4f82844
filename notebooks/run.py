"""Execute the notebooks: ``python notebooks/run.py`` checks that every cell runs, ``--write`` stores the outputs.

Each notebook runs in a temporary folder, on the CPU, and reads the environment variable ``FAST``: without ``--write``
it is set, and nets are trained for a few steps. A cell that raises ends the run with its traceback and exit code 1.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert.filters import strip_ansi

FOLDER = Path(__file__).parent
NAMES = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
LIMIT = 600  # seconds for one cell


def execute(path: Path, *, fast: bool) -> nbformat.NotebookNode:
    """Return the executed notebook.

    Raises:
        CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ["FAST"] = "1" if fast else ""
    os.environ.setdefault("PYTHONPATH", str(FOLDER.parent))  # the clone, also where it is not installed
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    return notebook


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep what is read everywhere: no times of cells and versions of the kernel, and tables as plain text."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [plain for output in cell.outputs if (plain := _plain(output)) is not None]
    return notebook


def _plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return an output without colors; None if nothing is left of it, as of a progress bar."""
    if output.output_type == "stream":
        output.text = strip_ansi(output.text)
        return output if output.name == "stdout" else None
    if "text/html" in output.get("data", {}) and output.data["text/html"].startswith("<pre"):  # a table of rich
        text = strip_ansi("".join(output.data.get("text/plain", "")))
        return nbformat.v4.new_output("stream", text=text) if text.strip() else None
    return output


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=f"which: {', '.join(NAMES)}; default all")
    parser.add_argument("--write", action="store_true", help="run in full and store the outputs")
    options = parser.parse_args(arguments)
    for name in options.names:
        path, start = FOLDER / f"{name}.ipynb", time.perf_counter()
        try:
            notebook = execute(path, fast=not options.write)
        except CellExecutionError as error:
            sys.stderr.write(f"{path.name}:\n{error}\n")
            return 1
        if options.write:
            nbformat.write(stored(notebook), path)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
