"""A change of the model's structure, and how optimizers follow it; no Trainer."""

import copy

import pytest
import torch
from torch import nn

from helpers.toy import LowRank, factorize, remove_blocks
from lightning_optim.change import apply_change
from lightning_optim.structured.optimizers import follow_change

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.AdamW(groups, 0.01, foreach=True),
    "fused": lambda groups: torch.optim.Adam(groups, 0.01, fused=True, amsgrad=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, 0.01),
}


class Stack(nn.Module):
    def __init__(self, blocks: int = 3):
        super().__init__()
        self.entry = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def trained(make):
    torch.manual_seed(0)
    model = Stack()
    optimizer = make(list(model.parameters()))
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    optimizer.step()


def low_rank(root):
    factorize(root, "blocks.1", 2)


def fewer_blocks(root):
    remove_blocks(root, "blocks", {0})


def into_two(root):
    """Replace a Linear by a Sequential of two, under its name."""
    old = root.head
    root.head = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 2))
    assert old.bias is not None


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("change", [low_rank, fewer_blocks, into_two])
def test_an_optimizer_holds_the_models_parameters_in_its_order_and_goes_on(name, change):
    model, optimizer = trained(OPTIMIZERS[name])
    states = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    before = list(model.parameters())
    assert follow_change(optimizer, apply_change(model, change)) == []
    now = list(model.parameters())
    assert optimizer.param_groups[0]["params"] == now
    assert set(optimizer.state) == {p for p in now if p in set(before)}
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[parameter][k])) for k, v in state.items())
    step(model, optimizer)
    assert set(optimizer.state) == set(now)


def test_the_next_step_moves_parameters_that_stay_as_without_the_change():
    model, optimizer = trained(OPTIMIZERS["adam"])
    twin, other = trained(OPTIMIZERS["adam"])
    follow_change(optimizer, apply_change(model, low_rank))
    for net, own in ((model, optimizer), (twin, other)):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        own.step()
    expected = dict(twin.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if n in expected)


def test_new_parameters_join_the_group_of_the_layer_that_they_belong_to():
    model = Stack()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": rest, "lr": 0.5}, {"params": decay}], 0.1)
    follow_change(optimizer, apply_change(model, into_two))
    groups = [group["params"] for group in optimizer.param_groups]
    assert model.head[1].bias in set(groups[0])
    assert {model.head[0].weight, model.head[1].weight} <= set(groups[1])
    assert groups[1][-2:] == [model.head[0].weight, model.head[1].weight]


def test_a_group_in_an_order_of_its_own_keeps_it():
    model = Stack(1)
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], 0.1)
    follow_change(optimizer, apply_change(model, lambda root: factorize(root, "blocks.0", 2)))
    block = model.blocks[0]
    expected = [model.head.bias, model.head.weight, block.bias, block.u, block.v, model.entry.bias, model.entry.weight]
    assert optimizer.param_groups[0]["params"] == expected


def test_another_optimizer_does_not_get_the_new_parameters():
    model = Stack()
    mine = torch.optim.SGD(model.blocks.parameters(), 0.1)
    other = torch.optim.SGD(model.head.parameters(), 0.1)
    changed = apply_change(model, low_rank)
    for optimizer in (mine, other):
        follow_change(optimizer, changed)
    assert mine.param_groups[0]["params"] == list(model.blocks.parameters())
    assert other.param_groups[0]["params"] == list(model.head.parameters())


def test_parameters_of_a_frozen_layer_join_no_optimizer():
    model = Stack()
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    follow_change(optimizer, apply_change(model, low_rank))
    assert optimizer.param_groups[0]["params"] == list(model.head.parameters())


def test_lbfgs_restarts_on_the_new_parameters():
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(follow_change(optimizer, apply_change(model, low_rank))) == 1
    optimizer.step(closure)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


class Shared(torch.optim.Optimizer):
    """Wraps another, shares its groups and keeps a state of its own, as Lookahead does."""

    def __init__(self, inner):
        self.parts = [inner]
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups


def test_both_states_of_a_wrapper_that_shares_its_groups_follow():
    model, inner = trained(OPTIMIZERS["adam"])
    outer = Shared(inner)
    for parameter in model.parameters():
        outer.state[parameter]["slow"] = parameter.detach().clone()
    follow_change(outer, apply_change(model, low_rank))
    assert inner.param_groups[0]["params"] == list(model.parameters())
    stay = {p for n, p in model.named_parameters() if not n.endswith((".u", ".v"))}
    assert set(inner.state) == set(outer.state) == stay


def test_names_follow_layers_that_move_and_say_what_was_removed():
    model = Stack()
    second = model.blocks[1]
    changed = apply_change(model, fewer_blocks)
    assert changed.layer("blocks.1") == "blocks.0"
    assert changed.layer("blocks.0") is None
    assert changed.layer("head") == "head"
    assert changed.successor("blocks.1.weight") == ("blocks.0.weight", second.weight)
    assert changed.successor("blocks.0.weight") is None
    assert changed.added == {}
    assert [tuple(p.shape) for p in changed.removed] == [(6, 6), (6,)]


def test_names_inside_a_compiled_part_are_those_without_the_wrapper():
    model = Stack()
    model.blocks[1] = torch.compile(model.blocks[1])
    changed = apply_change(model, lambda root: None)
    assert changed.successor("blocks.1._orig_mod.weight")[0] == "blocks.1._orig_mod.weight"
    assert changed.successor("blocks.1.weight")[0] == "blocks.1.weight"
    assert changed.layer("blocks.1._orig_mod") == "blocks.1._orig_mod"


def test_a_low_rank_layer_has_two_parameters_for_one():
    model = Stack()
    weight = model.blocks[1].weight
    changed = apply_change(model, low_rank)
    assert isinstance(model.blocks[1], LowRank)
    assert changed.removed == [weight]
    assert changed.added == {model.blocks[1].u: weight, model.blocks[1].v: weight}
