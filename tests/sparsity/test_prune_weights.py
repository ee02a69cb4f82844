"""Weights are set to zero in one call, and those that stay make up for them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from helpers.mixtures import Conv1D, Experts, as_linear
from helpers.models import Classifier, assert_same_state, fit, new, trainer, val_loader
from helpers.pretrained import MODELS
from lightning_optim import (
    QuantizationAwareTraining,
    WeightPruning,
    load_from_checkpoint,
    prune_weights,
    quantize_post_training,
)
from lightning_optim.functional.criteria import CRITERIA
from lightning_optim.functional.masks import global_masks, parse_granularity
from lightning_optim.functional.second_order import prune_columns
from lightning_optim.functional.sparsify import SPARSIFIERS
from lightning_optim.measure import SIZES
from lightning_optim.quantization.layers import QuantizedLinear


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, 3, generator=generator) @ torch.randn(3, features, generator=generator)
    return causes + 0.2 * torch.randn(rows, features, generator=generator)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def quietly(model, calls, **arguments):
    return prune_weights(model, calls, **{"progress_bar": False, **arguments})


def test_each_layer_is_pruned_for_what_the_pruned_ones_before_it_give():
    model, x = net(), [correlated(40, 16), correlated(30, 16, 1)]
    by_hand = copy.deepcopy(model)
    for place in (0, 2):
        with torch.no_grad():
            inputs = torch.cat([by_hand[:place](batch) for batch in x])
            by_hand[place].weight.copy_(prune_columns(by_hand[place].weight, inputs.T @ inputs, 0.6))
    report = quietly(model, x, sparsity=0.6)
    for place in (0, 2, 4):
        torch.testing.assert_close(model[place].weight, by_hand[place].weight)
    assert list(report.masks) == ["0.weight", "2.weight"]
    assert report.left_out["4.weight"] == "last layer"
    assert report.sparsity == pytest.approx(0.6, abs=0.002)
    assert all(torch.equal(mask, model.get_parameter(name) != 0) for name, mask in report.masks.items())
    assert 0 < report.errors["0.weight"] < 0.1
    assert "asked 60.00% zeros, achieved" in str(report)
    assert "last layer" in str(report)


@pytest.mark.parametrize("granularity", ["weight", "2:4", "1:4"])
def test_less_is_lost_than_by_criteria(granularity):
    x, losses = correlated(200, 16), {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        model = net()
        report = quietly(model, x.split(50), method=method, granularity=granularity)
        assert report.sparsity == pytest.approx(0.75 if granularity == "1:4" else 0.5, abs=0.002)
        with torch.no_grad():
            losses[method] = float((model(x) - net()(x)).square().mean())
    assert losses["sparsegpt"] < 0.7 * min(losses["wanda"], losses["magnitude"])


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_a_transformer_answers_nearer_to_its_dense_self_on_texts_it_has_not_seen(granularity):
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(3, 50, (4, 12), generator=generator)} for _ in range(24)]
    dense = MODELS["Llama"].make()
    dense.get_input_embeddings().weight.data.copy_(correlated(50, 32))  # words share few causes
    losses = {}
    for method in ("sparsegpt", "magnitude"):
        model = copy.deepcopy(dense)
        report = quietly(model, texts[:16], method=method, granularity=granularity)
        assert len(report.masks) == 21
        with torch.no_grad():
            losses[method] = sum(
                float((model(**text).logits - dense(**text).logits).square().mean()) for text in texts[16:]
            )
    assert losses["sparsegpt"] < 0.7 * losses["magnitude"]


def test_wanda_and_magnitude_are_those_of_weight_pruning():
    model, x = net(), correlated(100, 16)
    weight = model[0].weight.detach().clone()
    report = quietly(model, x.split(50), method="wanda", include=["0"])
    expected = global_masks({"0": weight.abs() * x.square().sum(0).sqrt()}, 0.5)["0"]
    assert torch.equal(report.masks["0.weight"], expected)
    assert torch.equal(model[0].weight, weight * expected)  # what stays is as it was
    model = net()
    report = quietly(model, None, method="magnitude", granularity="4x4", include=["0"])
    assert torch.equal(report.masks["0.weight"], global_masks({"0": weight.abs()}, 0.5, "4x4")["0"])


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_sparsity_by_layer(method):
    model = net()
    report = quietly(model, [correlated(50, 16)], method=method, sparsity={"0": 0.25, "4": 0.5})
    zeros = {name: float((~mask).float().mean()) for name, mask in report.masks.items()}
    assert zeros == pytest.approx({"0.weight": 0.25, "4.weight": 0.5}, abs=0.01)
    assert report.asked == {"0.weight": 0.25, "4.weight": 0.5}
    assert report.left_out["2.weight"] == "no pattern of sparsity"


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_conv1d_is_the_linear(method, granularity):
    torch.manual_seed(0)
    layer, x = Conv1D(6, 8), [correlated(50, 8)]
    nets = [nn.Sequential(layer, nn.Linear(6, 2)), nn.Sequential(as_linear(layer), nn.Linear(6, 2))]
    for each in nets:
        quietly(each, x, method=method, granularity=granularity)
    torch.testing.assert_close(nets[0][0].weight.t(), nets[1][0].weight)


@pytest.mark.parametrize("granularity", ["weight", "2:4", "2:4@unfold"])
def test_convolutions_are_what_they_unfold_to(granularity):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 5, 3, stride=2, padding=1)
    images = torch.randn(4, 8, 9, 9).cumsum(2)
    columns = unfold(images, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    weight, moment = layer.weight.detach().clone(), columns.T @ columns
    pruned = nn.Sequential(layer)
    quietly(pruned, [images], granularity=granularity, include=["0"])
    groups = {"2:4": layer.weight.movedim(1, -1).reshape(-1, 4), "2:4@unfold": layer.weight.reshape(-1, 4)}
    if granularity in groups:
        assert ((groups[granularity] != 0).sum(1) == 2).all()
    else:
        torch.testing.assert_close(layer.weight, prune_columns(weight.flatten(1), moment, 0.5).view_as(weight))
    with torch.no_grad():
        mask = global_masks({"w": weight.abs()}, 0.5, granularity)["w"]
        change, cut = ((each - weight).flatten(1) @ columns.T for each in (layer.weight, weight * mask))
    assert float(change.square().sum()) < 0.7 * float(cut.square().sum())


def test_zeros_that_are_there_stay_and_count():
    model, x = net(), [correlated(50, 16)]
    quietly(model, None, sparsity=0.3, method="magnitude")
    first = model[0].weight.detach() == 0
    report = quietly(model, x, sparsity=0.5)
    assert (model[0].weight[first] == 0).all()
    assert report.sparsity == pytest.approx(0.5, abs=0.002)
    again = quietly(model, x, sparsity=0.2)
    assert again.sparsity == report.sparsity


def test_pruned_then_rounded_keeps_its_zeros_and_less_is_lost_by_second_order():
    x, losses = correlated(200, 16), {}
    for sparse, rounded in (("sparsegpt", "gptq"), ("magnitude", "round")):
        model = net()
        report = quietly(model, x.split(50), method=sparse, granularity="2:4")
        words = {"weight_bits": 3, "activation_bits": None, "method": rounded, "progress_bar": False}
        quantize_post_training(model, x.split(50), **words)
        for name, mask in report.masks.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert (layer.quantized_weight()[~mask] == 0).all()
        with torch.no_grad():
            losses[sparse] = float((model(x) - net()(x)).square().mean())
    assert losses["sparsegpt"] < 0.5 * losses["magnitude"]


def test_training_goes_on_with_the_zeros_and_files_load_anywhere(tmp_path):
    module = new()
    dense = SIZES["nonzero"](module)
    report = quietly(module, val_loader(), granularity="2:4", include=[nn.Linear])
    assert SIZES["nonzero"](module) == dense - sum(int((~mask).sum()) for mask in report.masks.values())
    callbacks = [WeightPruning("hold", include=[nn.Linear]), QuantizationAwareTraining(weight_bits=4)]
    before = module.net[0]._parameters["weight"].detach().clone()
    run = fit(tmp_path, module, *callbacks, max_epochs=2)
    assert type(module.net[0]) is QuantizedLinear
    assert not torch.equal(module.net[0]._parameters["weight"], before)
    for name, mask in report.masks.items():
        assert torch.equal(callbacks[0].masks[name], mask)
        assert (module.get_submodule(name.removesuffix(".weight"))._parameters["weight"][~mask] == 0).all()
    run.save_checkpoint(tmp_path / "file.ckpt")
    assert_same_state(load_from_checkpoint(Classifier, tmp_path / "file.ckpt"), module)
    pruned = new()
    quietly(pruned, val_loader())
    alone = trainer(tmp_path)
    alone.strategy.connect(pruned)
    alone.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    assert_same_state(Classifier.load_from_checkpoint(tmp_path / "pruned.ckpt"), pruned)


class Mixture(nn.Module):
    """Experts compute their inputs inside; two layers share a weight; one is never called."""

    def __init__(self):
        super().__init__()
        self.layer, self.experts, self.unused = nn.Linear(8, 8), Experts(), nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.twin.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.other(self.twin(self.experts(self.layer(x)))))


def mixture() -> Mixture:
    torch.manual_seed(0)
    return Mixture()


def test_what_the_method_cannot_prune_is_left_out_with_its_reason():
    model = mixture()
    before = copy.deepcopy(model)
    report = quietly(model, [correlated(30, 8)])
    assert list(report.masks) == ["layer.weight"]
    assert report.left_out["experts.up_proj"].startswith("its inputs are known for Linear")
    assert report.left_out["twin.weight"] == "other layers share it, and receive other inputs"
    assert report.left_out["unused.weight"] == "no batch reaches it"
    for name in ("experts.up_proj", "twin.weight", "unused.weight", "head.weight"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))
    everything = quietly(mixture(), None, method="magnitude", sparsity=0.5)
    assert {"layer.weight", "experts.up_proj", "experts.down_proj", "twin.weight"} <= set(everything.masks)
    assert all(int(expert.sum()) == 48 for expert in everything.masks["experts.up_proj"])


@pytest.mark.parametrize("method", [*sorted(SPARSIFIERS), *sorted(CRITERIA)])
def test_every_registered_method_prunes_or_says_why_not(method):
    model = net()
    if "gradient" in CRITERIA[method].needs if method in CRITERIA else False:
        with pytest.raises(ValueError, match="needs the gradient of a training run"):
            quietly(model, [correlated(30, 16)], method=method)
        return
    report = quietly(model, [correlated(30, 16)], method=method, sparsity=0.4)
    assert report.sparsity == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("loader", "words", "message"),
    [
        (None, {}, "reads the inputs of the layers: pass a dataloader, or method='magnitude'"),
        ([], {}, "the dataloader has no batch"),
        ([torch.ones(3, 5)], {}, "forward of Mixture fails"),
        ([torch.ones(3, 8)], {"sparsity": 80}, "For 80 % zeros pass 0.8"),
        ([torch.ones(3, 8)], {"sparsity": "hold"}, "'hold' is for WeightPruning"),
        ([torch.ones(3, 8)], {"sparsity": 0.5, "granularity": "1:4"}, "ends at the sparsity 1 - n/m = 0.75"),
        ([torch.ones(3, 8)], {"sparsity": {"layer": 0.5, "layer.weight": 0.3}}, "matches no selected layer"),
        ([torch.ones(3, 8)], {"granularity": "row"}, "sparsegpt removes single weights"),
        ([torch.ones(3, 8)], {"method": "sparse"}, "unknown method 'sparse'; known: sparsegpt, lamp, magnitude"),
        ([torch.ones(3, 8)], {"method": {"sparsegpt": {"damping": -1}}}, "`damping` must be a number >= 0"),
        ([torch.ones(3, 8)], {"include": ["experts"]}, "cannot prune experts.up_proj: its inputs are known for"),
        ([torch.ones(3, 8)], {"include": ["unused"]}, "changed nothing: no batch reaches unused.weight"),
        ([torch.ones(3, 8)], {"exclude": ["*"]}, "prune_weights selects no layer"),
        ([torch.full((3, 8), torch.nan)], {}, "layer.weight cannot be pruned: the layer's inputs are not all finite"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(loader, words, message):
    model = mixture()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        quietly(model, loader, **words)
    assert_same_state(model, before)
    assert model.training
    assert not model.layer._forward_pre_hooks


def test_a_failure_half_way_gives_the_weights_back():
    model = net()

    def second_fails(weight, stats):
        if len(weight[0]) == 24:
            raise KeyboardInterrupt
        return weight.abs()

    with pytest.raises(KeyboardInterrupt):
        quietly(model, None, method=second_fails)
    assert_same_state(model, net())
    assert str(parse_granularity("2:4")) == "2:4"
