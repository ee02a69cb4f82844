"""A two-tower recommender: one tower reads what a customer bought, the other is a table of items.

An ordinary LightningModule of plain layers; it knows nothing of lightning_optim.
"""

import copy
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ranking import hits_at_k, recall

__all__ = ["RAGGED", "Serving", "TwoTower", "deployed", "padded"]

WARM_UP_STEPS = 50
LAST_RATE = 0.02  # of the learning rate, after the linear decay
RAGGED = ("item", "weight", "log_count", "recency", "shown")  # what has a number for each entry of a customer


class TwoTower(LightningModule):
    """Scores every item of a catalogue for every customer of a batch.

    The customer's vector is a weighted sum of history vectors, passed through an MLP with a skip connection and a
    LayerNorm; an item's score is its product with the item's vector plus a bias. Added to the scores are what the net
    learns to make of "bought before" and of "popular lately", given the number of earlier baskets.

    Args:
        items: Size of the catalogue.
        width: Length of the vectors.
        hidden: Widths of the MLP's hidden layers.
        dropout: After every hidden layer.
        learning_rate: Of AdamW; tables learn three times, the added terms ten times as fast.
        k: Length of the list that ``val_recall`` and ``val_new_recall`` (without what was bought before) judge.
    """

    def __init__(
        self,
        items: int,
        *,
        width: int = 64,
        hidden: tuple[int, ...] = (128,),
        dropout: float = 0.3,
        learning_rate: float = 1.5e-3,
        k: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.history = nn.EmbeddingBag(items, width, mode="sum", include_last_offset=True)
        self.mlp = nn.Sequential()
        for inputs, outputs in zip((width, *hidden), hidden, strict=False):
            self.mlp.extend([nn.Linear(inputs, outputs), nn.GELU(), nn.Dropout(dropout)])
        self.mlp.append(nn.Linear(hidden[-1], width))
        self.norm = nn.LayerNorm(width)
        self.item = nn.Linear(width, items)
        # context (one, basket is shown in part, log of earlier baskets) -> factors of (log count, recency, popularity)
        self.terms = nn.Parameter(torch.tensor([[3.0, 0.5, 0.7], [-2.0, -0.3, 0.2], [0.3, 0.0, -0.1]]))
        nn.init.normal_(self.history.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.05)
        nn.init.zeros_(self.item.bias)
        self.example_input_array = _one_customer(items)

    def forward(
        self,
        item: Tensor,
        starts: Tensor,
        weight: Tensor,
        log_count: Tensor,
        recency: Tensor,
        shown: Tensor,
        popularity: Tensor,
        context: Tensor,
    ) -> Tensor:
        """Return scores ``[customers, items]``.

        Args:
            item: Items bought before or shown now, of all customers one after the other, ``[entries]``.
            starts: Where each customer's entries begin, and their number, ``[customers + 1]``.
            weight: Of each entry in the customer's vector, ``[entries]``.
            log_count: log(1 + earlier baskets with the item), ``[entries]``.
            recency: The same baskets discounted by age, ``[entries]``.
            shown: 1 for an item that is in the basket already (and is not asked for again), ``[entries]``.
            popularity: log(1 + baskets with the item in the last 30 days), ``[customers, items]``.
            context: One, whether a part of the basket is shown, log(1 + earlier baskets), ``[customers, 3]``.
        """
        bag = self.history(item, starts, per_sample_weights=weight)
        scores = self.item(self.norm(self.mlp(bag) + bag))
        count_factor, recency_factor, popularity_factor = (context @ self.terms).unbind(1)
        owner = self._owner(starts)
        bought = count_factor[owner] * log_count + recency_factor[owner] * recency - 20 * shown
        return (scores + popularity_factor[:, None] * popularity).index_put((owner, item), bought, accumulate=True)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        log_probability = self(**batch["inputs"]).log_softmax(1)
        row, item = batch["targets"]["row"], batch["targets"]["item"]
        share = 1 / row.bincount()[row]
        return -(share * log_probability[row, item]).sum() / len(log_probability)

    def validation_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> None:
        scores = self(**batch["inputs"])
        relevant = torch.zeros_like(scores, dtype=torch.bool)
        relevant[batch["targets"]["row"], batch["targets"]["item"]] = True
        self._log_recall("val_recall", scores, relevant)
        seen = torch.zeros_like(relevant)
        seen[self._owner(batch["inputs"]["starts"]), batch["inputs"]["item"]] = True
        new = relevant & ~seen
        asks = new.any(1)
        self._log_recall("val_new_recall", scores.masked_fill(seen, -torch.inf)[asks], new[asks])

    def _log_recall(self, name: str, scores: Tensor, relevant: Tensor) -> None:
        found = recall(hits_at_k(scores, relevant, self.hparams.k), relevant.sum(1))
        self.log(name, found.mean(), batch_size=len(found), prog_bar=True)

    @staticmethod
    def _owner(starts: Tensor) -> Tensor:
        """Return which customer each entry belongs to."""
        return torch.repeat_interleave(starts.diff())

    def configure_optimizers(self) -> dict[str, object]:
        tables = [self.history.weight, self.item.weight]
        named = {id(parameter) for parameter in (*tables, self.terms)}
        others = [parameter for parameter in self.parameters() if id(parameter) not in named]
        rate = self.hparams.learning_rate
        optimizer = torch.optim.AdamW(
            [
                {"params": others},
                {"params": tables, "lr": 3 * rate},
                {"params": [self.terms], "lr": 10 * rate, "weight_decay": 0.0},
            ],
            lr=rate,
            weight_decay=1e-2,
            fused=True,
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARM_UP_STEPS) * max(LAST_RATE, 1 - step / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _one_customer(items: int) -> dict[str, Tensor]:
    """Make up what forward receives for one customer: of a ragged batch no row can be cut."""
    entries = torch.arange(min(items, 3))
    ones = torch.ones(len(entries))
    return {
        "item": entries,
        "starts": torch.tensor([0, len(entries)]),
        "weight": ones / len(entries) ** 0.5,
        "log_count": ones,
        "recency": ones,
        "shown": torch.zeros(len(entries)),
        "popularity": torch.ones(1, items),
        "context": torch.tensor([[1.0, 0.0, 1.0]]),
    }


class Serving(nn.Module):
    """A trained recommender as it is deployed: customers padded to one length, since engines know no ragged bags.

    Layers and parameters are the recommender's own, quantized where those are; a padded entry has weight 0 and adds
    nothing.
    """

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.history = copy.copy(model.history)  # the same table
        self.history.include_last_offset = False  # bags are rows now
        self.mlp, self.norm, self.item = model.mlp, model.norm, model.item
        self.register_buffer("terms", model.terms.detach())

    def forward(
        self,
        item: Tensor,
        weight: Tensor,
        log_count: Tensor,
        recency: Tensor,
        shown: Tensor,
        popularity: Tensor,
        context: Tensor,
    ) -> Tensor:
        """Return scores ``[customers, items]``; the first five are ``[customers, entries]``, else as ``TwoTower``."""
        bag = self.history(item, per_sample_weights=weight)
        scores = self.item(self.norm(self.mlp(bag) + bag))
        count_factor, recency_factor, popularity_factor = (context @ self.terms).unsqueeze(1).unbind(2)
        bought = count_factor * log_count + recency_factor * recency - 20 * shown
        return (scores + popularity_factor * popularity).scatter_add(1, item, bought)


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``Serving`` takes of what ``TwoTower`` takes."""
    lengths = inputs["starts"].diff().tolist()
    return {
        **{name: _filled_up(inputs[name].split(lengths)) for name in RAGGED},
        "popularity": inputs["popularity"],
        "context": inputs["context"],
    }


def deployed(model: TwoTower, batch: dict[str, dict[str, Tensor]]) -> tuple[Serving, dict[str, Tensor]]:
    """Return a trained recommender as it is deployed, and what it takes of a batch: for ``--prepare``."""
    return Serving(model), padded(batch["inputs"])


def _filled_up(parts: Sequence[Tensor]) -> Tensor:
    """Fill up with zeros to the longest, and to one entry where all are empty: an EmbeddingBag takes no empty rows."""
    return nn.utils.rnn.pad_sequence([*parts, parts[0].new_zeros(1)], batch_first=True)[:-1]
