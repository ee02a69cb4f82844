"""The Banking77 messages: find the two files, read them, and hold out a part for validation.

The data set (questions of a bank's customers, each with one of 77 intents) belongs to its publisher and is no part of
this repository. Casanueva et al. 2020, "Efficient Intent Detection with Dual Sentence Encoders", arXiv:2003.04807.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

__all__ = ["Messages", "find_folder", "hold_out", "keep_intents", "read_messages"]

COLUMNS = ("text", "category")
FILE_NAMES = ("train.csv", "test.csv")
FOLDER_NAME = "banking77"
REPOSITORY = Path(__file__).resolve().parents[1]
WHERE_TO_GET_IT = (
    "Its publisher offers train.csv and test.csv in the folder banking_data of "
    "https://github.com/PolyAI-LDN/task-specific-datasets (CC BY 4.0): download both and pass --data FOLDER, "
    "or put them into the folder named by $LIGHTNING_OPTIM_DATA, or into its folder banking77. "
    "Without the files, --synthetic runs the same job on generated messages."
)


@dataclass(frozen=True)
class Messages:
    """Messages and their intents.

    Attributes:
        texts: As the customers wrote them.
        labels: Index of each message's intent, ``[messages]``.
        intents: Names of all intents, in the order of their indices.
    """

    texts: list[str]
    labels: np.ndarray
    intents: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> "Messages":
        return Messages([self.texts[row] for row in rows], self.labels[rows], self.intents)


def find_folder(path: str | Path | None = None) -> Path:
    """Return the folder that holds both files.

    Args:
        path: That folder, or the one above it, or one of the two files. ``None`` is the folder named by the
            environment variable ``LIGHTNING_OPTIM_DATA``, else ``../shared/data`` beside the repository.

    Raises:
        FileNotFoundError: If the files are not there; says where their publisher offers them.
    """
    place = Path(path or os.environ.get("LIGHTNING_OPTIM_DATA") or REPOSITORY.parent / "shared" / "data")
    folder = place.parent if place.is_file() else place
    for candidate in (folder / FOLDER_NAME, folder):
        if all((candidate / name).is_file() for name in FILE_NAMES):
            return candidate
    if folder.is_dir():
        missing = f"the folder {folder} does not hold the Banking77 files (looked for {' and '.join(FILE_NAMES)})."
    else:
        missing = f"there are no Banking77 files at {place}."
    raise FileNotFoundError(f"{missing} {WHERE_TO_GET_IT}")


def read_messages(folder: str | Path) -> tuple[Messages, Messages]:
    """Read the publisher's training and test messages.

    Raises:
        ValueError: If a file has other columns, or the test has an intent that the training messages lack.
    """
    train, test = (_read(Path(folder) / name) for name in FILE_NAMES)
    intents = sorted(train["category"].unique())
    unknown = sorted(set(test["category"]) - set(intents))
    if unknown:
        raise ValueError(
            f"{folder} holds files that do not belong together: test.csv has intents that train.csv lacks "
            f"({', '.join(unknown[:3])}). {WHERE_TO_GET_IT}"
        )
    return _messages(train, intents), _messages(test, intents)


def _read(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise ValueError(
            f"{path} is not a Banking77 table: it lacks the column(s) {', '.join(missing)} and has "
            f"{', '.join(rows.columns)}. {WHERE_TO_GET_IT}"
        )
    return rows


def _messages(rows: pd.DataFrame, intents: list[str]) -> Messages:
    number = {intent: index for index, intent in enumerate(intents)}
    return Messages(rows["text"].tolist(), rows["category"].map(number).to_numpy(dtype=np.int64, copy=True), intents)


def keep_intents(messages: Messages, kept: Sequence[int]) -> Messages:
    """Return the messages of some intents, renumbered in the given order."""
    position = np.full(len(messages.intents), -1)
    position[list(kept)] = np.arange(len(kept))
    chosen = messages[np.flatnonzero(position[messages.labels] >= 0)]
    return Messages(chosen.texts, position[chosen.labels], [messages.intents[intent] for intent in kept])


def hold_out(messages: Messages, share: float, seed: int = 0) -> tuple[Messages, Messages]:
    """Split off a fraction of the messages of every intent, the same for the same seed."""
    rows = np.arange(len(messages))
    rest, held_out = train_test_split(rows, test_size=share, random_state=seed, stratify=messages.labels)
    return messages[np.sort(rest)], messages[np.sort(held_out)]
