"""Atomic writing: a reader finds either the old file or the whole new one."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = [
    "METADATA",
    "folder_written_aside",
    "is_sharded_folder",
    "pair_written_aside",
    "replace_files",
    "written_aside",
]

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
def pair_written_aside(path: str | Path, suffix: str, *, is_pair: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder, and move that file to ``path`` when the block succeeds.

    The block may write a second file, named with ``suffix``, that the first one refers to by this name; both are moved
    then. A second file of the old pair is removed if the new file has none. A block that raises leaves the old files
    as they were. Between the moves of two files there is none under the first name, so that nothing reads half of each
    pair; should one fail, the old ones are moved back. Of a symbolic link the file it points to is replaced, and the
    second file is beside that.

    Args:
        path: The file to write; its folder exists.
        suffix: What the name of the second file ends with.
        is_pair: Whether an old file refers to a second one.

    Raises:
        IsADirectoryError: If there is a folder of either name.
    """
    final = Path(os.path.realpath(path))
    finals = final.with_name(f"{final.name}{suffix}"), final  # in the order of the moves
    for each in finals:
        if each.is_dir():
            raise IsADirectoryError(f"{str(each)!r} is a folder. Give the name of a file to write.")
    folder = final.with_name(f".{final.name}.{os.getpid()}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / final.name
        if (folder / finals[0].name).exists():
            _replace_pair(folder, finals)
        else:
            left = finals[0] if is_pair(final) else None
            os.replace(folder / final.name, final)
            if left is not None:
                left.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_pair(folder: Path, finals: tuple[Path, Path]) -> None:
    old = {each: folder / f"{each.name}.old" for each in finals}
    moved: list[Path] = []
    try:
        for each in reversed(finals):
            if each.exists():
                os.replace(each, old[each])
        for each in finals:
            os.replace(folder / each.name, each)
            moved.append(each)
    except OSError:
        for each in moved:
            each.unlink()
        for each in finals:
            if old[each].exists():
                os.replace(old[each], each)
        raise


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
