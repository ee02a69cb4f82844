"""Tables for logs: rich draws them, the logger prints them."""

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["by_reason", "render"]


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


def by_reason(left_out: Mapping[str, str], shown: int = 3) -> list[tuple[str, str]]:
    """Gather names that were left out for the same reason.

    Args:
        left_out: Name -> reason.
        shown: How many names of a reason are written out.

    Returns:
        ``(names, reason)``, in the order in which the reasons first appear.

    Examples:
        >>> by_reason({"a": "norm", "b": "last layer", "c": "norm", "d": "norm"}, shown=2)
        [('a, c and 1 more', 'norm'), ('b', 'last layer')]
    """
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    rows = []
    for reason, same in names.items():
        more = f" and {len(same) - shown} more" if len(same) > shown else ""
        rows.append((", ".join(same[:shown]) + more, reason))
    return rows
