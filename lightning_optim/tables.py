"""Tables for logs: rich draws them, the logger prints them."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["render"]


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as plain text.

    Args:
        title: Printed above it.
        columns: Column names.
        rows: Cells, as many as columns.
    """
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue().rstrip()
