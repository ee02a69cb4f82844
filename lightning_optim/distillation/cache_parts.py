"""The unfinished cache: each process appends its batches to a part, and one process joins the parts.

A part is a block like that of the cache and then one record a batch: sizes, checksum, indices, counts, rows. A process
that is killed leaves whole records and at most a torn one, which is cut off, so that the next run goes on from there.
"""

import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from lightning_optim.distillation.cache_file import ALIGNED, MAGIC, Identity, read_block, write_block
from lightning_optim.files import written_aside
from lightning_optim.functional.losses import TopK

if sys.platform != "win32":  # where two runs that write one cache at once are not told apart
    import fcntl

__all__ = ["Part", "join_parts", "parts_of", "remove_parts", "samples_in"]

_MAGIC = b"LODISTP2"
_SIZES = struct.Struct("<4sIII")
_RECORD = b"ROWS"
_PIECE = 1 << 24


@dataclass(frozen=True)
class Record:
    """One batch in a part.

    Attributes:
        path: The part.
        indices: The samples, ``[n]``.
        counts: The number of rows of each, ``[n]``.
        start: Where the rows begin in the file.
        end: Where the next record begins.
    """

    path: Path
    indices: Any
    counts: Any
    start: int
    end: int


class Part:
    """Appends batches to a part; the file begins with the first of them.

    Args:
        path: The part; one that is there is continued after its last whole record.

    Raises:
        RuntimeError: If another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._identity: Identity | None = None

    def add(self, identity: Identity, index: Any, counts: Any, answers: Tensor | TopK) -> None:
        """Append one batch.

        Args:
            identity: What the cache is of.
            index: The samples, ``[n]``.
            counts: The number of rows of each, ``[n]``.
            answers: The rows of all, one sample after the other.

        Raises:
            ValueError: If it is of other classes than the batches before, or cannot be stored.
        """
        if self._identity not in (None, identity):
            raise ValueError(f"a cache holds rows of one kind, got {identity} after {self._identity}.")
        self._identity = identity
        rows = identity.pack(answers)
        body = [np.asarray(each, dtype="<i8").tobytes() for each in (index, counts)] + [rows.tobytes()]
        checksum = 0
        for piece in body:
            checksum = zlib.crc32(piece, checksum)
        file = self._opened(identity)
        file.write(_SIZES.pack(_RECORD, len(body[0]) // 8, len(rows), checksum) + b"".join(body))
        file.flush()  # the system has it: a process that is killed loses nothing

    def _opened(self, identity: Identity) -> BinaryIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("r+b" if self.path.exists() else "w+b")
            try:
                _lock(file, self.path)
                end = _end_of_records(self.path)
            except BaseException:
                file.close()
                raise
            file.truncate(end)
            file.seek(end)
            if not end:
                write_block(file, _MAGIC, identity.as_dict())
            self._file = file
        return self._file

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock a file until it is closed, by whatever end of the process."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another run is writing {str(path)!r}. Wait until its cache is there, or pass another path as `cache`."
        ) from error
    except OSError:  # a file system without locks
        return


def parts_of(path: Path) -> list[Path]:
    """Return the parts of a cache that a run left or is writing, in the order of their processes."""
    return sorted(path.parent.glob(f".{escape(path.name)}.part*"), key=lambda part: (len(part.name), part.name))


def samples_in(parts: Sequence[Path], samples: int, **expected: Any) -> Any:
    """Return which samples whole records of parts hold, ``[samples]`` bool.

    Raises:
        ValueError: If a part is of another teacher, dataset or kind than expected (:meth:`Identity.check`).
    """
    held = np.zeros(samples, dtype=bool)
    for part in parts:
        identity = _identity(part)
        if identity is not None:
            identity.check(part, samples=samples, **expected)
            for record in _records(part, identity, check=True):
                held[record.indices] = True
    return held


def _identity(part: Path) -> Identity | None:
    """Return what a part is of; None if its process was killed before it had written that."""
    if not part.exists() or part.stat().st_size < ALIGNED:
        return None
    with part.open("rb") as file:
        return Identity.of(read_block(file, part, _MAGIC))


def _records(part: Path, identity: Identity, *, check: bool) -> Iterator[Record]:
    """Yield the records up to the first that is torn or damaged.

    Args:
        part: The part.
        identity: What it is of.
        check: Whether checksums are compared.
    """
    itemsize, size = identity.row.itemsize, part.stat().st_size
    with part.open("rb") as file:
        file.seek(ALIGNED)
        while True:
            sizes = file.read(_SIZES.size)
            if len(sizes) < _SIZES.size:
                return
            tag, samples, rows, checksum = _SIZES.unpack(sizes)
            start = file.tell() + 16 * samples
            end = start + rows * itemsize
            if tag != _RECORD or end > size:
                return
            lists = file.read(16 * samples)
            if check and _checksum(file, rows * itemsize, zlib.crc32(lists)) != checksum:
                return
            indices, counts = np.frombuffer(lists, "<i8").reshape(2, -1)
            if counts.sum() != rows or (len(indices) and not 0 <= indices.min() <= indices.max() < identity.samples):
                return
            yield Record(part, indices, counts, start, end)
            file.seek(end)


def _checksum(file: BinaryIO, size: int, checksum: int) -> int:
    while size and (piece := file.read(min(size, _PIECE))):
        checksum = zlib.crc32(piece, checksum)
        size -= len(piece)
    return checksum if not size else -1


def _end_of_records(part: Path) -> int:
    """Return where whole records end; 0 if there is not even the block."""
    identity = _identity(part)
    if identity is None:
        return 0
    end = ALIGNED
    for record in _records(part, identity, check=True):
        end = record.end
    return end


def join_parts(path: Path, parts: Sequence[Path], samples: int) -> None:
    """Write the cache from its parts, aside and then moved, with samples in their order; no more than a record is held.

    Of a sample that several records hold, the first counts, so the file is the same however the batches were divided.

    Args:
        path: The cache.
        parts: Its parts.
        samples: Length of the dataset.

    Raises:
        ValueError: If samples are missing.
    """
    identities = {part: identity for part in parts if (identity := _identity(part)) is not None}
    counts = np.full(samples, -1, dtype=np.int64)
    for part, identity in identities.items():
        for record in _records(part, identity, check=False):
            new = counts[record.indices] < 0
            counts[record.indices[new]] = record.counts[new]
    if (counts < 0).any():
        raise ValueError(f"{int((counts < 0).sum())} of {samples} samples got no teacher logits.")
    starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    if not identities:
        raise ValueError("the dataset is empty: no sample got teacher logits.")
    identity = next(iter(identities.values()))
    with written_aside(path) as temporary, temporary.open("wb") as file:
        write_block(file, MAGIC, {**identity.as_dict(), "rows": int(starts[-1]), "index": 0})
        first = file.tell() + 12 * samples + 8
        checksums = _copy_rows(file, first, identities, starts, identity.row.itemsize)
        index = starts.astype("<i8").tobytes() + checksums.astype("<u4").tobytes()
        file.seek(0)
        write_block(file, MAGIC, {**identity.as_dict(), "rows": int(starts[-1]), "index": zlib.crc32(index)})
        file.write(index)


def _copy_rows(file: BinaryIO, first: int, parts: dict[Path, Identity], starts: Any, itemsize: int) -> Any:
    """Write the rows of every sample to their place, and return the checksum of each sample's."""
    checksums = np.zeros(len(starts) - 1, dtype=np.uint32)
    done = np.zeros(len(starts) - 1, dtype=bool)
    for part, identity in parts.items():
        with part.open("rb") as source:
            for record in _records(part, identity, check=False):
                source.seek(record.start)
                for sample, count in zip(record.indices.tolist(), record.counts.tolist(), strict=True):
                    rows = source.read(count * itemsize)
                    if not done[sample]:
                        done[sample] = True
                        checksums[sample] = zlib.crc32(rows)
                        file.seek(first + int(starts[sample]) * itemsize)
                        file.write(rows)
    return checksums


def remove_parts(parts: Sequence[Path]) -> None:
    """Remove parts that are joined, or of no use."""
    for part in parts:
        with suppress(FileNotFoundError):
            part.unlink()
