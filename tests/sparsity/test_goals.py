"""Which weights are pruned and to which sparsity; no Trainer."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optim.callbacks.masks import HeldMasks
from lightning_optim.change import apply_change
from lightning_optim.functional.masks import parse_granularity
from lightning_optim.sparsity.goals import check_goals, make_goals
from lightning_optim.sparsity.selection import select, without_misfits

NET = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2))


def selected(patterns=None, net=NET):
    return select(net, "", include=None, exclude=None, patterns=patterns)


def test_a_sparsity_dict_selects_the_layer_that_it_names_and_leaves_the_others_dense():
    assert list(selected().chosen) == ["0.weight", "1.weight"]
    found = selected({"2": 0.5, "0": 0.2})
    assert list(found.chosen) == ["0.weight", "2.weight"]
    assert found.left_out["1.weight"] == "no pattern of sparsity"


def test_goals_by_pattern_and_by_layer():
    weights = selected().chosen
    (together,) = make_goals(weights, 0.5, scope="global", initial={"0.weight": 0.5})
    assert together.names == ["0.weight", "1.weight"]
    assert together.initial == pytest.approx(12 / 72)
    each = make_goals(weights, 0.5, scope="layer", initial={})
    assert [goal.names for goal in each] == [["0.weight"], ["1.weight"]]
    assert make_goals(weights, "hold", scope="global", initial={}) == []
    with pytest.raises(MisconfigurationException, match=r"'0' matches no selected layer that an earlier pattern"):
        make_goals(weights, {"*": 0.5, "0": 0.2}, scope="global", initial={})


def test_a_goal_below_what_is_zero_already_is_refused():
    weights = selected().chosen
    goals = make_goals(weights, 0.2, scope="layer", initial={"0.weight": 0.5})
    with pytest.raises(MisconfigurationException, match=r"already has 50\.00% zeros in 0\.weight, more than"):
        check_goals(goals, weights, parse_granularity("weight"))


def test_what_does_not_fit_the_granularity_is_left_out_unless_the_run_had_it():
    fours = parse_granularity("2:4")
    assert list(without_misfits(selected(), fours, ()).chosen) == ["0.weight"]
    assert list(without_misfits(selected(), fours, ["1.weight"]).chosen) == ["0.weight", "1.weight"]


def test_masks_come_back_from_their_state_and_follow_moved_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight[0] = 0.0
    held, again = HeldMasks(), HeldMasks()
    held.weights = again.weights = selected(net=net).chosen
    held.take_zeros(hold=False)
    assert held.initial == {"0.weight": 0.0, "1.weight": 0.25}
    again.load_state_dict(held.state_dict())
    assert again.restored
    again.take_restored()
    assert all(torch.equal(again.of(name), held.of(name)) for name in held.weights)

    def without_first(root):
        blocks = list(root)[1:]
        root._modules.clear()
        root._modules.update({str(place): block for place, block in enumerate(blocks)})

    assert held.follow(apply_change(net, without_first)) == {"1.weight": "0.weight"}
    assert held.keeps.keys() == {"0.weight"}
    assert held.reached == 0.25
