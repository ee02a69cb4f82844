"""One event: from a live model and a ratio to what leaves."""

import pytest
import torch
from torch import nn

from helpers.nets import PRUNABLE, Attention, Block, images, sequences
from lightning_optim.structured.allocation import Allocation
from lightning_optim.structured.events import ChannelReport, check_ratio, find_prunable, plan_event
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.selection import select_roots
from lightning_optim.target import as_forward_inputs

WORDS = {"scope": "layer", "reduction": "mean", "round_to": None}


def found(module, inputs):
    return find_prunable(module, as_forward_inputs(inputs), *select_roots(module))


def event(module, inputs, groups, dense, ratio, **words):
    """Plan an event, apply it, and return the channels left."""
    allocation = Allocation.of(words.pop("criterion", "magnitude"), **{**WORDS, **words})
    planned = plan_event(module, as_forward_inputs(inputs), groups, dense, ratio, allocation)
    apply_removal(module, planned.removal)
    return {name: after for name, (_, after) in planned.channels.items()}


def residual():
    torch.manual_seed(0)
    module, inputs = PRUNABLE["residual"][0](), images()
    groups = found(module, inputs).groups
    return module, inputs, groups, {name: group.channels for name, group in groups.items()}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_events_reach_the_ratio_of_the_dense_channels_in_any_number_of_steps(scope):
    one, inputs, groups, dense = residual()
    at_once = event(one, inputs, groups, dense, 0.5, scope=scope)
    many, _, _, _ = residual()
    for ratio in (0.1, 0.3, 0.3, 0.45, 0.5):
        gradually = event(many, inputs, groups, dense, ratio, scope=scope)
    assert sum(at_once.values()) == sum(gradually.values()) == sum(dense.values()) // 2
    if scope == "layer":
        assert at_once == gradually == {name: channels // 2 for name, channels in dense.items()}


def test_an_event_that_is_reached_changes_nothing():
    module, inputs, groups, dense = residual()
    event(module, inputs, groups, dense, 0.5)
    planned = plan_event(module, as_forward_inputs(inputs), groups, dense, 0.25, Allocation.of("magnitude", **WORDS))
    assert not planned.removal.kept
    assert not planned.removal.attributes
    assert not planned.leaving
    assert all(now == after for now, after in planned.channels.values())


@pytest.mark.parametrize("criterion", ["magnitude", "bn_scale", "random", lambda slices: slices.weight.abs().sum(1)])
def test_every_criterion_ranks_the_groups(criterion):
    module, inputs, groups, dense = residual()
    if criterion == "bn_scale":  # `down` has no norm
        groups = {name: group for name, group in groups.items() if name != "down"}
    left = event(module, inputs, groups, dense, 0.5, criterion=criterion)
    assert left == {name: dense[name] // 2 for name in groups}


def test_a_group_that_a_criterion_cannot_score_is_named():
    module, inputs, groups, dense = residual()
    with pytest.raises(ValueError, match=r"group down: no layer of the group can be scored"):
        event(module, inputs, groups, dense, 0.5, criterion="bn_scale")


def test_taylor_takes_the_gradients_by_name():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.ones_(module[0].weight)
    nn.init.ones_(module[2].weight)
    inputs = as_forward_inputs(torch.ones(1, 2))
    groups = found(module, inputs).groups
    gradients = {
        "0.weight": torch.tensor([[9.0, 9], [1, 1], [5, 5], [2, 2]]),
        "2.weight": torch.tensor([[9.0, 1, 5, 2]]),
    }
    allocation = Allocation.of("taylor", **WORDS)
    planned = plan_event(module, inputs, groups, {"0": 4}, 0.5, allocation, {"gradient": gradients})
    assert planned.removal.kept["2.weight"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="group 0: the criterion taylor needs the gradient"):
        plan_event(module, inputs, groups, {"0": 4}, 0.5, allocation)


def test_global_ranking_takes_channels_where_they_are_weak():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for weight, dim in ((module[0].weight, 0), (module[2].weight, 1)):
            weight.copy_(torch.ones_like(weight)).select(dim, 0).mul_(50)
            weight.narrow(dim, 2, 6).mul_(0.01)  # of the first group two channels matter
        module[2].bias.fill_(1)
    inputs = torch.ones(1, 4)
    groups = found(module, inputs).groups
    left = event(module, inputs, groups, {"0": 8, "2": 8}, 0.5, scope="global")
    assert left["0"] < left["2"]
    assert sum(left.values()) == 8


def test_no_group_is_emptied():
    for scope in ("global", "layer"):
        module, inputs, groups, dense = residual()
        left = event(module, inputs, groups, dense, 0.999, scope=scope)
        assert all(channels >= 1 for channels in left.values())
        module(inputs)


def test_multiples_are_kept():
    module, inputs, groups, dense = residual()
    assert event(module, inputs, groups, dense, 0.6, round_to=4) == {"down": 8, "conv2": 4, "conv1": 4}


def test_blocks_lose_the_same_each():
    make, inputs, _ = PRUNABLE["grouped"]
    module, example = make(), inputs()
    groups = found(module, example).groups
    left = event(module, example, groups, {name: g.channels for name, g in groups.items()}, 0.5)
    assert left == {"4": 6, "2": 8, "0": 4}
    assert module[2].weight.shape == (8, 1, 3, 3)
    module(example)


@pytest.mark.parametrize(("ratio", "heads"), [(0.2, 4), (0.25, 3), (0.6, 2), (0.99, 2)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_attention_keeps_whole_heads_and_never_fewer_than_two(ratio, heads, scope):
    module, inputs = Block(Attention()), sequences()
    groups = {"attention.v": found(module, inputs).groups["attention.v"]}
    assert event(module, inputs, groups, {"attention.v": 32}, ratio, scope=scope) == {"attention.v": 8 * heads}
    assert module.attention.num_heads == heads
    module(inputs)


def test_ratios_by_pattern_take_the_first_match_of_any_output():
    module, _, groups, *_ = residual()
    report = ChannelReport(groups)
    assert report.ratios({"stem": 0.25, "conv*": 0.5}, module) == {"down": 0.5, "conv2": 0.25, "conv1": 0.5}
    assert report.ratios({"net.conv1": 0.5}, module, "net.") == {"down": 0.0, "conv2": 0.0, "conv1": 0.5}
    assert report.ratios({r"re:conv[1]": 0.5}, module, "net.") == {"down": 0.0, "conv2": 0.0, "conv1": 0.5}
    by_function = {lambda name, layer: name == "conv1" and layer is module.conv1: 0.5}
    assert report.ratios(by_function, module, "net.") == {"down": 0.0, "conv2": 0.0, "conv1": 0.5}
    with pytest.raises(ValueError, match="'conv9' matches no group; there are down, conv2, conv1"):
        report.ratios({"conv9": 0.5}, module)


@pytest.mark.parametrize(
    ("ratio", "error", "words"),
    [
        (0, ValueError, r"fraction in \(0, 1\), got 0"),
        (1, ValueError, "got 1"),
        (-1, ValueError, "got -1"),
        (50, ValueError, r"For 50 % of the channels pass 0.5"),
        (True, TypeError, "got True"),
        ("half", TypeError, "got 'half'"),
        ({}, ValueError, "an empty one"),
        ({"conv1": 2}, ValueError, "got 2"),
    ],
)
def test_ratios_out_of_range_say_what_was_expected(ratio, error, words):
    with pytest.raises(error, match=words):
        check_ratio(ratio)


def test_ratios_are_read_as_floats_without_changing_the_dict():
    given = {"a": 0.5}
    assert check_ratio(given) == given
    assert check_ratio(given) is not given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scope": "net"}, "`scope` must be 'global' or 'layer', got 'net'"),
        ({"reduction": "min"}, "`reduction` must be"),
        ({"round_to": 0}, "`round_to` must be a whole number >= 1"),
        ({"round_to": 8.0}, "`round_to` must be a whole number >= 1"),
    ],
)
def test_words_of_the_allocation_are_checked(words, message):
    with pytest.raises(ValueError, match=message):
        Allocation.of("magnitude", **{**WORDS, **words})
    with pytest.raises(ValueError, match="unknown criterion 'size'"):
        Allocation.of("size", **WORDS)


def test_a_grouped_convolution_never_becomes_depthwise():
    """With one output a block its group would have another name, and a run could not be resumed."""
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    groups = found(module, images()).groups
    assert event(module, images(), groups, {"0": 8, "2": 8}, 0.99) == {"2": 4, "0": 2}
    assert found(module, images()).left_out["2"] == "2 channels a block are its fewest"
