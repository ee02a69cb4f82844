"""Multiply-accumulate operations by hand arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.nets import Net
from lightning_optim.measure.macs import count_macs

TOKENS, WIDTH, FEED_FORWARD = 6, 32, 64

CASES = {
    # name: (module, inputs, operations)
    "linear": (lambda: nn.Linear(8, 4), lambda: torch.zeros(3, 8), 3 * 8 * 4),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda: torch.zeros(2, 3, 5, 7), 2 * 5 * 7 * 8 * 3 * 9),
    "grouped convolution": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.zeros(1, 4, 5, 5), 9 * 8 * 2 * 9),
    "norm and activation are not counted": (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()),
        lambda: torch.zeros(3, 8),
        3 * 8 * 4,
    ),
    "transformer encoder, which has a fused path": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, FEED_FORWARD, batch_first=True),
        lambda: torch.zeros(1, TOKENS, WIDTH),
        TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * FEED_FORWARD) + 2 * TOKENS * TOKENS * WIDTH,
    ),
    "scaled dot product attention": (
        lambda: Net(lambda s, x: F.scaled_dot_product_attention(x, x, x), unused=nn.Linear(1, 1)),
        lambda: torch.zeros(1, 2, TOKENS, 8),
        2 * 2 * TOKENS * TOKENS * 8,
    ),
    "keywords": (lambda: nn.Linear(8, 4), lambda: {"input": torch.zeros(1, 8)}, 32),
    "a loop over time": (
        lambda: nn.GRU(8, 5, batch_first=True),
        lambda: torch.zeros(1, 7, 8),
        7 * 3 * 5 * (8 + 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_of_hand_arithmetic(name):
    make, inputs, expected = CASES[name]
    assert count_macs(make(), inputs()) == expected


def test_counting_changes_nothing():
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[1].eval()
    fast, state = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    count_macs(module, torch.randn(3, 8, generator=torch.Generator()))
    assert [layer.training for layer in module.modules()] == [True, True, False, True]
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.is_grad_enabled()


def test_flags_come_back_after_an_error():
    module = nn.Linear(8, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(module, torch.zeros(3, 9))
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_nothing_counted_warns():
    with pytest.warns(UserWarning, match="no operation of ReLU was counted"):
        assert count_macs(nn.ReLU(), torch.zeros(3)) == 0
