"""Which layers are divided by features: the first of a pair by outputs, the second by inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.gpt import GPT, Language
from lightning_optim.strategies.tensor import COLUMN_NAMES, ROW_NAMES, find_pairs, given_pairs


class Gated(nn.Module):
    """As in Llama: two layers before, one after."""

    def __init__(self, inner=12):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, inner), nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Named(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def test_attention_and_feed_of_every_block():
    """Six layers a block, as the attention's four and the feed's two; nothing of embedding, norms and head."""
    expected = {}
    for place in range(2):
        expected |= {f"net.blocks.{place}.attention.{name}_proj": "col" for name in "qkv"}
        expected[f"net.blocks.{place}.attention.o_proj"] = "row"
        expected |= {f"net.blocks.{place}.feed.fc1": "col", f"net.blocks.{place}.feed.fc2": "row"}
    assert find_pairs(Language(), 2) == expected


def test_gated_layers():
    assert find_pairs(Gated(), 4) == {"gate_proj": "col", "up_proj": "col", "down_proj": "row"}


def test_column_and_row_names_are_apart():
    assert not set(COLUMN_NAMES) & set(ROW_NAMES)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_parts_add_up_to_the_whole(size):
    """Each device computes with its part of the features; the sum after the second layer is the layer pair's."""
    module, x = Gated(12).double(), torch.randn(5, 8, dtype=torch.float64)
    plan = find_pairs(module, size)
    total = torch.zeros(5, 8, dtype=torch.float64)
    for part in range(size):
        keep = slice(part * 12 // size, (part + 1) * 12 // size)
        cut = {
            name: (layer.weight[keep], layer.bias[keep]) if plan[name] == "col" else (layer.weight[:, keep], None)
            for name, layer in module.named_children()
        }
        hidden = F.silu(F.linear(x, *cut["gate_proj"])) * F.linear(x, *cut["up_proj"])
        total += F.linear(hidden, *cut["down_proj"])
    torch.testing.assert_close(total + module.down_proj.bias, module(x))


def test_features_that_do_not_divide_leave_the_pair_whole():
    assert find_pairs(Gated(12), 5) == {}
    assert find_pairs(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), 4) == {}


def test_a_column_without_its_row_is_left_whole():
    assert find_pairs(Named(fc1=nn.Linear(8, 8), last=nn.Linear(8, 8)), 2) == {}
    assert find_pairs(Named(fc1=nn.Linear(8, 16), fc2=nn.Linear(8, 8)), 2) == {}  # fc2 reads something else
    assert find_pairs(Named(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8), w2=nn.Linear(8, 8)), 2) == {}  # which of them?


def test_linear_activation_linear_in_a_sequence():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.GELU())
    assert find_pairs(net, 2) == {"0": "col", "2": "row"}
    longer = nn.Sequential(*net, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_pairs(longer, 2) == {"0": "col", "2": "row", "4": "col", "6": "row"}


@pytest.mark.parametrize("between", [nn.Softmax(-1), nn.GLU(), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.PReLU(8)])
def test_what_mixes_features_or_has_weights_per_feature_is_no_activation(between):
    assert find_pairs(nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 4)), 2) == {}


def test_torch_attention_and_its_layers_are_left_whole():
    """They read their weights themselves."""
    assert find_pairs(nn.TransformerEncoderLayer(16, 2, 32), 2) == {}
    assert find_pairs(nn.TransformerDecoderLayer(16, 2, 32), 2) == {}
    assert find_pairs(nn.MultiheadAttention(16, 2), 2) == {}


def test_subclasses_of_linear_are_left_whole():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.mean()

    assert find_pairs(Named(fc1=Scaled(8, 16), fc2=nn.Linear(16, 8)), 2) == {}


def test_a_given_plan():
    """The first pattern that matches counts."""
    plan = {"*.fc1": "col", "*.0.*.fc2": "row", "*.fc2": "row"}
    assert given_pairs(GPT(16, 2, 2), plan, 2) == {
        "blocks.0.feed.fc1": "col",
        "blocks.0.feed.fc2": "row",
        "blocks.1.feed.fc1": "col",
        "blocks.1.feed.fc2": "row",
    }


def test_a_pattern_that_matches_nothing():
    with pytest.raises(
        ValueError, match=r"tensor_plan: '\*\.inner' matches no Linear layer. Linear layers: gate_proj, "
    ):
        given_pairs(Gated(), {"*.inner": "col"}, 2)


@pytest.mark.parametrize(("plan", "what"), [({"up_proj": "col"}, "12 outputs"), ({"down_proj": "row"}, "12 inputs")])
def test_given_features_that_do_not_divide(plan, what):
    with pytest.raises(ValueError, match=rf"_proj has {what}, which is not a multiple of the 5 devices"):
        given_pairs(Gated(), plan, 5)
