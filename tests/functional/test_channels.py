"""Importance of channels, and which of them leave."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.channels import (
    CHANNEL_CRITERIA,
    Slices,
    channels_to_remove,
    group_scores,
    rising_scores,
)

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=2, max_size=24).map(torch.tensor)


def slices(kind="out", channels=4, entries=3):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(channels, entries, generator=generator)
    return Slices(weight, kind, weight.abs() + 1, torch.Generator().manual_seed(2))


def test_magnitude_is_the_l2_norm_of_a_channels_weights():
    scores = CHANNEL_CRITERIA["magnitude"](Slices(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "out"))
    assert scores.tolist() == [5.0, 1.0]


def test_taylor_is_weight_times_gradient_summed_over_the_channel():
    scores = CHANNEL_CRITERIA["taylor"](
        Slices(torch.tensor([[1.0, -2.0], [0.0, 1.0]]), "in", torch.tensor([[2.0, 3.0], [9.0, 0.5]]))
    )
    assert scores.tolist() == [8.0, 0.5]


def test_bn_scale_reads_norm_layers_only():
    weight = torch.tensor([[-2.0], [0.5]])
    assert CHANNEL_CRITERIA["bn_scale"](Slices(weight, "norm")).tolist() == [2.0, 0.5]
    assert CHANNEL_CRITERIA["bn_scale"](Slices(weight, "out")).numel() == 0
    with pytest.raises(ValueError, match="no layer of the group can be scored"):
        group_scores([Slices(weight, "out")], CHANNEL_CRITERIA["bn_scale"])


@pytest.mark.parametrize(("name", "word"), [("taylor", "gradient"), ("random", "generator")])
def test_what_a_criterion_needs_is_named_when_it_is_missing(name, word):
    assert CHANNEL_CRITERIA[name].needs == (word,)
    with pytest.raises(ValueError, match=word):
        CHANNEL_CRITERIA[name](Slices(torch.ones(2, 2), "out"))


@pytest.mark.parametrize("name", sorted(CHANNEL_CRITERIA))
@pytest.mark.parametrize("kind", ["out", "in", "norm"])
def test_every_criterion_gives_one_score_a_channel_and_changes_nothing(name, kind):
    given_slices = slices(kind)
    before = given_slices.weight.clone()
    scores = CHANNEL_CRITERIA[name](given_slices)
    assert scores.shape in [(4,), (0,)]
    assert bool((scores >= 0).all())
    assert torch.equal(given_slices.weight, before)


def test_scores_of_a_group_have_mean_one_so_that_groups_compare():
    small = group_scores([slices()], CHANNEL_CRITERIA["magnitude"])
    big = Slices(slices().weight * 1000, "out")
    torch.testing.assert_close(group_scores([big], CHANNEL_CRITERIA["magnitude"]), small)
    assert float(small.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize(("reduction", "expected"), [("mean", [2.5, 2.5]), ("sum", [5.0, 5.0]), ("max", [4.0, 3.0])])
def test_the_layers_of_a_group_decide_together(reduction, expected):
    layers = [Slices(torch.tensor([[4.0], [2.0]]), "out"), Slices(torch.tensor([[1.0], [3.0]]), "in")]
    scores = group_scores(layers, CHANNEL_CRITERIA["magnitude"], reduction)
    torch.testing.assert_close(scores, torch.tensor(expected) / torch.tensor(expected).mean())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_raise(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        group_scores([Slices(torch.tensor([[bad], [1.0]]), "out")], CHANNEL_CRITERIA["magnitude"])


@given(scores=SCORES, data=st.data())
def test_exactly_the_lowest_leave_with_ties_too(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    leaving = channels_to_remove(scores, keep)
    assert len(leaving) == len(scores) - keep == len(set(leaving))
    stay = sorted(set(range(len(scores))) - set(leaving))
    assert not leaving or scores[leaving].max() <= scores[stay].min()


@given(scores=SCORES, data=st.data())
def test_for_fixed_scores_removals_nest(scores, data):
    more, fewer = sorted(data.draw(st.tuples(st.integers(1, len(scores)), st.integers(1, len(scores)))))
    assert set(channels_to_remove(scores, fewer)) <= set(channels_to_remove(scores, more))


@given(pieces=st.integers(1, 8), blocks=st.integers(1, 5), data=st.data())
def test_every_block_loses_the_same_relative_channels(pieces, blocks, data):
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 9), min_size=pieces * blocks, max_size=pieces * blocks)))
    keep = blocks * data.draw(st.integers(1, pieces))
    leaving = channels_to_remove(scores, keep, blocks)
    assert len(leaving) == pieces * blocks - keep
    by_block = [{c - b * pieces for c in leaving if c // pieces == b} for b in range(blocks)]
    assert all(block == by_block[0] for block in by_block)


@given(pieces=st.integers(1, 8), blocks=st.integers(1, 5), data=st.data())
def test_rising_scores_stand_in_the_order_of_removal(pieces, blocks, data):
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=pieces * blocks, max_size=pieces * blocks)))
    rising = rising_scores(scores.double(), blocks)
    assert rising.sort().values.equal(rising)
    keep = blocks * data.draw(st.integers(1, pieces))
    leaving = channels_to_remove(scores, keep, blocks)
    assert rising[: len(leaving)].sum().item() == pytest.approx(scores[leaving].sum().item())
