"""Datasets whose samples carry their index, and batches that hold every sample once."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain
from statistics import median_low
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, default_collate

__all__ = ["Indexed", "IndexedCollate", "IndexedDataset", "batches_once", "dataset_length", "reading", "without_index"]


class Indexed(NamedTuple):
    """A sample or batch with its index in the dataset."""

    item: Any
    index: Any


def without_index(batch: Any) -> Any:
    """Return a batch as the wrapped dataset gave it."""
    return batch.item if isinstance(batch, Indexed) else batch


class IndexedDataset(Dataset[Indexed]):
    """A dataset whose samples carry their index, so that their cached teacher logits can be found.

    The student and its hooks get what the wrapped dataset returns: a DistillationModule removes the index. A loader
    with its own ``collate_fn`` takes ``collate_fn=IndexedCollate(yours)``. If the dataset has ``__getitems__``, this
    one has it too: it returns a list with one sample per index, as in torch, or a whole batch that is not a list.

    Args:
        dataset: A map-style dataset. Its samples must be the same in every epoch: no augmentation.

    Raises:
        TypeError: If the dataset has no length, or cannot be indexed.

    Examples:
        >>> IndexedDataset(["a", "b"])[1]
        Indexed(item='b', index=1)
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
        """Fetch a batch at once; a property, because a DataLoader asks whether the method exists."""
        if not callable(getattr(self.dataset, "__getitems__", None)):
            raise AttributeError(f"{type(self.dataset).__name__} has no `__getitems__`.")
        return self._fetch

    def _fetch(self, indices: list[int]) -> "list[Indexed] | Indexed":
        fetched = self.dataset.__getitems__(indices)
        if not isinstance(fetched, list):
            return Indexed(fetched, torch.as_tensor(indices))
        if len(fetched) != len(indices):
            raise ValueError(
                f"`__getitems__` of {type(self.dataset).__name__} returned a list of {len(fetched)} for {len(indices)} "
                "indices. A list must hold one sample per index; return a whole batch as a tuple or dict."
            )
        return list(map(Indexed, fetched, indices))


class IndexedCollate:
    """A ``collate_fn`` for the samples of an :class:`IndexedDataset`.

    Args:
        collate_fn: Collates the samples of the wrapped dataset.

    Examples:
        >>> collate = IndexedCollate(lambda texts: [text.upper() for text in texts])
        >>> collate([IndexedDataset(["a", "b"])[1]])
        Indexed(item=['B'], index=tensor([1]))
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any] = default_collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Indexed] | Indexed) -> Indexed:
        """Collate the samples and their indices; a batch that was fetched whole is passed to ``collate_fn`` whole."""
        if isinstance(samples, Indexed):
            return Indexed(self.collate_fn(samples.item), samples.index)
        items = self.collate_fn([sample.item for sample in samples])
        return Indexed(items, torch.tensor([sample.index for sample in samples]))


def dataset_length(loader: Any) -> int:
    """Return the number of samples of a training loader's dataset.

    Raises:
        ValueError: If the dataset has no length.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ValueError(
            "`cache` needs one training loader over a dataset with a length; an iterable dataset has no sample index."
        )
    return len(dataset)


def batches_once(loader: Any) -> list[Sequence[int]]:
    """Return batches of indices that hold every sample of a loader's dataset once.

    A batch sampler written by the user (batches of similar length, for example) also makes these batches, if it yields
    every sample once. It is copied, so that training still gets the same batches. Otherwise the batches follow the
    dataset's order.
    """
    sampler, rows = getattr(loader, "batch_sampler", None), dataset_length(loader)
    if loader.batch_size is not None or sampler is None:  # torch's own batches: any others are as good
        return _in_order(rows, loader.batch_size or 64)
    batches, problem = _batches_of(sampler, loader.dataset, rows)
    if not problem:
        return list(batches)
    size = median_low([len(batch) for batch in batches]) if batches else getattr(sampler, "batch_size", 64)
    rank_zero_info(
        f"{type(sampler).__name__} {problem}, so the teacher's logits are computed in the dataset's order, {size} at a "
        "time."
    )
    return _in_order(rows, size)


def _in_order(rows: int, size: int) -> list[Sequence[int]]:
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def reading(loader: Any, batches: Sequence[Sequence[int]]) -> DataLoader[Any]:
    """Return an unsharded loader with the same dataset and collate function that reads these batches."""
    return DataLoader(loader.dataset, batch_sampler=_Lists(batches), collate_fn=loader.collate_fn)


class _Lists:
    """Batches as lists, which is what a dataset's ``__getitems__`` takes, made one at a time."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self._batches)


def _batches_of(sampler: Iterable[Iterable[int]], dataset: Any, rows: int) -> tuple[list[list[int]], str]:
    """Return the batches of a copy of the sampler, and why they cannot be used (empty if they can)."""
    shared = {id(value): value for value in (dataset, getattr(dataset, "dataset", None))}  # not copied
    try:
        copied = copy.deepcopy(sampler, shared)
    except TypeError:
        return [], "cannot be copied, and using it would change the batches of the training"
    batches: list[list[int]] = []
    count = 0
    for batch in copied:
        batches.append(list(batch))
        count += len(batches[-1])
        if count > rows:  # it may never end
            break
    is_whole = sorted(chain.from_iterable(batches)) == list(range(rows))
    return batches, "" if is_whole else f"does not yield each of {rows} samples once"
