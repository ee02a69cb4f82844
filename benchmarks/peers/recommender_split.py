"""The recommender of the examples with its layers in one module, which peers that make a new module can exchange."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from recommender_model import TwoTower

__all__ = ["ServedNet", "SplitTower"]


class Net(nn.Module):
    """The layers of a tower: items bought, where customers begin, weights -> scores of all items."""

    def __init__(self, tower: TwoTower) -> None:
        super().__init__()
        self.history, self.mlp, self.norm, self.item = tower.history, tower.mlp, tower.norm, tower.item

    def forward(self, item: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
        bag = self.history(item, starts, per_sample_weights=weight)
        return self.item(self.norm(self.mlp(bag) + bag))


class SplitTower(TwoTower):
    """A tower of the same layers and parameters; its optimizer and its steps are the tower's."""

    def __init__(self, tower: TwoTower) -> None:
        LightningModule.__init__(self)
        self.save_hyperparameters(dict(tower.hparams))
        self.net = Net(tower)
        self.terms = tower.terms

    @property
    def history(self) -> nn.Module:
        return self.net.history

    @property
    def item(self) -> nn.Module:
        return self.net.item

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
        scores = self.net(item, starts, weight)
        count_factor, recency_factor, popularity_factor = (context @ self.terms).unbind(1)
        owner = self._owner(starts)
        bought = count_factor[owner] * log_count + recency_factor[owner] * recency - 20 * shown
        return (scores + popularity_factor[:, None] * popularity).index_put((owner, item), bought, accumulate=True)


class ServedNet(nn.Module):
    """What is exported: customers padded to one length, as the examples' ``Serving`` takes them."""

    def __init__(self, net: nn.Module, terms: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("terms", terms.detach().clone())

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
        starts = torch.arange(item.shape[0] + 1) * item.shape[1]
        scores = self.net(item.flatten(), starts, weight.flatten())
        count_factor, recency_factor, popularity_factor = (context @ self.terms).unsqueeze(1).unbind(2)
        bought = count_factor * log_count + recency_factor * recency - 20 * shown
        return (scores + popularity_factor * popularity).scatter_add(1, item, bought)
