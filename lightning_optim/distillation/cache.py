"""The file of teacher logits: written once, memory-mapped, and tied to one teacher and one dataset length."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from lightning_optim.files import written_aside

__all__ = ["LogitCache"]

_MAGIC = b"LODISTL1"
_ALIGNED = 4096


class LogitCache:
    """Teacher logits, one row per sample, float16, memory-mapped.

    The file is a header (teacher checksum, shape, dtype) followed by the rows. It is read-only; copies and pickles of
    the owner open it again.

    Args:
        path: The file.
        teacher: Expected checksum of the teacher; None: any.
        rows: Expected length of the dataset; None: any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a logit cache, truncated, or of another teacher, dataset length or dtype.
    """

    def __init__(self, path: str | Path, *, teacher: str | None = None, rows: int | None = None) -> None:
        self.path = Path(path)
        header, offset = _read_header(self.path)
        self.teacher: str = header["teacher"]
        self.shape: tuple[int, ...] = tuple(header["shape"])
        _check_same(self.path, "teacher", teacher, self.teacher)
        _check_same(self.path, "dataset length", rows, self.shape[0])
        _check_same(self.path, "dtype", "float16", header["dtype"])
        expected = offset + 2 * int(np.prod(self.shape))
        size = self.path.stat().st_size
        if size != expected:
            raise ValueError(
                f"the cache {str(self.path)!r} has {size} bytes, and its header says {expected}: it is truncated or "
                "was overwritten. Delete it, and it is computed again."
            )
        self._rows = np.memmap(self.path, np.float16, "r", offset, self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return LogitCache, (str(self.path),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LogitCache":
        return self

    def read(self, index: Any) -> Tensor:
        """Return the rows of some samples, float32 on the CPU.

        Raises:
            IndexError: If an index is outside the dataset.
        """
        positions = np.atleast_1d(torch.as_tensor(index).cpu().numpy())
        if positions.min() < 0 or positions.max() >= len(self):
            raise IndexError(
                f"sample indices {positions.min()} to {positions.max()} are outside the {len(self)} rows of the cache "
                f"{str(self.path)!r}. The index must be the sample's position in the dataset that was cached."
            )
        return torch.from_numpy(self._rows[positions].astype(np.float32))

    @classmethod
    def build(
        cls,
        path: str | Path,
        answers: Iterable[tuple[Any, Tensor]],
        *,
        teacher: str,
        rows: int,
        batches: int | None = None,
        progress: bool = True,
    ) -> "LogitCache":
        """Write the file under a temporary name and move it into place; an interrupted build leaves no cache.

        Args:
            path: The file; its folder is created.
            answers: ``(indices, logits)`` batch by batch, ``[n]`` and ``[n, ...]``; each sample once.
            teacher: The teacher's checksum.
            rows: Length of the dataset.
            batches: Number of batches, for the progress bar.
            progress: Whether to show the progress bar.

        Raises:
            ValueError: If samples are missing, or logits are not finite in float16.
        """
        path = Path(path)
        with written_aside(path) as temporary:
            shown = track(answers, f"teacher logits -> {path.name}", batches) if progress else answers
            _write_rows(temporary, shown, teacher, rows)
        return cls(path, teacher=teacher, rows=rows)


def _write_rows(path: Path, answers: Iterable[tuple[Any, Tensor]], teacher: str, rows: int) -> None:
    seen = np.zeros(rows, dtype=bool)
    memory: Any = None
    for index, logits in answers:
        values = logits.detach().to("cpu", torch.float16).numpy()
        if not np.isfinite(values).all():
            raise ValueError(
                "the teacher's logits are NaN, infinite, or beyond float16 (65504), so they cannot be cached. Check "
                "the teacher, or train without `cache`."
            )
        if memory is None:
            offset = _write_header(path, teacher, (rows, *values.shape[1:]))
            memory = np.memmap(path, np.float16, "r+", offset, (rows, *values.shape[1:]))
        if values.shape[1:] != memory.shape[1:]:
            raise ValueError(
                f"the cache holds logits of one shape, got {values.shape[1:]} after {memory.shape[1:]}. Pad sequences "
                "to one length, or train without `cache`."
            )
        positions = torch.as_tensor(index).cpu().numpy()
        memory[positions] = values
        seen[positions] = True
    if memory is None or not seen.all():
        raise ValueError(f"{int((~seen).sum())} of {rows} samples got no teacher logits.")
    memory.flush()


def _write_header(path: Path, teacher: str, shape: tuple[int, ...]) -> int:
    """Write magic, length and JSON, extend the file to its full size, and return the offset of the rows."""
    text = json.dumps({"teacher": teacher, "shape": list(shape), "dtype": "float16"}).encode()
    start = len(_MAGIC) + 4 + len(text)
    offset = -(-start // _ALIGNED) * _ALIGNED
    with path.open("wb") as file:
        file.write(_MAGIC + len(text).to_bytes(4, "little") + text)
        file.truncate(offset + 2 * int(np.prod(shape)))
    return offset


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no cache {str(path)!r}.")
    with path.open("rb") as file:
        magic, size = file.read(len(_MAGIC)), int.from_bytes(file.read(4), "little")
        text = file.read(size)
    if magic != _MAGIC or len(text) != size:
        raise ValueError(f"{str(path)!r} is not a cache of teacher logits, or is truncated. Choose another path.")
    return json.loads(text), -(-(len(_MAGIC) + 4 + size) // _ALIGNED) * _ALIGNED


def _check_same(path: Path, what: str, expected: Any, actual: Any) -> None:
    if expected is not None and expected != actual:
        raise ValueError(
            f"the cache {str(path)!r} is of another {what}: {actual}, and this run's is {expected}. Delete it, or pass "
            "another path as `cache`."
        )
