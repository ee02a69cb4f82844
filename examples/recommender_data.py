"""Next-basket examples: what each customer had bought before a basket, and what was in it.

Works on any table of purchases with the columns ``customer``, ``invoice``, ``item`` and ``time``: the real one
(``online_retail.py``) or a generated one (``synthetic_retail.py``).
"""

from dataclasses import dataclass
from functools import cache

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from online_retail import find_file, merge_repeats, purchases, read_transactions
from synthetic_retail import generate_purchases

__all__ = [
    "CUTS",
    "TEST",
    "VALIDATION",
    "Examples",
    "NextBasket",
    "RetailData",
    "Task",
    "build_task",
    "history_before",
    "loader",
    "positions",
    "relevant_and_seen",
]

VALIDATION = (pd.Timestamp("2011-10-10"), pd.Timestamp("2011-11-09"))
TEST = (pd.Timestamp("2011-11-09"), pd.Timestamp("2012-01-01"))
CUTS = {"validation": VALIDATION, "test": TEST}
MIN_INVOICES = 5  # an item with fewer invoices before the cut is not ranked
HALF_LIFE_DAYS = 45.0
POPULAR_DAYS = 30


@dataclass(frozen=True)
class Examples:
    """Baskets with what their customers had bought before, kept flat: ``starts`` says where each example begins.

    Attributes:
        item: Items bought before, ``[history entries]``.
        log_count: log(1 + number of earlier baskets with this item).
        recency: The same number with every basket discounted by its age (half-life 45 days).
        starts: ``[examples + 1]``.
        target_item: Items of the basket itself, ``[target entries]``.
        target_starts: ``[examples + 1]``.
        day: Day of the basket, counted from the first day of the data, ``[examples]``.
        earlier: Number of earlier baskets, ``[examples]``.
    """

    item: np.ndarray
    log_count: np.ndarray
    recency: np.ndarray
    starts: np.ndarray
    target_item: np.ndarray
    target_starts: np.ndarray
    day: np.ndarray
    earlier: np.ndarray

    def __len__(self) -> int:
        return len(self.day)

    def select(self, rows: np.ndarray) -> "Examples":
        """Return these examples, in this order."""
        entries, owner = positions(self.starts, rows)
        targets, target_owner = positions(self.target_starts, rows)
        return Examples(
            self.item[entries],
            self.log_count[entries],
            self.recency[entries],
            _starts(owner, len(rows)),
            self.target_item[targets],
            _starts(target_owner, len(rows)),
            self.day[rows],
            self.earlier[rows],
        )


@dataclass(frozen=True)
class Task:
    """Learn from the baskets before a cut, rank the catalogue for each customer's first basket after it.

    Attributes:
        items: The catalogue; an item's number is its place here.
        train: All baskets before the cut.
        evaluation: For each customer known before the cut, the first basket after it, described with statistics up
            to the cut only.
        popularity: log(1 + baskets with the item in the last 30 days), ``[days, items]``; a day itself is left out.
    """

    items: list[str]
    train: Examples
    evaluation: Examples
    popularity: np.ndarray


def positions(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the entries of these rows stand in the flat arrays, and which of the rows each belongs to."""
    counts = starts[rows + 1] - starts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    offset_in_row = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[rows][owner] + offset_in_row, owner


def _starts(owner: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=rows))])


def build_task(rows: pd.DataFrame, cut: pd.Timestamp, end: pd.Timestamp) -> Task:
    """Split purchases at a moment in time.

    Args:
        rows: Columns ``customer``, ``invoice``, ``item``, ``time``; one row per invoice and item.
        cut: Invoices before this moment are known.
        end: Invoices from the cut to this moment are to be predicted.
    """
    first_day = rows["time"].min().normalize()
    rows = rows.assign(time=rows.groupby("invoice")["time"].transform("min"))
    known = rows[rows["time"] < cut]
    support = known["item"].value_counts()
    items = sorted(support.index[support >= MIN_INVOICES])
    baskets = pd.concat([known, _first_baskets(rows[(rows["time"] >= cut) & (rows["time"] < end)], cut)])
    baskets = baskets.assign(
        item=pd.Index(items).get_indexer(baskets["item"]), day=(baskets["time"] - first_day) / pd.Timedelta(days=1)
    )
    baskets = baskets[(baskets["item"] >= 0) & baskets["customer"].isin(_customers_of(baskets, cut))]
    examples = _examples(baskets)
    cut_day = (cut - first_day) / pd.Timedelta(days=1)
    is_new = examples.day == cut_day
    train = examples.select(np.flatnonzero(~is_new))
    return Task(items, train, examples.select(np.flatnonzero(is_new)), _popularity(train, len(items), int(cut_day)))


def _first_baskets(rows: pd.DataFrame, cut: pd.Timestamp) -> pd.DataFrame:
    """Return each customer's first invoice, dated at the cut: nothing later is known when it is to be predicted."""
    first = rows.sort_values(["time", "invoice"]).drop_duplicates("customer")["invoice"]
    return rows[rows["invoice"].isin(first)].assign(time=cut)


def _customers_of(baskets: pd.DataFrame, cut: pd.Timestamp) -> pd.Series:
    """Return the customers who bought something of the catalogue before the cut."""
    return baskets.loc[(baskets["time"] < cut) & (baskets["item"] >= 0), "customer"]


def _examples(baskets: pd.DataFrame) -> Examples:
    """Describe every basket by what its customer had bought before it."""
    baskets = baskets.sort_values(["customer", "time", "invoice", "item"])
    customer, invoice, item, day = (baskets[name].to_numpy() for name in ("customer", "invoice", "item", "day"))
    borders = np.flatnonzero(customer[1:] != customer[:-1]) + 1
    parts: dict[str, list[np.ndarray]] = {}
    for start, stop in zip(np.r_[0, borders], np.r_[borders, len(baskets)], strict=True):
        for name, values in _customer_examples(invoice[start:stop], item[start:stop], day[start:stop]).items():
            parts.setdefault(name, []).append(values)
    flat = {name: np.concatenate(values) for name, values in parts.items()}
    return Examples(
        starts=np.concatenate([[0], np.cumsum(flat.pop("size"))]),
        target_starts=np.concatenate([[0], np.cumsum(flat.pop("target_size"))]),
        **flat,
    )


def _customer_examples(invoice: np.ndarray, item: np.ndarray, day: np.ndarray) -> dict[str, np.ndarray]:
    """Describe the baskets of one customer; the rows are sorted by basket."""
    first = np.r_[True, invoice[1:] != invoice[:-1]]
    own_items, column = np.unique(item, return_inverse=True)
    bought = np.zeros((first.sum(), len(own_items)), dtype=np.float32)
    bought[np.cumsum(first) - 1, column] = 1
    count, recency = history_before(bought, day[first])
    basket, entry = np.nonzero(count)
    return {
        "item": own_items[entry],
        "log_count": np.log1p(count[basket, entry]),
        "recency": recency[basket, entry],
        "size": np.bincount(basket, minlength=len(bought)),
        "target_item": item,
        "target_size": bought.sum(1).astype(np.int64),
        "day": day[first],
        "earlier": np.arange(len(bought)),
    }


def history_before(bought: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count, for each basket of a customer, the earlier baskets with each item: plainly, and discounted by age.

    Args:
        bought: 1 where the basket has the item, ``[baskets, items]``, in order of time.
        day: ``[baskets]``.

    Returns:
        The count and the discounted count before each basket, both ``[baskets, items]``.
    """
    count = np.cumsum(bought, axis=0) - bought
    recency = np.zeros_like(bought)
    decay = 0.5 ** (np.diff(day) / HALF_LIFE_DAYS)
    for basket, factor in enumerate(decay, start=1):
        recency[basket] = (recency[basket - 1] + bought[basket - 1]) * factor
    return count, recency


def _popularity(train: Examples, items: int, last_day: int) -> np.ndarray:
    """Count the baskets with each item in the 30 days before each day, as log(1 + count)."""
    daily = np.zeros((last_day + 1, items), dtype=np.float32)
    day = np.repeat(train.day.astype(np.int64), np.diff(train.target_starts))
    np.add.at(daily, (day, train.target_item), 1)
    before = np.concatenate([np.zeros((1, items), dtype=np.float32), np.cumsum(daily, axis=0)])
    days = np.arange(last_day + 1)
    return np.log1p(before[days] - before[np.maximum(days - POPULAR_DAYS, 0)])


class NextBasket(Dataset):
    """Makes whole batches at once: ``__getitems__`` is what a plain ``DataLoader`` calls with a batch of indices.

    A batch is ``{"inputs": ..., "targets": ...}``. The inputs are what the model's ``forward`` takes, with the history
    of all its customers in one flat list; the targets are flat too: ``item`` and the ``row`` it belongs to.

    Args:
        examples: What to serve.
        popularity: ``Task.popularity``.
        augment: For training: forget a fifth of the history, and in half of the baskets show 10-70 % of the items
            and ask for the rest.
        seed: Of the augmentation.
    """

    def __init__(self, examples: Examples, popularity: np.ndarray, *, augment: bool = False, seed: int = 0) -> None:
        self.examples = examples
        self.popularity = popularity
        self.augment = augment
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, dict[str, torch.Tensor]]:
        rows = np.asarray(indices)
        entry, owner = positions(self.examples.starts, rows)
        target, target_owner = positions(self.examples.target_starts, rows)
        target_item = self.examples.target_item[target]
        log_count, recency = self.examples.log_count[entry], self.examples.recency[entry]
        weight = log_count + 0.5 * recency
        shown = np.zeros(len(target), dtype=bool)
        if self.augment:
            weight = weight * self._remembered(owner, len(rows))
            shown = self._shown(target_owner, has_history=np.bincount(owner, weight, minlength=len(rows)) > 0)
        history = {
            "item": np.r_[self.examples.item[entry], target_item[shown]],
            "weight": np.r_[weight, np.full(shown.sum(), 2.0)],
            "log_count": np.r_[log_count, np.zeros(shown.sum())],
            "recency": np.r_[recency, np.zeros(shown.sum())],
            "shown": np.r_[np.zeros(len(entry)), np.ones(shown.sum())],
        }
        return {
            "inputs": self._inputs(history, np.r_[owner, target_owner[shown]], rows),
            "targets": {
                "item": torch.from_numpy(target_item[~shown]),
                "row": torch.from_numpy(target_owner[~shown]),
            },
        }

    def _remembered(self, owner: np.ndarray, rows: int) -> np.ndarray:
        """Forget a fifth of a history of more than two items."""
        is_long = np.bincount(owner, minlength=rows) > 2
        return ~is_long[owner] | (self.rng.random(len(owner)) > 0.2)

    def _shown(self, owner: np.ndarray, has_history: np.ndarray) -> np.ndarray:
        """Choose which items of a basket are shown; at least one stays hidden. ``owner`` is sorted."""
        rows = len(has_history)
        size = np.bincount(owner, minlength=rows)
        is_split = (size > 2) & (~has_history | (self.rng.random(rows) < 0.5))
        share = np.where(is_split, self.rng.uniform(0.1, 0.7, rows), 0.0)
        shown = self.rng.random(len(owner)) < share[owner]
        shown[np.cumsum(size) - size + self.rng.integers(size)] = False
        return shown

    def _inputs(self, history: dict[str, np.ndarray], owner: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
        order = np.argsort(owner, kind="stable")
        length = np.sqrt(np.bincount(owner, history["weight"] ** 2, minlength=len(rows)) + 1e-6)
        history["weight"] = history["weight"] / length[owner]
        is_split = np.bincount(owner, history["shown"], minlength=len(rows)) > 0
        context = np.stack([np.ones(len(rows)), is_split, np.log1p(self.examples.earlier[rows])], axis=1)
        flat = {name: torch.from_numpy(values[order]) for name, values in history.items()}
        return {
            **{name: values if name == "item" else values.float() for name, values in flat.items()},
            "starts": torch.from_numpy(_starts(owner, len(rows))),
            "popularity": torch.from_numpy(self.popularity[self.examples.day[rows].astype(np.int64)]),
            "context": torch.from_numpy(context).float(),
        }


def relevant_and_seen(examples: Examples, items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which items each basket holds, and which its customer had bought before: bool ``[examples, items]``."""

    def dense(starts: np.ndarray, item: np.ndarray) -> torch.Tensor:
        table = np.zeros((len(examples), items), dtype=bool)
        table[np.repeat(np.arange(len(examples)), np.diff(starts)), item] = True
        return torch.from_numpy(table)

    return dense(examples.target_starts, examples.target_item), dense(examples.starts, examples.item)


def _as_made(batch: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Collate nothing: ``NextBasket`` has made the batch."""
    return batch


def loader(
    examples: Examples, popularity: np.ndarray, *, batch_size: int, train: bool = False, seed: int = 0
) -> DataLoader:
    """Return a loader of whole batches: shuffled and augmented for training, with its own seeded generators."""
    return DataLoader(
        NextBasket(examples, popularity, augment=train, seed=seed),
        batch_size=batch_size,
        shuffle=train,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_as_made,
    )


@cache
def load_purchases(path: str | None, synthetic: bool, customers: int | None) -> pd.DataFrame:
    """Return the real purchases or generated ones; of some customers, always the same, where a number is given."""
    if synthetic:
        return generate_purchases(customers=customers or 600)
    rows = merge_repeats(purchases(read_transactions(find_file(path))))
    if customers is None:
        return rows
    known = np.sort(rows["customer"].unique())
    return rows[rows["customer"].isin(np.random.default_rng(0).choice(known, customers, replace=False))]


@cache
def load_task(path: str | None, cut: str, synthetic: bool, customers: int | None) -> Task:
    """Return the task of a cut; what was read once is kept."""
    return build_task(load_purchases(path, synthetic, customers), *CUTS[cut])


class RetailData(pl.LightningDataModule):
    """The baskets before a cut to train on; the customers after it to rank for.

    Args:
        path: The Online Retail file or its folder; ``None`` is where ``find_file`` looks.
        cut: "test", or "validation": a month earlier, for whatever is to be chosen.
        synthetic: Take a generated shop in place of the file.
        customers: Take only this many, drawn at random; of the generated shop 600 where nothing is given.
        batch_size: Baskets in a batch.
        seed: Of shuffling and augmentation, which have generators of their own.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        cut: str = "test",
        synthetic: bool = False,
        customers: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if cut not in CUTS:
            raise ValueError(f"`cut` must be one of {', '.join(CUTS)}, got {cut!r}.")
        self.source = (path, cut, synthetic, customers)
        self.cut = cut
        self.batch_size = batch_size
        self.seed = seed

    @property
    def task(self) -> Task:
        """What is to be learned and ranked; read when it is first asked for."""
        return load_task(*self.source)

    def setup(self, stage: str) -> None:
        """Read the data before the Trainer asks for batches."""
        load_task(*self.source)

    def train_dataloader(self) -> DataLoader:
        """Return the baskets before the cut, shuffled and augmented in the same way for the same seed."""
        train, popularity = self.task.train, self.task.popularity
        return loader(train, popularity, batch_size=self.batch_size, train=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the customers after the cut."""
        return loader(self.task.evaluation, self.task.popularity, batch_size=self.batch_size)
