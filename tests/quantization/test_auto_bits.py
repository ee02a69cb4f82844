"""Bits chosen for each layer under a budget."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.models import assert_same_state, new, val_loader
from helpers.pretrained import IDS, MODELS
from lightning_optim import quantize_post_training
from lightning_optim.functional.bit_allocation import allocate_bits
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.quantization.auto_bits import choose_bits
from lightning_optim.quantization.prepare import quantized_layers
from lightning_optim.target import ForwardInputs


@given(
    costs=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    budget=st.floats(2.0, 4.0),
)
def test_no_choice_within_the_budget_costs_less(costs, sizes, budget):
    named = {str(place): dict(zip((2, 3, 4), each, strict=True)) for place, each in enumerate(costs)}
    numbers = {name: size for name, size in zip(named, sizes, strict=False)}
    chosen = allocate_bits(named, numbers, budget)
    total = budget * sum(numbers.values())
    assert sum(numbers[name] * bits for name, bits in chosen.items()) <= total * (1 + 1e-6)
    cheapest = (
        min(
            sum(named[name][bits] for name, bits in zip(named, choice, strict=True))
            for choice in product((2, 3, 4), repeat=len(named))
            if sum(numbers[name] * bits for name, bits in zip(named, choice, strict=True)) <= total * (1 - 1e-6)
        )
        if budget > 2.001
        else float("inf")
    )
    assert sum(named[name][bits] for name, bits in chosen.items()) <= cheapest + 1e-5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def loud() -> nn.Sequential:
    """The first layer's rounding matters, the others add little to what it passes by."""

    class Adds(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[4](x + 0.01 * self[2](x.relu()))

    torch.manual_seed(0)
    return Adds(nn.Linear(8, 32), nn.Identity(), nn.Linear(32, 32), nn.Identity(), nn.Linear(32, 4))


def rows(number: int = 64) -> list[torch.Tensor]:
    return list(torch.randn(number, 8, generator=torch.Generator().manual_seed(1)).split(8))


def error(model, dense) -> float:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((model(x) - dense(x)).square().sum() / dense(x).square().sum())


def automatic(model, loader, **arguments):
    words = {"bits": "auto", "effective_bits": 4.0, "activation_bits": None, "progress_bar": False}
    return quantize_post_training(model, loader, **{**words, **arguments})


def test_the_expected_error_is_the_error():
    """To first order, and for a layer alone: what is expected of it is what rounding it changes."""
    dense = net()
    layers = {name: layer for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)}
    calls = [ForwardInputs((batch,)) for batch in rows(4000)]
    for name, layer in layers.items():
        rounded = copy.deepcopy(dense)
        weight = rounded.get_submodule(name).weight
        weight.data = fake_quantize_weight(weight.data, 6)
        found = choose_bits(dense, {name: layer}, calls, "per_channel", 6.0, 6, shown=False)
        assert found.bits == {name: 6}
        assert found.cost == pytest.approx(error(rounded, dense), rel=0.5)


def test_layers_that_matter_get_more_bits_and_less_is_lost_than_with_the_same_for_all(caplog):
    chosen, uniform = loud(), loud()
    with caplog.at_level("INFO"):
        automatic(chosen, rows())
    quantize_post_training(uniform, None, weight_bits=4, activation_bits=None)
    bits = {name: layer.weight_bits for name, layer in quantized_layers(chosen).items()}
    assert bits["0"] > 4 > bits["2"]
    sizes = {name: layer._parameters["weight"].numel() for name, layer in quantized_layers(chosen).items()}
    assert sum(sizes[name] * each for name, each in bits.items()) <= 4.0 * sum(sizes.values())
    assert error(chosen, loud()) < 0.3 * error(uniform, loud())
    assert "bits='auto': asked at most 4 bits a weight" in caplog.text
    assert f"int{bits['0']}, per_channel" in caplog.text


def test_it_goes_with_gptq_ranges_and_lightning(tmp_path):
    module = quantize_post_training(
        new(), val_loader(), bits="auto", effective_bits=3.5, method="gptq", progress_bar=False
    )
    assert int(module.net[0].input_batches) == 4
    assert {layer.quantization_phase for layer in quantized_layers(module).values()} == {"frozen"}
    assert len({layer.weight_bits for layer in quantized_layers(module).values() if layer.weight_bits}) > 1


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral"])
def test_tables_tied_weights_and_experts(name):
    model = MODELS[name].make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    automatic(model, [{"input_ids": IDS}], effective_bits=3.0)
    layers = quantized_layers(model)
    assert len({layer.weight_bits for layer in layers.values()}) > 1
    if name == "GPT-2":
        assert layers["transformer.wte"].weight_bits == layers["lm_head"].weight_bits
    assert not any(parameter.requires_grad for parameter in model.parameters())
    parameters = {
        id(p): (p.numel(), layer.weight_bits)
        for layer in layers.values()
        for p in layer.parameters(recurse=False)
        if p.ndim > 1
    }
    used = sum(number * bits for number, bits in parameters.values())
    assert used <= 3.0 * sum(number for number, _ in parameters.values())


@pytest.mark.parametrize(
    ("loader", "words", "message"),
    [
        (None, {}, "bits='auto' reads the inputs of the layers: pass a dataloader"),
        ([torch.ones(3, 8)], {"effective_bits": None}, "bits='auto' needs a budget"),
        ([torch.ones(3, 8)], {"effective_bits": 1.5}, "must be from 2 to `weight_bits`"),
        ([torch.ones(3, 8)], {"effective_bits": 6.0, "weight_bits": 5}, "must be from 2 to `weight_bits`"),
        ([torch.ones(3, 8)], {"bits": None}, "is the budget of bits='auto'"),
        ([torch.ones(3, 8)], {"bits": "best"}, "must map patterns to bits, or be 'auto'"),
        ([torch.full((3, 8), torch.nan)], {}, "the sensitivity of 0 is not finite"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(loader, words, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        automatic(model, loader, **words)
    assert_same_state(model, net())
    assert type(model[0]) is nn.Linear


def test_a_forward_without_gradients_is_told():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match="no tensor with a gradient"):
        automatic(Holds(), [torch.ones(3, 8)])
