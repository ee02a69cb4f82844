"""ChannelPruning beside optimizers and gradients of another form, and what its event says of the ratio."""

import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Classifier, ConvNet, Quiet, assert_same_state, fit, new, trainer
from lightning_optim.callbacks import ChannelPruning, WeightPruning


class WithLBFGS(Quiet):
    """Trained by an optimizer with one flat state."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class Hoarder(torch.optim.SGD):
    """Remembers its parameters in a dict of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.by_index = dict(enumerate(self.param_groups[0]["params"]))


class WithHoarder(Quiet):
    """Trained by an optimizer that would go on with the old parameters."""

    def configure_optimizers(self):
        return Hoarder(self.parameters(), 0.1)


class SparseTable(Classifier):
    """A table with sparse gradients, its optimizer and that of the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.EmbeddingBag(40, 16, mode="sum", sparse=True)
        self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(self.table(x))

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self(batch).square().mean())
        self.last_gradient = self.table.weight.grad
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return [torch.optim.SparseAdam(self.table.parameters()), torch.optim.Adam(self.net.parameters())]


def channels(ratio=0.5, **words):
    return ChannelPruning(ratio, **{"events": 2, "start": 2, "end": 0.7, **words})


def test_a_flat_optimizer_state_is_reset_with_a_warning_and_training_goes_on(tmp_path):
    module = new(WithLBFGS)
    with pytest.warns(UserWarning, match="LBFGS keeps one state for all parameters, which cannot be sliced; reset"):
        run = fit(tmp_path, module, channels(scope="layer"))
    assert [module.net[i].out_features for i in (0, 4)] == [8, 8]
    (optimizer,) = run.optimizers
    assert optimizer.param_groups[0]["params"] == list(module.parameters())
    again = new(WithLBFGS)
    fit(tmp_path, again, channels(scope="layer", optimizer_state="reset"))  # asked for: no warning
    assert_same_state(again, module)


def test_an_optimizer_that_would_train_the_old_parameters_is_refused_before_the_first_step(tmp_path):
    module = new(WithHoarder)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"Hoarder keeps parameters in `by_index`.*torch\.optim\.AdamW"):
        fit(tmp_path, module, channels())
    assert_same_state(module, before)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_table_with_sparse_gradients_loses_columns(tmp_path, criterion):
    torch.manual_seed(0)
    module = SparseTable()
    rows = DataLoader(torch.randint(0, 40, (64, 3), generator=torch.Generator().manual_seed(0)), 8)
    run = trainer(tmp_path, channels(criterion=criterion, include=["table"]))
    run.fit(module, rows, rows)
    assert module.table.weight.shape == (40, 8)
    assert module.net[0].in_features == 8
    sparse, _ = run.optimizers
    assert sparse.state[module.table.weight]["exp_avg"].shape == (40, 8)
    assert module.last_gradient.is_sparse
    assert module.last_gradient.shape == (40, 8)


def test_weights_of_a_table_with_sparse_gradients_are_ranked_by_taylor(tmp_path):
    torch.manual_seed(0)
    module = SparseTable()
    rows = DataLoader(torch.randint(0, 40, (64, 3), generator=torch.Generator().manual_seed(0)), 8)
    words = {"criterion": "taylor", "include": ["table"], "start": 2, "end": 4, "every_n_steps": 2}
    trainer(tmp_path, WeightPruning(0.5, **words)).fit(module, rows, rows)
    assert (module.table.weight == 0).float().mean() >= 0.5


def test_the_line_of_an_event_says_what_is_missing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(tmp_path, new(ConvNet), channels(0.3, round_to=2, scope="layer"))
    assert any("4 of 16 channels gone in 2 groups (kept in multiples of 2);" in r.message for r in caplog.records)
    with pytest.warns(UserWarning, match=r"ChannelPruning: asked 14 channels gone, 8 are: groups are at their floor"):
        fit(tmp_path, new(ConvNet), channels(0.9, round_to=4, scope="layer"))
    assert any("gone in 2 groups (kept in multiples of 4), 6 fewer than asked;" in r.message for r in caplog.records)
