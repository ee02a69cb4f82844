"""Atomic writing: a reader finds either the old file or the whole new one."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["METADATA", "folder_written_aside", "is_sharded_folder", "replace_files", "written_aside"]

METADATA = "meta.pt"
"""The file of a sharded checkpoint that holds everything but weights and optimizer states; Lightning's name for it."""


def is_sharded_folder(path: str | Path) -> bool:
    """Whether a path is a checkpoint folder to which each process wrote its part."""
    return (Path(path) / METADATA).is_file()


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move that file to ``path`` when the block succeeds.

    A file that is read while it is replaced (a memory-mapped checkpoint, for example) stays readable, and a block that
    raises leaves the old file as it was. A symbolic link stays one: the file it points to is replaced.

    Args:
        path: The file to write; its folder is created.
    """
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which takes its place when the block succeeds.

    A block that raises leaves the old folder as it was. Between two moves there is none under that name; should the
    second one fail, the old folder is moved back.

    Args:
        path: The folder to write; folders above it are created. Of a symbolic link the folder it points to is replaced.
    """
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (final.with_name(f".{final.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if not final.exists():
            os.replace(temporary, final)
            return
        os.replace(final, old)
        try:
            os.replace(temporary, final)
        except OSError:
            os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write all files aside, then move them into place one after the other.

    Args:
        contents: Path -> content, in the order in which the files are moved.
    """
    with ExitStack() as stack:
        for path, content in reversed(list(contents.items())):  # the stack unwinds from the last to the first
            temporary = stack.enter_context(written_aside(path))
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
