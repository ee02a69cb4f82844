"""The intents net's teacher: all-MiniLM-L6-v2, frozen, with a linear head fitted to the labels.

Its logits of the training messages are computed from one vector per message, once, and written to a file of cached
logits. So no training run needs the teacher itself.
"""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from intents_data import numbered
from intents_model import MessagePieces, loader
from lightning_optim.distillation import Indexed, LogitCache, Teacher
from word_pieces import PADDING, SPECIAL, Vocabulary, find_minilm

__all__ = ["SentenceTeacher", "encode", "find_teacher", "load_teacher", "write_cache"]

ENCODING_BATCH_SIZE = 32  # a fifth faster than 128 on one core: what is computed stays in its cache
ENCODED_TOGETHER = 2  # batches, a core each: two threads in one batch took longer than one beside a busy process
HEAD_C = 30  # of the logistic regression, by the validation part


def find_teacher() -> Path | None:
    """Return the encoder's folder; None if one of the two optional packages is missing."""
    return find_minilm() if importlib.util.find_spec("transformers") is not None else None


class SentenceTeacher(nn.Module):
    """MiniLM's mean vector of a message, normalized, and a linear head.

    Its inputs are the student's: the student's pieces are MiniLM's, renumbered.

    Args:
        encoder: MiniLM, a transformers model.
        numbers: MiniLM's numbers of ``[CLS]`` and ``[SEP]``, and then of each of the student's pieces.
        intents: Number of intents.
    """

    def __init__(self, encoder: nn.Module, numbers: Sequence[int], intents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.first, self.last, *known = numbers
        self.register_buffer("known", torch.tensor(known))
        self.head = nn.Linear(encoder.config.hidden_size, intents)

    def vectors(self, pieces: Tensor) -> Tensor:
        """Return one vector of length 1 per message, ``[messages, width]``."""
        lengths = (pieces != PADDING).sum(1, keepdim=True)
        tokens = F.pad(self.known[pieces], (1, 1))
        tokens[:, 0] = self.first
        tokens.scatter_(1, lengths + 1, self.last)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = places < lengths + 2
        hidden = self.encoder(  # places and types are given: with the encoder's own a file has a longest message
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=places.expand_as(tokens),
            token_type_ids=torch.zeros_like(tokens),
        ).last_hidden_state
        return F.normalize((hidden * mask.unsqueeze(2)).sum(1), dim=1)

    def forward(self, pieces: Tensor) -> Tensor:
        return self.head(self.vectors(pieces))

    def fit_head(self, vectors: Tensor, labels: np.ndarray) -> None:
        """Fit the head by logistic regression."""
        fitted = LogisticRegression(C=HEAD_C, max_iter=1000).fit(vectors.numpy(), labels)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(fitted.coef_))
            self.head.bias.copy_(torch.from_numpy(fitted.intercept_))


def load_teacher(folder: Path, vocabulary: Vocabulary, intents: int) -> SentenceTeacher:
    """Load MiniLM from its folder, for the student's pieces; the head is not fitted yet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: all files are here
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report that the file's pooler, which no one needs, was left out
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    all_pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    place = {piece: number for number, piece in enumerate(all_pieces)}
    numbers = [place[piece] for piece in ("[CLS]", "[SEP]", *SPECIAL, *vocabulary.numbers)]
    return SentenceTeacher(encoder, numbers, intents).eval()


def encode(teacher: SentenceTeacher, messages: MessagePieces) -> Tensor:
    """Return the vectors of all messages, in their order; the batches are of similar length."""
    found = torch.empty(len(messages), teacher.head.in_features)

    @torch.inference_mode()
    def fill(batch: Indexed) -> None:
        (pieces, _), index = batch
        found[index] = teacher.vectors(pieces)

    with ThreadPoolExecutor(ENCODED_TOGETHER) as pool:
        list(pool.map(fill, numbered(loader(messages, batch_size=ENCODING_BATCH_SIZE))))
    return found


def write_cache(path: Path, teacher: nn.Module, answers: Tensor) -> None:
    """Write the teacher's logits of every training message, ``[messages, intents]``."""
    indexed = [(torch.arange(len(answers)), answers)]
    LogitCache.build(path, indexed, teacher=Teacher.of(teacher).checksum(), rows=len(answers), progress=False)
