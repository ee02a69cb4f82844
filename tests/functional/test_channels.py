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
    global_ratios,
    group_scores,
    kept_channels,
)

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=2, max_size=24).map(torch.tensor)
RATIOS = st.floats(0.0, 0.99)


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


@given(dense=st.integers(1, 300), ratio=RATIOS)
def test_the_number_kept_is_exact_without_blocks(dense, ratio):
    """Never more removed than asked, and less than one channel fewer."""
    kept = kept_channels(dense, ratio)
    assert 1 <= kept <= dense
    assert dense - kept <= ratio * dense + 1e-6
    assert kept == 1 or dense - kept > ratio * dense - 1 - 1e-6


@given(
    pieces=st.integers(1, 40), blocks=st.integers(1, 8), ratio=RATIOS, round_to=st.one_of(st.none(), st.integers(1, 16))
)
def test_the_number_kept_is_a_multiple_and_never_fewer_than_asked(pieces, blocks, ratio, round_to):
    dense = pieces * blocks
    unit = math.lcm(blocks, round_to or 1)
    kept = kept_channels(dense, ratio, blocks=blocks, round_to=round_to)
    assert kept == dense or kept % unit == 0
    assert dense - kept <= ratio * dense + 1e-6
    assert kept in (dense, unit) or kept - (dense - ratio * dense) < unit + 1e-6


def test_numbers_of_the_issue():
    """Width 16, ratio 0.3, multiples of 8: rounding down would keep 8, where 11.2 are asked for."""
    assert kept_channels(16, 0.3) == 12  # floor(4.8) = 4 leave
    assert kept_channels(16, 0.3, round_to=8) == 16
    assert kept_channels(64, 0.5, round_to=8) == 32
    assert kept_channels(10, 0.99) == 1


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


GROUPS = st.lists(SCORES, min_size=1, max_size=5).map(lambda each: {f"g{i}": scores for i, scores in enumerate(each)})


@given(groups=GROUPS, ratio=RATIOS)
def test_global_ratios_remove_what_is_asked_and_starve_no_group(groups, ratio):
    ratios = global_ratios(groups, ratio)
    removed = {name: round(ratios[name] * len(scores)) for name, scores in groups.items()}
    limits = {name: math.floor(0.9 * len(scores)) for name, scores in groups.items()}
    asked = math.floor(ratio * sum(map(len, groups.values())) + 1e-9)
    assert sum(removed.values()) == min(asked, sum(limits.values()))
    assert all(removed[name] <= limits[name] for name in groups)


@given(groups=GROUPS, ratios=st.tuples(RATIOS, RATIOS))
def test_global_ratios_grow_with_the_ratio_in_every_group(groups, ratios):
    less, more = (global_ratios(groups, ratio) for ratio in sorted(ratios))
    assert all(less[name] <= more[name] for name in groups)


def test_global_ratios_take_the_lowest_of_all_groups():
    groups = {"weak": torch.tensor([0.1, 0.2, 0.3, 0.4]), "strong": torch.tensor([5.0, 6.0, 0.05, 7.0])}
    assert global_ratios(groups, 0.5) == {"weak": 0.75, "strong": 0.25}
    assert global_ratios(groups, 0.5, least={"weak": 2}) == {"weak": 0.5, "strong": 0.5}
    assert global_ratios({"tiny": torch.ones(2)}, 0.9, least={"tiny": 4}) == {"tiny": 0.0}
