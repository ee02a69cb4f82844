"""Channels leave a live model and its optimizers, and nothing else changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

from helpers.nets import PRUNABLE, Attention, Block, Net, TiedResidual, ids, images, sequences
from lightning_optim.structured.allocation import Allocation
from lightning_optim.structured.check import Damage, damage, trusted
from lightning_optim.structured.events import find_prunable, plan_event
from lightning_optim.structured.optimizers import check_optimizer, slice_optimizer
from lightning_optim.structured.removal import apply_removal, keep_channels
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import as_forward_inputs

ALLOCATION = Allocation.of("magnitude", scope="layer", reduction="mean", round_to=None)


def planned(module, inputs, ratio=0.5, **words):
    """Return what a ratio would leave of a module."""
    inputs = as_forward_inputs(inputs)
    roots, left_alone = select_roots(module, "", words.pop("include", None), words.pop("exclude", None))
    groups = find_prunable(module, inputs, roots, left_alone).groups
    dense = {name: group.channels for name, group in groups.items()}
    event = plan_event(module, inputs, groups, dense, ratio, ALLOCATION)
    return event.removal, event.channels


def small_conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )


def run(module, inputs):
    """Return all outputs of a call in eval mode."""
    module.eval()
    with torch.no_grad():
        output = as_forward_inputs(inputs).call(module)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", PRUNABLE)
def test_removing_equals_setting_to_zero_and_the_smaller_model_trains(name):
    make, inputs, _ = PRUNABLE[name]
    module, example = make(), inputs()
    removal, counts = planned(module, example)
    assert all(0 < before - after <= before / 2 for before, after in counts.values())
    assert damage(module, as_forward_inputs(example), removal) is None
    before = run(module, example)
    replaced = apply_removal(module, removal)
    assert len({id(new) for new, _ in replaced.values()}) == len(replaced)
    after = run(module, example)
    assert [t.shape for t in after] == [t.shape for t in before]
    module.train()
    output = as_forward_inputs(example).call(module)
    sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)).backward()
    called = {n: p for n, p in module.named_parameters() if not n.startswith("unused")}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in called.values())


def test_what_is_left_are_the_channels_with_the_largest_weights_in_their_order():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 1], [5, 5], [0, 0.5], [3, 3]]))
        module[2].weight.copy_(torch.tensor([[1.0, 5, 0.5, 3]]))
    removal, _ = planned(module, torch.zeros(1, 2))
    apply_removal(module, removal)
    assert module[0].weight.tolist() == [[5, 5], [3, 3]]
    assert module[2].weight.tolist() == [[5, 3]]
    assert (module[0].out_features, module[2].in_features) == (2, 2)


def test_a_residual_net_equals_its_zeroed_self():
    """Hand arithmetic: the BatchNorm of a channel zeroed, and nothing else, gives the removed net's output."""
    make, inputs, _ = PRUNABLE["residual"]
    module, example = make().eval(), inputs()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    small, zeroed = copy.deepcopy(module), copy.deepcopy(module)
    removal = TracedModel(module, as_forward_inputs(example)).remove({"conv2": [1, 6], "conv1": [0]})
    apply_removal(small, removal)
    with torch.no_grad():
        for norm in (zeroed.norm, zeroed.norm2):
            norm.weight[[1, 6]] = 0
            norm.bias[[1, 6]] = 0
        zeroed.norm1.weight[0] = zeroed.norm1.bias[0] = 0
    assert small.norm2.running_mean.tolist() == module.norm2.running_mean[[0, 2, 3, 4, 5, 7]].tolist()
    torch.testing.assert_close(run(small, example), run(zeroed, example))


@pytest.mark.parametrize("style", ["shape", "head_dim", "both", "embed_dim"])
def test_attention_without_some_heads_equals_those_heads_set_to_zero(style):
    module, example = Block(Attention(style)), sequences()
    zeroed = copy.deepcopy(module)
    removal, counts = planned(module, example)
    assert counts["attention.v"] == (32, 16)
    kept = sorted({int(i) // 32 // 8 for i in removal.kept["attention.q.weight"]})
    assert len(kept) == 2
    apply_removal(module, removal)
    assert module.attention.num_heads == 2
    assert module.attention.head_dim == 8
    gone = [c for c in range(32) if c // 8 not in kept]
    with torch.no_grad():
        zeroed.attention.o.weight[:, gone] = 0
        left = torch.zeros(64, dtype=torch.bool)
        left[removal.kept["up.bias"]] = True
        zeroed.down.weight[:, ~left] = 0
    torch.testing.assert_close(run(module, example), run(zeroed, example))


def test_everything_that_hangs_on_a_parameter_survives():
    module = small_conv().to(memory_format=torch.channels_last)
    module[3].requires_grad_(False)
    module[0].weight.tag = "kept"
    calls = []
    module[0].weight.register_hook(lambda gradient: calls.append(gradient.shape))
    module[0].bias.grad = torch.arange(8.0)
    removal, _ = planned(module, images())
    kept = removal.kept["0.bias"]
    apply_removal(module, removal)
    assert not module[3].weight.requires_grad
    assert module[0].weight.requires_grad
    assert module[0].weight.tag == "kept"
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module[0].bias.grad, torch.arange(8.0)[kept])
    module(images()).sum().backward()
    assert calls == [torch.Size([4, 3, 3, 3])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    module = small_conv().to(dtype)
    removal, _ = planned(module, images().to(dtype))
    apply_removal(module, removal)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module[1].running_mean.dtype == dtype
    assert run(module, images().to(dtype))[0].shape == (2, 2)


def test_shared_parameters_stay_shared():
    module = TiedResidual()
    removal, _ = planned(module, ids(), include=["table", "a", "b"])
    apply_removal(module, removal)
    assert module.out.weight is module.table.weight
    assert module.table.weight.shape == (20, 8)
    assert len(list(module.parameters())) == 5


def test_columns_of_tables_leave():
    module = Net(
        lambda s, rows: s.b(s.a(torch.cat([s.bag(rows), s.one(rows[:, 0])], 1)).relu()),
        bag=nn.EmbeddingBag(20, 16),
        one=nn.Embedding(20, 8),
        a=nn.Linear(24, 8),
        b=nn.Linear(8, 2),
    )
    removal, _ = planned(module, ids(), include=["bag", "one"])
    apply_removal(module, removal)
    assert (module.bag.weight.shape, module.bag.embedding_dim) == ((20, 8), 8)
    assert (module.one.weight.shape, module.a.in_features) == ((20, 4), 12)
    run(module, ids())


def test_the_plan_is_told_before_anything_changes():
    module, seen = small_conv(), []
    removal, _ = planned(module, images())
    apply_removal(module, removal, lambda name, attributes: seen.append((name, attributes, module[0].out_channels)))
    assert ("0", ("out_channels",), 8) in seen
    assert {name for name, _, _ in seen} == {"0", "1", "3", "5"}
    assert all(channels == 8 for _, _, channels in seen)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=0.01)


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
}


def trained(make):
    """A small net after two steps, its optimizer (two groups, one with a frozen layer) and a scheduler."""
    module = small_conv()
    module[3].requires_grad_(False)
    optimizer = make([{"params": list(module[:3].parameters())}, {"params": list(module[3:].parameters()), "lr": 0.5}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        optimizer.zero_grad()
        module(images()).sum().backward()
        optimizer.step()
        schedule.step()
    return module, optimizer, schedule


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_tensor_is_sliced_like_its_weight(name):
    module, optimizer, schedule = trained(OPTIMIZERS[name])
    old = dict(module.named_parameters())
    states = {n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in old.items()}
    removal, _ = planned(module, images())
    replaced = apply_removal(module, removal)
    assert slice_optimizer(optimizer, replaced) == []
    new = dict(module.named_parameters())
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(new.values())
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 4]
    for leaf, parameter in new.items():
        for key, value in states[leaf].items():
            now = optimizer.state[parameter][key]
            expected = value.reshape(-1)[removal.kept[leaf]] if leaf in removal.kept and value.ndim else value
            assert torch.equal(now.reshape(-1), expected.reshape(-1)), (leaf, key)
            assert not value.ndim or now.shape == parameter.shape
    assert set(optimizer.state) <= set(new.values())
    module(images()).sum().backward()
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


def test_the_next_step_is_that_of_the_dense_model_on_what_is_left():
    """With the same gradients, the sliced optimizer moves the surviving weights exactly as the dense one would."""
    module, optimizer, _ = trained(OPTIMIZERS["adam"])
    dense = copy.deepcopy(module)
    twin = OPTIMIZERS["adam"]([{"params": list(dense[:3].parameters())}, {"params": list(dense[3:].parameters())}])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    removal, _ = planned(module, images())
    slice_optimizer(optimizer, apply_removal(module, removal))
    gradients = {n: torch.randn_like(p) for n, p in dense.named_parameters() if p.requires_grad}
    for net in (dense, module):
        for leaf, parameter in net.named_parameters():
            if leaf in gradients:
                whole = gradients[leaf].reshape(-1)
                parameter.grad = (
                    whole[removal.kept[leaf]].view(parameter.shape)
                    if net is module and (leaf in removal.kept)
                    else gradients[leaf].clone()
                )
    optimizer.step()
    twin.step()
    for leaf, parameter in module.named_parameters():
        whole = dict(dense.named_parameters())[leaf].reshape(-1)
        expected = whole[removal.kept[leaf]] if leaf in removal.kept else whole
        torch.testing.assert_close(parameter.reshape(-1), expected, rtol=1e-6, atol=1e-7)  # vectors end elsewhere


def test_a_factored_state_is_reset_and_reported():
    module, optimizer, _ = trained(adafactor)
    removal, _ = planned(module, images())
    lost = slice_optimizer(optimizer, apply_removal(module, removal))
    assert "the optimizer state of a (8, 3, 3, 3) parameter cannot be sliced; reset" in lost
    assert module[0].weight not in optimizer.state
    module(images()).sum().backward()
    optimizer.step()
    assert module[0].weight in optimizer.state


def test_reset_forgets_what_changed_only():
    module, optimizer, _ = trained(OPTIMIZERS["adam"])
    removal, _ = planned(module, images(), include=["3"])
    slice_optimizer(optimizer, apply_removal(module, removal), reset=True)
    assert module[5].weight not in optimizer.state
    assert module[0].weight in optimizer.state


def test_an_optimizer_of_other_parameters_is_left_alone():
    module, _, _ = trained(OPTIMIZERS["adam"])
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)
    removal, _ = planned(module, images())
    assert slice_optimizer(other, apply_removal(module, removal)) == []
    assert other.param_groups[0]["params"][0].shape == (3,)


def test_trusted_finds_the_bad_ones_by_halving():
    bad, asked = {"c", "f"}, []

    def breaks(names):
        asked.append(names)
        return Damage("broken") if bad & set(names) else None

    assert trusted("abcdefgh", breaks) == (list("abdegh"), {"c": "broken", "f": "broken"})
    assert trusted([], breaks) == ([], {})
    asked.clear()
    assert trusted("ab", breaks) == (["a", "b"], {})
    assert len(asked) == 1


def test_damage_is_seen_through_random_weights_and_touches_nothing():
    module = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2))
    with torch.no_grad():
        module[2].weight.zero_()  # the model's own output shows nothing
    inputs = as_forward_inputs(torch.randn(3, 4))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    removal = TracedModel(module, inputs).remove({"0": [2, 3]})
    assert "differs from setting to zero" in str(damage(module, inputs, removal))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_over_the_channels_is_checked_too():
    """A LayerNorm whose channels are then read as heads: shapes are right and the numbers are not."""

    def heads(s, x):
        y = s.n(s.a(x)).view(*x.shape[:2], 4, -1)
        return s.b((y.softmax(-1) * y).flatten(2))

    module = Net(heads, a=nn.Linear(32, 32), n=nn.LayerNorm(32), b=nn.Linear(32, 5))
    inputs = as_forward_inputs(sequences())
    traced = TracedModel(module, inputs)
    removal = traced.remove({"a": list(range(8))})
    assert "differs from setting to zero" in str(damage(module, inputs, removal))


def test_no_warning_comes_with_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(small_conv(), images())


class Flat(torch.optim.SGD):
    """An optimizer that remembers its parameters in a list of its own."""

    def __init__(self, params, **words):
        super().__init__(params, **words)
        self.all = [p for group in self.param_groups for p in group["params"]]


class Around(torch.optim.Optimizer):
    """An optimizer around another one, with groups of its own."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([dict(group) for group in inner.param_groups], {})


def test_a_flat_state_is_reset_and_said_and_the_optimizer_goes_on():
    module, optimizer, _ = trained(lambda groups: torch.optim.SGD(groups, 0.1))
    optimizer = torch.optim.LBFGS(module.parameters(), 0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = module(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    removal, _ = planned(module, images())
    lost = slice_optimizer(optimizer, apply_removal(module, removal))
    assert lost == ["LBFGS keeps one state for all parameters, which cannot be sliced; reset"]
    assert optimizer.param_groups[0]["params"] == list(module.parameters())
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step(closure)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_an_optimizer_that_would_keep_the_old_parameters_is_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Flat keeps parameters in `all`, besides its param_groups.*AdamW"):
        check_optimizer(Flat(module.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Flat keeps parameters in `all`"):
        check_optimizer(Around(Flat(module.parameters(), lr=0.1)))
    for make in OPTIMIZERS.values():
        check_optimizer(make([{"params": list(module.parameters())}]))
    check_optimizer(torch.optim.LBFGS(module.parameters()))


def test_an_optimizer_around_another_follows_with_it():
    module, inner, _ = trained(OPTIMIZERS["adam"])
    outer = Around(inner)
    removal, _ = planned(module, images())
    slice_optimizer(outer, apply_removal(module, removal))
    assert [p for g in outer.param_groups for p in g["params"]] == list(module.parameters())
    assert [p for g in inner.param_groups for p in g["params"]] == list(module.parameters())
    assert all(inner.state[p]["exp_avg"].shape == p.shape for p in module.parameters() if p in inner.state)


def test_columns_leave_a_sparse_gradient():
    table = nn.Embedding(6, 4, sparse=True)
    module = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3))
    module(torch.tensor([[1, 3], [1, 5]])).square().sum().backward()
    dense = table.weight.grad.to_dense()
    kept = torch.arange(24).view(6, 4)[:, [0, 2]].reshape(-1)
    small = keep_channels(table.weight.grad, kept, (6, 2))
    assert small.is_sparse
    assert torch.equal(small.to_dense(), dense[:, [0, 2]])
