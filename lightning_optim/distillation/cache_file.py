"""The bytes of a cache of teacher logits: what it is of, its header, and one row of it.

A file is a block (magic, length, checksum, JSON), padded to 4096 bytes, an index and the rows. The index holds the
number of the first row of each sample, ``int64 [samples + 1]``, and the CRC-32 of each sample's rows, ``uint32
[samples]``. Rows lie one sample after the other, so that any sample is read by itself.
"""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightning_optim.functional.losses import TopK

__all__ = ["ALIGNED", "LOWEST", "MAGIC", "Identity", "read_block", "write_block"]

MAGIC = b"LODISTL2"
ALIGNED = 4096

_OF_0_1 = b"LODISTL1"
LOWEST = -65504.0
"""The lowest number of float16: as a log probability it is 0, and finite, so that no loss computes inf - inf."""

Rows = Any
"""A numpy array; its dtype is that of :attr:`Identity.row`."""


@dataclass(frozen=True)
class Identity:
    """What a cache is of. Two caches whose identities are equal hold the same teacher's answers to the same data.

    Attributes:
        teacher: The teacher's checksum.
        samples: Length of the dataset.
        classes: Number of classes, or words.
        top_k: How many of them are kept of each row; None: the logits of all.
        chosen: The classes that were chosen of the teacher's before, in words; empty: all.
        class_dim: The dimension of the teacher's output that holds the classes, 1 or -1.
    """

    teacher: str
    samples: int
    classes: int
    top_k: int | None = None
    chosen: str = ""
    class_dim: int = -1

    @property
    def row(self) -> np.dtype[Any]:
        """One row: float16 logits; or k log probabilities and the rest's as float16, and k words as int32."""
        if self.top_k is None:
            return np.dtype([("logits", "<f2", (self.classes,))])
        k = (self.top_k,)
        return np.dtype([("log_probabilities", "<f2", k), ("words", "<i4", k), ("rest", "<f2")])

    def pack(self, answers: Tensor | TopK) -> Rows:
        """Return rows as they are stored.

        Args:
            answers: Logits ``[rows, classes]``, or their k words.

        Raises:
            ValueError: If they are NaN, or logits beyond float16.
        """
        size = len(answers.rest if isinstance(answers, TopK) else answers)
        packed = np.empty(size, self.row)
        if not isinstance(answers, TopK):
            packed["logits"] = _half(answers)
            if not np.isfinite(packed["logits"]).all():
                raise ValueError(
                    "the teacher's logits are NaN, infinite, or beyond float16 (65504), so they cannot be cached. "
                    "Check the teacher, or train without `cache`."
                )
            return packed
        for name in ("log_probabilities", "rest"):
            packed[name] = _half(getattr(answers, name).clamp_min(LOWEST))
            if np.isnan(packed[name]).any():
                raise ValueError(
                    "the teacher's logits are NaN or infinite, so they cannot be cached. Check the teacher's weights "
                    "and inputs; a half-precision teacher may overflow: pass it in float32, or "
                    "`teacher_autocast=torch.bfloat16`."
                )
        packed["words"] = answers.words.to("cpu", torch.int32).numpy()
        return packed

    def unpack(self, rows: Rows) -> Tensor | TopK:
        """Return stored rows as float32 tensors on the CPU."""
        if self.top_k is None:
            return torch.from_numpy(rows["logits"].astype(np.float32))
        return TopK(
            torch.from_numpy(rows["log_probabilities"].astype(np.float32)),
            torch.from_numpy(rows["words"].astype(np.int64)),
            torch.from_numpy(rows["rest"].astype(np.float32)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, for a header."""
        return asdict(self)

    @classmethod
    def of(cls, header: dict[str, Any]) -> "Identity":
        """Read the attributes in a header, among other entries."""
        return cls(**{name: header[name] for name in cls.__dataclass_fields__})

    def check(self, path: Path, **expected: Any) -> None:
        """Check attributes of a file against those of a run; None: any; ``top_k=0``: the logits of all classes.

        Raises:
            ValueError: If one differs.
        """
        for name, value in expected.items():
            actual = getattr(self, name) or 0 if name == "top_k" else getattr(self, name)
            if value is not None and value != actual:
                raise ValueError(
                    f"the cache {str(path)!r} is of another {_WORDS[name]}: {_said(name, actual)}, and this run's is "
                    f"{_said(name, value)}. Delete it, or pass another path as `cache`."
                )


_WORDS = {
    "teacher": "teacher",
    "samples": "dataset length",
    "classes": "number of classes",
    "top_k": "`cache_top_k`",
    "chosen": "choice of `teacher_classes`",
    "class_dim": "`class_dim`",
}


def _said(name: str, value: Any) -> str:
    if name == "top_k":
        return str(value or "all classes")
    return str(value) or "all"


def _half(values: Tensor) -> Any:
    return values.detach().to("cpu", torch.float16).numpy()


def write_block(file: BinaryIO, magic: bytes, header: dict[str, Any]) -> None:
    """Write magic, length, checksum and JSON, padded to 4096 bytes."""
    text = json.dumps(header).encode()
    block = magic + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    file.write(block + bytes(-len(block) % ALIGNED))


def read_block(file: BinaryIO, path: Path, magic: bytes = MAGIC) -> dict[str, Any]:
    """Read what :func:`write_block` wrote.

    Args:
        file: The open file, which is then behind the block.
        path: Its path, for errors.
        magic: The first bytes.

    Raises:
        ValueError: If the file is another, of version 0.1, truncated or damaged.
    """
    start = file.read(len(magic) + 8)
    if start[: len(magic)] == _OF_0_1:
        raise ValueError(
            f"the cache {str(path)!r} was written by lightning_optim 0.1, whose files hold logits of one shape and no "
            "checksums. Delete it, and it is computed again; or pass another path as `cache`."
        )
    size, checksum = (int.from_bytes(start[len(magic) + 4 * part :][:4], "little") for part in (0, 1))
    text = file.read(size) if start[: len(magic)] == magic else b""
    if start[: len(magic)] != magic or len(text) != size or zlib.crc32(text) != checksum or not text:
        raise ValueError(
            f"{str(path)!r} is not a cache of teacher logits, or is truncated or damaged. If it was one, delete it, "
            "and it is computed again; otherwise pass another path as `cache`."
        )
    file.seek(-file.tell() % ALIGNED, 1)
    header: dict[str, Any] = json.loads(text)
    return header
