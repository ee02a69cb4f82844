"""The file of teacher logits: written by batches, memory-mapped, and tied to one teacher and one dataset length."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.distillation.cache_file import Identity, read_block
from lightning_optim.distillation.cache_parts import Part, join_parts, remove_parts
from lightning_optim.functional.losses import TopK, top_k_of
from lightning_optim.functional.rows import rows_of
from lightning_optim.progress import progress_bar

__all__ = ["LogitCache"]


class LogitCache:
    """Teacher logits of every sample of a dataset, read by the sample's index; memory-mapped.

    A sample has one row (a class is predicted), or one for each position that counts (texts of different lengths). A
    row is the logits of all classes as float16, or the log probabilities of the k likeliest and of the rest as float16
    and the k classes as int32. The file is read-only; copies and pickles of the owner open it again.

    Args:
        path: The file.
        teacher: Expected checksum of the teacher; None: any.
        rows: Expected length of the dataset; None: any.
        top_k: Expected number of classes that are kept; 0: all, with their logits; None: any.
        chosen: Expected choice among the teacher's classes, see :class:`Identity`; None: any.

    Attributes:
        path: The file.
        identity: What it is of: teacher, samples, classes, top_k.
        rows: Number of rows, of all samples together.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no logit cache, one of version 0.1, truncated or damaged, or of another teacher, dataset
            length or k.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        teacher: str | None = None,
        rows: int | None = None,
        top_k: int | None = None,
        chosen: str | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no cache {str(self.path)!r}.")
        with self.path.open("rb") as file:
            header = read_block(file, self.path)
            start = file.tell()
        self.identity = Identity.of(header)
        self.identity.check(self.path, teacher=teacher, samples=rows, top_k=top_k, chosen=chosen)
        samples, self.rows = self.identity.samples, int(header["rows"])
        first = start + 12 * samples + 8
        self._check_size(first + self.rows * self.identity.row.itemsize)
        content: Any = np.asarray(np.memmap(self.path, np.uint8, "r"))  # a slice of a memmap itself takes longer
        index = content[start:first]
        if zlib.crc32(index) != header["index"]:
            raise ValueError(self._damaged("its index"))
        self._starts = index[: 8 * samples + 8].view("<i8")
        self._checksums = index[8 * samples + 8 :].view("<u4")
        self._data: Any = content[first:]

    def _check_size(self, expected: int) -> None:
        size = self.path.stat().st_size
        if size != expected:
            raise ValueError(
                f"the cache {str(self.path)!r} has {size} bytes, and its header says {expected}: it is truncated or "
                "was overwritten. Delete it, and it is computed again."
            )

    def _damaged(self, part: str) -> str:
        return (
            f"the cache {str(self.path)!r} is damaged: the checksum of {part} is not that of the bytes. Delete it, and "
            "it is computed again."
        )

    def __len__(self) -> int:
        return self.identity.samples

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return LogitCache, (str(self.path),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LogitCache":
        return self

    @property
    def bytes_per_row(self) -> int:
        """The bytes of one row: of a token, if a sample is a text."""
        return self.identity.row.itemsize

    def counts(self, index: Any) -> Tensor:
        """Return the number of rows of some samples, ``[samples]``.

        Raises:
            IndexError: If an index is outside the dataset.
        """
        positions = self._positions(index)
        return torch.from_numpy(self._starts[positions + 1] - self._starts[positions])

    def read(self, index: Any) -> Tensor | TopK:
        """Return the rows of some samples, one sample after the other, float32 on the CPU.

        Args:
            index: Positions of samples in the dataset, in any order.

        Returns:
            Logits ``[rows, classes]``, or of a file of k words these.

        Raises:
            IndexError: If an index is outside the dataset.
            ValueError: If the bytes are not those that were written.
        """
        pieces = [self._checked(sample) for sample in self._positions(index).tolist()]
        joined = np.concatenate(pieces) if pieces else self._data[:0]
        return self.identity.unpack(joined.view(self.identity.row))

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            ValueError: If the bytes of a sample are not those that were written.
        """
        for sample in range(len(self)):
            self._checked(sample)

    def _checked(self, sample: int) -> Any:
        start, end = (int(row) * self.bytes_per_row for row in self._starts[sample : sample + 2])
        rows = self._data[start:end]
        if zlib.crc32(rows) != self._checksums[sample]:
            raise ValueError(self._damaged(f"sample {sample}"))
        return rows

    def _positions(self, index: Any) -> Any:
        positions = np.atleast_1d(torch.as_tensor(index).cpu().numpy()).astype(np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(
                f"sample indices {positions.min()} to {positions.max()} are outside the {len(self)} rows of the cache "
                f"{str(self.path)!r}. The index must be the sample's position in the dataset that was cached."
            )
        return positions

    @classmethod
    def build(
        cls,
        path: str | Path,
        answers: Iterable[tuple[Any, ...]],
        *,
        teacher: str,
        rows: int,
        top_k: int | None = None,
        batches: int | None = None,
        progress: bool = True,
    ) -> "LogitCache":
        """Write the file in a loop of one's own; batches go to the disk, and an error leaves no cache.

        A run that builds its cache goes on after it was killed; this does not, since only the caller knows how to skip
        samples.

        Args:
            path: The file; its folder is created.
            answers: ``(indices, logits)`` batch by batch, ``[n]`` and ``[n, classes]`` or ``[n, positions, classes]``;
                or ``(indices, logits, counted)``, the last ``[n, positions]`` with True where a run reads the position:
                it is no padding, and it or the next one has a label other than -100. Each sample once. Texts may
                differ in length.
            teacher: The teacher's checksum.
            rows: Length of the dataset.
            top_k: Number of classes to keep of each row; None: the logits of all.
            batches: Number of batches, for the progress bar.
            progress: Whether to show the progress bar.

        Raises:
            ValueError: If samples are missing, or logits are NaN, or not finite in float16.
        """
        path = Path(path)
        part = Part(path.with_name(f".{path.name}.{os.getpid()}.rows"))
        try:
            with progress_bar(f"teacher logits -> {path.name}", batches or 0, shown=progress) as advance:
                for index, logits, *counted in answers:
                    keep = counted[0].bool() if counted else logits.new_ones(logits.shape[:-1], dtype=torch.bool)
                    kept = rows_of(logits, keep)
                    identity = Identity(teacher, rows, logits.shape[-1], top_k)
                    counts = keep.reshape(len(keep), -1).sum(1).cpu()
                    part.add(identity, index, counts, kept if top_k is None else top_k_of(kept, top_k))
                    advance()
            part.close()
            join_parts(path, [part.path], rows)
        finally:
            part.close()
            remove_parts([part.path])
        return cls(path, teacher=teacher, rows=rows)
