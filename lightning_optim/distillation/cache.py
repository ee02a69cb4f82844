"""Teacher logits on disk: computed once, read by every epoch, and never those of another teacher."""

import copy
import json
from collections.abc import Callable, Iterable, Sized
from itertools import chain
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_optim.files import written_aside

__all__ = [
    "Indexed",
    "IndexedCollate",
    "IndexedDataset",
    "LogitCache",
    "dataset_length",
    "every_sample_once",
    "shared_cache",
]

T = TypeVar("T")
_MAGIC = b"LODISTL1"
_ALIGNED = 4096


class Indexed(NamedTuple):
    """A sample or batch with its place in the dataset."""

    item: Any
    index: Any


class IndexedDataset(Dataset[Indexed]):
    """A dataset whose samples say which they are, so that cached teacher logits can be found.

    The student and its hooks get what the dataset gave; a DistillationModule takes the index off. A loader with a
    ``collate_fn`` of its own takes ``collate_fn=IndexedCollate(yours)``. Where the dataset has ``__getitems__`` so has
    this one: a list with a sample for each index, as torch has it, or a whole batch that is no list.

    Args:
        dataset: A map-style dataset. Its samples must be the same in every epoch: no augmentation.
    """

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"`dataset` must have a length and be indexed by position, got {type(dataset).__name__}.")
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Indexed:
        return Indexed(self.dataset[index], index)

    @property
    def __getitems__(self) -> Callable[[list[int]], "list[Indexed] | Indexed"]:
        """Fetch a batch at once; a property, since a DataLoader asks whether there is such a method."""
        if not callable(getattr(self.dataset, "__getitems__", None)):
            raise AttributeError(f"{type(self.dataset).__name__} has no `__getitems__`.")
        return self._fetch

    def _fetch(self, indices: list[int]) -> "list[Indexed] | Indexed":
        fetched = self.dataset.__getitems__(indices)
        if not isinstance(fetched, list):
            return Indexed(fetched, torch.as_tensor(indices))
        if len(fetched) != len(indices):
            raise ValueError(
                f"`__getitems__` of {type(self.dataset).__name__} gave a list of {len(fetched)} for {len(indices)} "
                "indices. A list must hold one sample an index; give a whole batch as a tuple or dict."
            )
        return list(map(Indexed, fetched, indices))


class IndexedCollate:
    """A ``collate_fn`` for the samples of an :class:`IndexedDataset`.

    Args:
        collate_fn: What collates the dataset's own samples.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any] = default_collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Indexed] | Indexed) -> Indexed:
        """Collate the samples and their indices; of a batch that was fetched whole ``collate_fn`` gets the whole."""
        if isinstance(samples, Indexed):
            return Indexed(self.collate_fn(samples.item), samples.index)
        items = self.collate_fn([sample.item for sample in samples])
        return Indexed(items, torch.tensor([sample.index for sample in samples]))


class LogitCache:
    """One row of teacher logits a sample, float16, memory-mapped.

    The file is a header (teacher checksum, shape, dtype) and the rows. It is read-only; copies and pickles of an owner
    open it anew.

    Args:
        path: The file.
        teacher: Checksum of the teacher it must be of; None: any.
        rows: Length of the dataset it must be of; None: any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, truncated, or of another teacher, dataset length or dtype.
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
                f"the cache {str(self.path)!r} has {size} bytes where its header says {expected}: it is truncated or "
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
                f"{str(self.path)!r}. The index must be the sample's place in the dataset that was cached."
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
        """Write the file under a temporary name and move it into place; a build that dies leaves no cache.

        Args:
            path: The file; its folder is made.
            answers: ``(indices, logits)`` batch by batch, ``[n]`` and ``[n, ...]``; each sample once.
            teacher: The teacher's checksum.
            rows: Length of the dataset.
            batches: How many there are, for the progress bar.
            progress: Show the progress bar.

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
                "the teacher's logits are NaN, infinite, or beyond float16 (65504), so they cannot be cached. Look at "
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


def shared_cache(trainer: Any, path: Path, checksum: str | None, rows: int, build: Callable[[], None]) -> LogitCache:
    """Open the cache on every rank; rank 0 builds it first where there is none.

    Args:
        trainer: The run.
        path: The file, on a disk that all ranks see.
        checksum: The teacher's; None: the file's is taken.
        rows: Length of the training dataset.
        build: Writes the file. What it raises is raised on every rank: one that waits for a file would hang.
    """
    problem: Exception | None = None
    if trainer.is_global_zero and not path.exists():
        try:
            build()
        except (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException) as error:
            problem = error
    if trainer.world_size > 1:
        problem = trainer.strategy.broadcast(problem, src=0)
    if problem is not None:
        raise problem
    cache = LogitCache(path, teacher=checksum, rows=rows)
    rank_zero_info(f"Teacher logits of {rows} samples are read from {str(path)!r}.")
    return cache


def _write_header(path: Path, teacher: str, shape: tuple[int, ...]) -> int:
    """Write magic, length and JSON, and let the file have its whole size; return where the rows begin."""
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
        raise ValueError(f"{str(path)!r} is no cache of teacher logits, or is truncated. Choose another path.")
    return json.loads(text), -(-(len(_MAGIC) + 4 + size) // _ALIGNED) * _ALIGNED


def _check_same(path: Path, what: str, wanted: Any, found: Any) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(
            f"the cache {str(path)!r} is of another {what}: {found}, and this run's is {wanted}. Delete it, or give "
            "`cache` another path."
        )


def dataset_length(loader: Any) -> int:
    """Return the number of samples a training loader draws from.

    Raises:
        ValueError: If the dataset has no length.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ValueError(
            "`cache` needs one training loader over a dataset with a length; an iterable dataset has no sample index."
        )
    return len(dataset)


def every_sample_once(loader: Any) -> DataLoader[Any]:
    """Return a loader of the same dataset and collate that is not sharded and gives every sample once.

    A batch sampler of the user's own (batches of similar length, say) makes the batches, if it gives every sample once;
    it is copied, so that training gets the batches it would have got. Else they are made in the dataset's order.
    """
    dataset, sampler = loader.dataset, getattr(loader, "batch_sampler", None)
    if loader.batch_size is not None or sampler is None:  # torch's own batches: any others are as good
        return DataLoader(dataset, loader.batch_size or 64, shuffle=False, collate_fn=loader.collate_fn)
    rows = dataset_length(loader)
    batches, problem = _batches_of(sampler, dataset, rows)
    if not problem:
        return DataLoader(dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
    size = median_low([len(batch) for batch in batches]) if batches else getattr(sampler, "batch_size", 64)
    rank_zero_info(
        f"{type(sampler).__name__} {problem}, so the teacher's logits are computed in the dataset's order, {size} at a "
        "time."
    )
    return DataLoader(dataset, size, shuffle=False, collate_fn=loader.collate_fn)


def _batches_of(sampler: Iterable[Iterable[int]], dataset: Any, rows: int) -> tuple[list[list[int]], str]:
    """Return the batches that a copy of the sampler gives, and why they are not what is needed, if so."""
    shared = {id(each): each for each in (dataset, getattr(dataset, "dataset", None))}  # not copied with the sampler
    try:
        copied = copy.deepcopy(sampler, shared)
    except TypeError:
        return [], "cannot be copied, and training must get the batches it would have got"
    batches: list[list[int]] = []
    given = 0
    for batch in copied:
        batches.append(list(batch))
        given += len(batches[-1])
        if given > rows:  # it may never end
            break
    is_whole = sorted(chain.from_iterable(batches)) == list(range(rows))
    return batches, "" if is_whole else f"does not give each of {rows} samples once"
