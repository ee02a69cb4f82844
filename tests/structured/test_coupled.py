"""The coupled weights of channels: what shrinks is what leaves, and units follow a removal."""

import copy

import pytest
import torch
from torch import nn

from helpers.marks import cells
from helpers.nets import PRUNABLE
from lightning_optim.change import apply_change
from lightning_optim.structured.coupled import CoupledUnits
from lightning_optim.structured.events import find_prunable, known_groups
from lightning_optim.structured.removal import ChannelRemoval
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import as_forward_inputs


def found(module, example, **selection):
    inputs = as_forward_inputs(example)
    return inputs, find_prunable(module, inputs, *select_roots(module, "", **selection)).groups


def assert_units_are_what_leaves(module, example, **selection):
    """Scaling a unit to zero zeroes entries that leave with it, all of them but for the exceptions of the docstring."""
    inputs, groups = found(module, example, **selection)
    traced = TracedModel(module, inputs)
    assert groups
    for name, group in groups.items():
        units = CoupledUnits.of(module, group)
        assert units.number > 1
        channels = units.channels_of([1])
        assert units.units_of(channels) == [1]
        assert len(channels) == group.unit * group.blocks
        removal = traced.remove({name: channels}, groups)
        scaled = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter.fill_(1.0)
        factors = torch.ones(units.number)
        factors[1] = 0.0
        units.scale(scaled, factors, {id(parameter) for parameter in scaled.parameters()})
        for key, parameter in scaled.named_parameters():
            leaves = torch.zeros(parameter.numel(), dtype=torch.bool)
            if key in removal.kept:
                leaves[:] = True
                leaves[removal.kept[key]] = False
            zeros = parameter.detach().flatten() == 0
            assert not bool((zeros & ~leaves).any()), (name, key)
            layer = module.get_submodule(key.rpartition(".")[0])
            if not isinstance(layer, nn.PReLU) and getattr(layer, "groups", 1) == 1:
                assert torch.equal(zeros, leaves), (name, key)


def assert_units_follow(module, example, **selection):
    """After a removal they are those of a fresh trace."""
    inputs, groups = found(module, example, **selection)
    traced = TracedModel(module, inputs)
    units = {name: CoupledUnits.of(module, group) for name, group in groups.items()}
    leaving = {
        name: each.channels_of(range(1, 1 + groups[name].multiple))
        for name, each in units.items()
        if each.number > 2 * groups[name].multiple and not groups[name].tie
    }
    changed = apply_change(module, ChannelRemoval("", traced.remove(leaving, groups)))
    present = known_groups(module, inputs, groups).groups
    for name, before in units.items():
        now, numbers = before.follow(changed)
        gone = before.units_of(leaving.get(name, ()))
        assert numbers == [number for number in range(before.number) if number not in gone]
        fresh = CoupledUnits.of(module, present[name])
        assert (now.number, now.unit, now.blocks) == (fresh.number, fresh.unit, fresh.blocks)
        assert sorted((key, dim) for key, dim, _ in now.parts) == sorted((key, dim) for key, dim, _ in fresh.parts)
        torch.testing.assert_close(now.norms(module), fresh.norms(module))
        again = CoupledUnits.from_state(now.state_dict()).to(module)
        assert all(torch.equal(a[2], b[2]) for a, b in zip(again.parts, now.parts, strict=True))


@pytest.mark.parametrize("name", cells(list(PRUNABLE), quick=list(PRUNABLE)[::3]))
def test_what_shrinks_is_what_leaves(name):
    make, inputs, _ = PRUNABLE[name]
    assert_units_are_what_leaves(make(), inputs())
    assert_units_follow(make(), inputs())


def language_models():
    transformers = pytest.importorskip("transformers", reason="pip install 'transformers==5.24.*'")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    grouped = {**sizes, "intermediate_size": 48, "num_key_value_heads": 4}
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)),
        "llama, two key heads": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**grouped, "num_key_value_heads": 2})
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        ),
        "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=48)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**grouped, num_local_experts=2, num_experts_per_tok=2)
        ),
    }


SLOW = ("llama, two key heads", "gpt2", "neox")


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), "mixtral"])
@pytest.mark.parametrize("width", [False, True], ids=["heads and inner", "residual width"])
def test_heads_experts_and_the_residual_width(name, width):
    torch.manual_seed(0)
    model = language_models()[name]()
    selection = {"include": [nn.Embedding]} if width else {}
    ids = {"input_ids": torch.randint(3, 50, (1, 6)), "use_cache": False}
    assert_units_are_what_leaves(model, ids, **selection)
    assert_units_follow(model, ids, **selection)
