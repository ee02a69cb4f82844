"""A progress bar for work that turns out to be long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.errors import LiveError
from rich.progress import Progress

__all__ = ["PATIENCE_S", "progress_bar"]

PATIENCE_S = 2.0
"""Work that ends before shows no bar."""


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show a progress bar on rank zero while the block runs, from its third second on.

    Args:
        title: Printed before the bar.
        total: How many steps there are.
        shown: Whether there is a bar at all (``enable_progress_bar`` of a Trainer).

    Yields:
        A function to call after each step.
    """
    hidden = not shown or getattr(rank_zero_only, "rank", 0) != 0
    bar: Progress | None = None
    began, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal bar, done, hidden
        done += 1
        if hidden:
            return
        if bar is None and time.monotonic() - began > PATIENCE_S:
            bar = Progress(transient=True)
            bar.add_task(title, total=total)
            try:
                bar.start()
            except LiveError:  # another bar of rich is on the screen, and this version shows one at a time
                bar, hidden = None, True
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
