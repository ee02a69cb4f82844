"""Channel pruning in one call."""

import copy

import pytest
import torch
from torch import nn

from helpers.models import Classifier, data, fit, new
from helpers.nets import PRUNABLE, Attention, Block, Net, images, sequences
from lightning_optim import conform, load_from_checkpoint
from lightning_optim.structured.prune import prune_channels


def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("name", PRUNABLE)
def test_half_of_the_channels_leave_every_kind_of_net(name):
    make, inputs, expected = PRUNABLE[name]
    module, example = make(), inputs()
    report = prune_channels(module, example, scope="layer")
    assert set(report.channels) == set(expected)
    assert report.parameters[1] < report.parameters[0]
    assert report.parameters[1] == sum(p.numel() for p in module.parameters())
    assert 0 < report.pruning_ratio <= 0.5


def test_the_report_lists_what_was_removed_and_why_the_rest_was_not():
    module = mlp()
    report = prune_channels(module, torch.zeros(1, 8), pruning_ratio=0.5, scope="layer")
    assert report.channels == {"0": (32, 16), "2": (16, 8)}
    assert report.parameters == (8 * 32 + 32 + 32 * 16 + 16 + 16 * 4 + 4, 8 * 16 + 16 + 16 * 8 + 8 + 8 * 4 + 4)
    assert report.pruning_ratio == 0.5
    assert report.left_out == {"4": "last layer"}
    assert "50.0% of the channels removed; parameters 884 -> 316" in str(report)
    assert "last layer" in str(report)


def test_ratios_by_layer_and_a_part_of_the_model():
    outer = nn.Sequential()
    outer.add_module("body", mlp())
    outer.add_module("head", nn.Linear(4, 2))
    report = prune_channels(outer, torch.zeros(1, 8), module="body", pruning_ratio={"body.0": 0.25})
    assert report.channels["0"] == (32, 24)
    assert report.channels["2"] == (16, 16)
    outer(torch.zeros(1, 8))


def test_a_lightning_module_saves_and_reloads_in_its_class(tmp_path):
    module = new()
    prune_channels(module, torch.zeros(2, 12), pruning_ratio=0.5)
    run = fit(tmp_path, module, max_epochs=1)
    run.save_checkpoint(tmp_path / "pruned.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    x = data().tensors[0]
    for name in ("pruned.ckpt", "weights.ckpt"):
        loaded = load_from_checkpoint(Classifier, tmp_path / name)
        assert loaded.net[0].out_features == module.net[0].out_features < 16
        assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_plain_module_is_rebuilt_from_the_plan_even_after_two_calls():
    torch.manual_seed(0)
    module, example = Block(Attention()), sequences()
    prune_channels(module, example, pruning_ratio=0.25, include=["up"])
    report = prune_channels(module, example, scope="layer")
    assert module.attention.num_heads == 2
    fresh = Block(Attention())
    conform(fresh, report.plan)
    fresh.load_state_dict(module.state_dict())
    assert fresh.attention.num_heads == 2
    assert torch.equal(fresh(example), module(example))
    assert torch.equal(copy.deepcopy(module)(example), module(example))


def test_taylor_reads_the_gradients_that_are_there():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.ones_(module[0].weight)
    with torch.no_grad():
        module[2].weight.copy_(torch.tensor([[9.0, 1, 5, 2]]))
    with pytest.raises(ValueError, match="needs the gradient"):
        prune_channels(module, torch.ones(1, 2), criterion="taylor")
    module(torch.ones(1, 2)).sum().backward()
    prune_channels(module, torch.ones(1, 2), criterion="taylor")
    assert module[2].weight.tolist() == [[9, 5]]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"pruning_ratio": 50}, ValueError, "pass 0.5"),
        ({"scope": "all"}, ValueError, "`scope`"),
        ({"criterion": "size"}, ValueError, "unknown criterion"),
        ({"module": "nowhere"}, ValueError, "names no module"),
        ({"exclude": ["*"]}, ValueError, r"can remove nothing: .*excluded by '\*'"),
        ({"pruning_ratio": {"9": 0.5}}, ValueError, "'9' matches no group"),
    ],
)
def test_bad_arguments_change_nothing(words, error, message):
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        prune_channels(module, torch.zeros(1, 8), **words)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_without_the_check_what_tracing_says_is_done():
    module = Net(lambda s, x: s.b(s.a(x).softmax(-1)), a=nn.Linear(32, 16), b=nn.Linear(16, 5))
    with pytest.raises(ValueError, match="can remove nothing"):
        prune_channels(module, sequences())
    assert prune_channels(module, sequences(), check=False).channels == {"a": (16, 8)}


def test_frozen_layers_stay_frozen_and_the_mode_stays():
    module, example = PRUNABLE["residual"][0](), images()
    module.requires_grad_(False).train()
    prune_channels(module, example)
    assert not any(p.requires_grad for p in module.parameters())
    assert module.training


def blocks_of(groups, width=32):
    """Residual blocks whose inner channels go through a GroupNorm."""

    class NormBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width)
            self.b = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return x + self.b(self.norm(self.a(x)).relu())

    return nn.Sequential(nn.Conv2d(3, width, 3), NormBlock(), NormBlock(), nn.Flatten(), nn.Linear(width * 36, 4))


UNITS = [(2, None), (8, None), (16, None), (1, 8), (2, 16)]


@pytest.mark.parametrize(("groups", "round_to"), UNITS)
@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_the_ratio_is_reached_within_one_unit_of_one_group(groups, round_to, ratio):
    torch.manual_seed(0)
    report = prune_channels(blocks_of(groups), images(), pruning_ratio=ratio, round_to=round_to)
    before, after = (sum(pair[i] for pair in report.channels.values()) for i in (0, 1))
    assert before == 96
    assert 0 <= ratio * before - (before - after) < max(groups, round_to or 1)
    assert len(set(report.channels.values())) > 1 or groups == 1


@pytest.mark.parametrize(("groups", "round_to"), UNITS)
@pytest.mark.parametrize("ratio", [0.25, 0.4])
@pytest.mark.filterwarnings("ignore:prune_channels. asked .* channels gone:UserWarning")
def test_with_scope_layer_each_is_within_one_unit_and_equal_blocks_stay_equal(groups, round_to, ratio):
    torch.manual_seed(0)
    report = prune_channels(blocks_of(groups), images(), pruning_ratio=ratio, scope="layer", round_to=round_to)
    unit = max(groups, round_to or 1)
    assert all(-unit < ratio * before - (before - after) < unit for before, after in report.channels.values())
    assert report.channels["1.a"] == report.channels["2.a"]


def test_each_pattern_reaches_its_own_ratio():
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 4))
    report = prune_channels(module, torch.zeros(1, 32), pruning_ratio={"[02]": 0.375, "4": 0.5}, round_to=8)
    assert {name: after for name, (_, after) in report.channels.items()} == {"0": 24, "2": 16, "4": 16, "6": 32} or {
        name: after for name, (_, after) in report.channels.items()
    } == {"0": 16, "2": 24, "4": 16, "6": 32}


def test_a_ratio_that_floors_keep_out_of_reach_is_said():
    with pytest.warns(UserWarning, match=r"prune_channels: asked 43 channels gone, 32 are: groups are at their floor"):
        prune_channels(mlp(), torch.zeros(1, 8), pruning_ratio=0.9, scope="layer", round_to=8)
