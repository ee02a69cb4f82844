"""Files are written aside and moved into place: a reader finds the old file or the new one, whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_aside"]


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; what was written there is moved to ``path`` when the block ends well.

    A file that is read while it is replaced (a checkpoint that is memory-mapped, say) stays readable, and a block that
    raises leaves the old file as it was. A link stays a link: the file that it names is replaced.

    Args:
        path: The file to write; its folder is made.
    """
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
