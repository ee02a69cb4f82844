"""Parts of a split that go different ways: equal proportions leave, and what counts the parts follows."""

import copy

import pytest
import torch
from torch import nn

from helpers.nets import Branches, Net, PartialConv, SplitChain, images, sequences
from lightning_optim import conform
from lightning_optim.functional.channels import CHANNEL_CRITERIA
from lightning_optim.structured.allocation import Allocation
from lightning_optim.structured.events import find_prunable, known_groups, plan_event
from lightning_optim.structured.prune import prune_channels
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.selection import select_roots
from lightning_optim.target import as_forward_inputs

STREAM = ["one", "chain.*.two"]
"""The layers whose outputs the two halves are, where the chain has skip connections."""


def groups_of(module, inputs):
    return find_prunable(module, as_forward_inputs(inputs), *select_roots(module))


@pytest.mark.parametrize("how", ["chunk", "sizes", "size", "slices"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_both_halves_lose_the_same_and_the_count_follows(how, shortcut):
    torch.manual_seed(0)
    module, example = SplitChain(how, shortcut), images()
    report = prune_channels(module, example, pruning_ratio=0.5, include=STREAM if shortcut else ["one"])
    assert report.channels == {"one": (12, 6)}
    assert module.c == 3
    assert module.chain[0].one.in_channels == 3
    assert module.two.in_channels == (12 if shortcut else 18)
    fresh = SplitChain(how, shortcut)
    conform(fresh, report.plan)
    fresh.load_state_dict(module.state_dict())
    assert fresh.c == 3
    assert torch.equal(fresh.eval()(example), module.eval()(example))


@pytest.mark.parametrize("how", ["chunk", "sizes"])
def test_groups_are_found_again_with_their_counts_at_every_event(how):
    torch.manual_seed(0)
    module, inputs = SplitChain(how, True), as_forward_inputs(images())
    groups = groups_of(module, images()).groups
    assert known_groups(module, inputs, groups).groups == groups
    dense = {name: group.channels for name, group in groups.items()}
    allocation = Allocation.of("magnitude", scope="layer", reduction="mean", round_to=None)
    for ratio, left in ((0.25, 4), (0.5, 3)):
        apply_removal(module, plan_event(module, inputs, groups, dense, ratio, allocation).removal)
        assert module.c == left
        again = known_groups(module, inputs, groups).groups
        assert {name: group.counts for name, group in again.items()} == {n: g.counts for n, g in groups.items()}
        groups = again
    module(images())


def test_unequal_parts_keep_their_proportions():
    module = nn.Sequential(
        nn.Conv2d(3, 16, 1), PartialConv(16), nn.Conv2d(16, 16, 1), Branches(16), nn.Conv2d(16, 3, 1)
    )
    assert groups_of(module, images()).groups["0"].blocks == 4
    report = prune_channels(module, images(), scope="layer", include=["0", "2", "3.*"])
    assert report.channels == {"0": (16, 8), "2": (16, 8)}
    assert (module[1].dim_conv, module[1].dim_rest, module[3].split_sizes) == (2, 6, (4, 2, 2))
    assert module[3].row.groups == 2


def test_the_layers_of_one_part_speak_for_their_channels():
    """Channels whose weights differ in the bottleneck alone are ranked by it."""
    module = SplitChain("chunk", True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        module.chain[0].one.weight[:, [1, 4]] = 0.1
    prune_channels(module, images(), pruning_ratio=1 / 3, include=STREAM)
    assert module.chain[0].one.weight.min() == 1.0
    assert module.chain[0].one.in_channels == 4


def test_every_criterion_ranks_a_split(subtests):
    for name in sorted(set(CHANNEL_CRITERIA) - {"bn_scale"}):
        with subtests.test(name):
            module = SplitChain("chunk", True)
            module(images()).sum().backward()
            assert prune_channels(module, images(), criterion=name, scope="layer").channels["one"] == (12, 6)


def test_a_number_that_happens_to_be_the_size_of_a_part_stays():
    module = SplitChain("chunk", True)
    module.num_classes = module.depth = 6
    prune_channels(module, images(), include=STREAM)
    assert (module.c, module.num_classes, module.depth) == (3, 6, 6)


LEFT_ALONE = {
    "a shuffle": (
        lambda: Net(
            lambda s, x: s.c(s.mix(torch.cat(s.halves(s.a(x)), 1))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(4, 4, 1),
            c=nn.Conv2d(8, 3, 1),
        ),
        images,
        "a",
        "change places|differs from|forward pass fails",
    ),
    "sizes written in the code": (
        lambda: Net(lambda s, x: s.c(s.a(x)[:, :4]), a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(4, 3, 1)),
        images,
        "a",
        "forward pass fails afterwards in c",
    ),
    "parts without a common size": (
        lambda: Net(
            lambda s, x: s.c(torch.cat([s.b(s.a(x)[..., :3]), s.a(x)[..., 3:]], -1)),
            a=nn.Linear(32, 8),
            b=nn.Linear(3, 3),
            c=nn.Linear(8, 3),
        ),
        sequences,
        "a",
        "one channel a block",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_keep_its_proportions_is_left_alone(name):
    make, inputs, layer, reason = LEFT_ALONE[name]
    module = make()
    module.halves = lambda y: [module.b(y.chunk(2, 1)[0]), y.chunk(2, 1)[1]]
    module.mix = lambda y: y.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8)
    before = copy.deepcopy(module.state_dict())
    report = groups_of(module, inputs())
    assert layer not in report.groups
    assert any(word in report.left_out[layer] for word in reason.split("|")), report.left_out[layer]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
