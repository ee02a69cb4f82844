"""Layers become two of low rank, without a Trainer."""

import copy

import pytest
import torch
from torch import nn

from lightning_optim import conform, export_onnx, factorize, prune_channels, quantize_post_training
from lightning_optim.checkpoint import plan_of
from lightning_optim.low_rank import LowRank
from lightning_optim.low_rank.change import Factorization, Factors


class Net(nn.Module):
    """Every kind of layer that can become two, and some that cannot."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 16, 1, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.line = nn.Conv1d(16, 12, 1, bias=False)
        self.hidden = nn.Linear(12, 16)
        self.thin = nn.Linear(16, 1)
        self.norm = nn.LayerNorm(1)
        self.head = nn.Linear(1, 3)

    def forward(self, x):
        x = self.grouped(self.point(self.stem(x).relu()).relu()).relu()
        x = self.line(x.flatten(2)).mean(2).relu()
        return self.head(self.norm(self.thin(self.hidden(x).relu())))


IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FEATURES = ("point", "line", "hidden")


def net(cls=Net):
    torch.manual_seed(0)
    return cls()


def quietly(model, data=None, **arguments):
    return factorize(model, [IMAGES] if data is None else data, progress_bar=False, **arguments)


def test_what_can_become_two_does_and_the_rest_says_why():
    model = net()
    report = quietly(model, rank=3)
    assert {name: each.rank for name, each in report.ranks.items()} == dict.fromkeys(FEATURES, 3)
    assert all(type(getattr(model, name)) is LowRank for name in FEATURES)
    assert report.left_out["stem"].startswith("a 3x3 convolution; only 1x1")
    assert report.left_out["grouped"] == "a 1x1 convolution of 4 groups; only 1x1 of one group"
    assert report.left_out["thin"] == "1x16: two factors would never be smaller"
    assert report.left_out["head"] == "last layer"
    assert "norm" not in report.left_out
    saved = report.parameters[0] - report.parameters[1]
    assert saved == sum(before - after for before, after in (each.parameters for each in report.ranks.values()))
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert "3 layers became two of low rank; parameters" in str(report)


@pytest.mark.parametrize("name", FEATURES)
def test_at_full_rank_the_two_layers_compute_what_the_one_did(name):
    """Stride, padding and bias included."""
    model, before = net(), net()
    layer = before.get_submodule(name)
    matrix = layer.weight.detach().flatten(1).double()
    basis = torch.eye(matrix.shape[1]).double()
    Factorization({name: Factors(basis, basis)})(model)
    torch.testing.assert_close(model.get_submodule(name).weight, layer.weight)
    torch.testing.assert_close(model(IMAGES), before(IMAGES))


@pytest.mark.parametrize("name", FEATURES)
def test_the_plan_makes_the_same_layers_of_a_fresh_model_and_back(name):
    model = net()
    report = quietly(model, rank=3, include=[name])
    fresh = net()
    conform(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert list(dict(fresh.named_parameters())) == list(dict(model.named_parameters()))
    layer = fresh.get_submodule(name)
    assert (layer.weight.shape, layer.rank) == (net().get_submodule(name).weight.shape, 3)
    conform(fresh, {**report.plan, "modules": {}})
    fresh.load_state_dict(net().state_dict())
    assert torch.equal(fresh(IMAGES), net()(IMAGES))
    assert repr(fresh) == repr(net())


def test_energy_is_what_is_kept_and_layers_where_two_are_not_smaller_stay():
    reports = {energy: quietly(net(), energy=energy, criterion="svd") for energy in (0.3, 0.6, 1.0)}
    for energy, report in reports.items():
        assert all(each.energy >= energy - 1e-6 for each in report.ranks.values())
    low, middle = reports[0.3].ranks, reports[0.6].ranks
    assert low["hidden"].rank < middle["hidden"].rank
    assert not reports[1.0].ranks
    assert "two factors are smaller up to rank 6" in reports[1.0].left_out["hidden"]
    assert reports[1.0].parameters[0] == reports[1.0].parameters[1]


def test_ranks_and_energies_by_pattern():
    report = quietly(net(), rank={"hidden": 2, nn.Conv1d: 0.25})
    assert {name: each.rank for name, each in report.ranks.items()} == {"line": 3, "hidden": 2}
    assert report.left_out["point"] == "no pattern of `rank` matches it"
    report = quietly(net(), energy={"hidden": 0.2, "*": 0.5}, criterion="svd")
    assert report.ranks["hidden"].energy < report.ranks["line"].energy


def test_the_weighted_directions_lose_less_than_the_plain_and_those_less_than_random_ones():
    torch.manual_seed(1)
    mixing = torch.randn(24, 24) * torch.logspace(0.7, -0.7, 24)
    x = torch.randn(256, 24) @ mixing
    dense = nn.Sequential(nn.Linear(24, 24), nn.Identity(), nn.Linear(24, 2))
    errors = {}
    for criterion in ("second_moment", "input_norm", "svd", "random"):
        model = copy.deepcopy(dense)
        quietly(model, [x], rank=6, criterion=criterion)
        with torch.no_grad():
            errors[criterion] = float((model[0](x) - dense[0](x)).square().mean())
    assert errors["second_moment"] < errors["input_norm"]
    assert errors["second_moment"] < errors["svd"] < errors["random"]


def test_statistics_are_those_of_all_batches_and_of_as_many_as_were_asked():
    whole, parts, one = net(), net(), net()
    quietly(whole, [IMAGES], rank=3)
    quietly(parts, IMAGES.split(2), rank=3)
    quietly(one, IMAGES.split(2), rank=3, batches=1)
    torch.testing.assert_close(whole.hidden.weight, parts.hidden.weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(whole.hidden.weight, one.hidden.weight, rtol=1e-3, atol=1e-4)


def test_the_mode_and_statistics_of_norms_stay():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2))
    model[3].eval()
    before = copy.deepcopy(model[1].state_dict())
    quietly(model, [torch.randn(16, 8)], rank=2)
    assert all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())
    assert model.training
    assert model[0].reduce.training
    assert not model[3].expand.training
    assert not model[0]._forward_pre_hooks
    assert not model[0].reduce._forward_pre_hooks


def test_a_layer_that_no_batch_reaches_stays():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(8, 8)
            self.last = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(super().forward(x))

    report = quietly(net(Unused), rank=2)
    assert report.left_out["spare"] == "stays whole: no batch reached it"


def test_a_weight_that_is_zero_stays():
    model = net()
    nn.init.zeros_(model.hidden.weight)
    assert quietly(model, rank=2).left_out["hidden"] == "stays whole: its weight is zero"


def test_shared_weights_stay_and_a_layer_with_two_names_becomes_two_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.again = self.first = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.again(self.first(self.table(x)).relu()))

    model = net(Tied)
    report = quietly(model, [torch.randint(20, (4, 5))], rank=2)
    assert list(report.ranks) == ["again"]
    assert model.first is model.again
    assert report.left_out == {"table": "Embedding weight", "head": "shared with table.weight"}
    fresh = net(Tied)
    conform(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    x = torch.randint(20, (4, 5))
    assert torch.equal(fresh(x), model(x))


def test_code_that_reads_the_weight_gets_the_product():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(encoder, nn.Linear(16, 2))
    x = torch.randn(2, 5, 16)
    report = quietly(model, [x], rank=4)
    assert list(report.ranks) == ["0.linear1", "0.linear2"]
    assert report.left_out["0.self_attn.out_proj"] == "nn.MultiheadAttention reads its projections as one tensor"
    model.eval()
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)  # the fused path reads linear1.weight


def test_the_attributes_of_the_layer_are_those_of_its_factors():
    model = net()
    quietly(model, rank=3)
    assert (model.hidden.in_features, model.hidden.out_features) == (12, 16)
    assert (model.point.in_channels, model.point.out_channels) == (12, 16)
    assert not hasattr(model.point, "in_features")
    prune_channels(model, IMAGES, pruning_ratio=0.5, scope="layer", include=["stem", "hidden.expand"])
    assert (model.point.in_channels, model.hidden.out_features) == (6, 8)


@pytest.mark.slow
def test_factors_lose_channels_and_are_quantized_and_exported(tmp_path):
    model = net()
    quietly(model, rank=3, include=["point", "hidden"])
    report = prune_channels(model, IMAGES, pruning_ratio=0.34, scope="layer", include=["hidden.reduce"])
    assert report.channels == {"hidden.reduce": (3, 2)}
    assert model.hidden.rank == 2
    export_onnx(model, tmp_path / "float.onnx", IMAGES)
    quantize_post_training(model, [IMAGES], progress_bar=False)
    assert type(model.point.reduce).__name__ == "QuantizedConv2d"
    assert export_onnx(model, tmp_path / "int.onnx", IMAGES)
    fresh = net()
    conform(fresh, plan_of(model).as_plain())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))


def test_a_model_that_is_rounded_stays_and_one_that_was_factorized_too():
    model = net()
    quantize_post_training(model, [IMAGES], progress_bar=False)
    with pytest.raises(ValueError, match=r"factorize can change nothing: .*hidden \(quantized already\)"):
        quietly(model, rank=3)
    model = net()
    quietly(model, rank=3)
    with pytest.raises(ValueError, match=r"line.reduce \(a factor of low rank already\)"):
        quietly(model, rank=2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"energy": 90}, r"`energy` must be a fraction in \(0, 1\], got 90. For 90 % pass 0.9."),
        ({"energy": 0.0}, r"`energy` must be a fraction in \(0, 1\], got 0.0"),
        ({"energy": "most"}, r"`energy` must be a fraction in \(0, 1\], got 'most'"),
        ({"energy": {}}, "`energy` as a dict maps patterns to numbers, got an empty one"),
        ({"energy": {"hidden": 2}}, r"`energy\['hidden'\]` must be a fraction"),
        ({"rank": 0}, r"`rank` must be an int >= 1 .* or a float in \(0, 1\)"),
        ({"rank": 1.5}, r"`rank` must be an int >= 1"),
        ({"rank": True}, r"`rank` must be an int \(the rank\)"),
        ({"rank": 4, "energy": 0.5}, "`rank` takes the place of `energy`; got rank=4 and energy=0.5"),
        ({"rank": {"hiden": 2}}, "rank: 'hiden' matches only layers that cannot become two of low rank: none"),
        ({"include": ["stem"]}, r"include: 'stem' matches only layers .*: stem \(a 3x3 convolution"),
        ({"include": ["nothing"]}, "include: 'nothing' matches no layer"),
        ({"exclude": ["*"]}, "factorize can change nothing: stem"),
        ({"criterion": "pca"}, "unknown low-rank criterion 'pca'"),
        ({"dataloader": None}, "pass a dataloader, or criterion='svd'"),
        ({"dataloader": []}, "the dataloader has no batch"),
        ({"dataloader": [torch.zeros(2, 5)]}, "forward of Net fails with the arguments taken from a batch"),
    ],
    ids=str,
)
def test_wrong_arguments_leave_the_model_as_it_was(arguments, error):
    model = net()
    with pytest.raises((ValueError, TypeError), match=error):
        factorize(model, progress_bar=False, **{"dataloader": [IMAGES], **arguments})
    assert repr(model) == repr(net())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_models_of_transformers():
    """T5 reads ``wo.weight.dtype``; GPT-2 has Conv1D, which stores ``[in, out]``."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 40}
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(40, (2, 6))
    quietly(t5, [{"input_ids": ids, "decoder_input_ids": ids}], rank=4)
    assert type(t5.encoder.block[0].layer[1].DenseReluDense.wo) is LowRank
    assert t5.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 4)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 40}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    expected = gpt(ids).logits
    layer = gpt.transformer.h[0].mlp.c_fc
    basis = torch.eye(16).double()
    Factorization({"transformer.h.0.mlp.c_fc": Factors(basis, basis)})(gpt)
    torch.testing.assert_close(gpt(ids).logits, expected)
    assert layer.weight.shape == (64, 16)  # as that of a Linear: its factors are two
    report = quietly(gpt, [{"input_ids": ids}], rank=4)
    assert len(report.ranks) == 7
    assert report.ranks["transformer.h.1.mlp.c_proj"].parameters == (1024, 320)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    conform(plain, report.plan)
    plain.load_state_dict(gpt.state_dict())
    assert torch.equal(plain(ids).logits, gpt(ids).logits)
