"""How many channels each group keeps, so that all together lose what is asked."""

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.allocation import Width, asked_channels, even_widths, global_widths, missed

RATIOS = st.floats(0.0, 0.99)
LEVELS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])


@st.composite
def widths(draw, gone=False, floors=True):
    """Groups of whole units; where `gone`, some of the units have left already."""
    found = {}
    for index in range(draw(st.integers(1, 5))):
        unit = draw(st.sampled_from([1, 1, 2, 3, 8, 16]))
        pieces = draw(st.integers(1, 12 if unit > 1 else 40))
        odd = draw(st.integers(0, unit - 1))  # a dense width that is no multiple
        now = unit * pieces if gone and odd == 0 else unit * pieces + odd
        more = unit * draw(st.integers(0, 3)) if gone else 0
        least = unit * draw(st.integers(1, 2)) if floors else 1
        found[f"g{index}"] = Width(now + more, now, unit, least)
    return found


@st.composite
def scored(draw, **words):
    groups = draw(widths(**words))
    return groups, {name: torch.tensor(sorted(draw_scores(draw, width.now))) for name, width in groups.items()}


def draw_scores(draw, number):
    return draw(st.lists(LEVELS, min_size=number, max_size=number))


def removed(groups, kept):
    return sum(width.dense - kept[name] for name, width in groups.items())


def open_steps(groups, kept, most=None):
    """Sizes of the units that groups could still lose."""
    steps = []
    for name, width in groups.items():
        step = width.next_step(kept[name])
        floor = 0 if most is None else width.dense - math.floor(most * width.dense)
        if step and kept[name] - step >= floor:
            steps.append(step)
    return steps


def assert_lawful(groups, kept):
    for name, width in groups.items():
        assert kept[name] == width.now or (kept[name] % width.unit == 0 and kept[name] >= width.least)
        assert 0 < kept[name] <= width.now


@given(groups=scored(gone=True), ratio=RATIOS)
def test_a_global_ranking_misses_by_less_than_the_smallest_unit_that_is_left(groups, ratio):
    groups, scores = groups
    kept = global_widths(groups, scores, ratio)
    assert_lawful(groups, kept)
    asked, already = asked_channels(groups.values(), ratio), sum(width.gone for width in groups.values())
    assert removed(groups, kept) <= max(asked, already)
    assert all(asked - removed(groups, kept) < step for step in open_steps(groups, kept, most=0.9))
    assert missed(groups, kept, ratio) == max(0, asked - removed(groups, kept))


@given(groups=scored(), ratio=RATIOS)
def test_a_global_ranking_starves_no_group(groups, ratio):
    groups, scores = groups
    kept = global_widths(groups, scores, ratio)
    assert all(width.dense - kept[name] <= math.floor(0.9 * width.dense) for name, width in groups.items())


@given(groups=scored(gone=True), ratios=st.tuples(RATIOS, RATIOS))
def test_what_waits_for_the_next_event_nests_as_the_ratio_grows(groups, ratios):
    groups, scores = groups
    less, more = (global_widths(groups, scores, ratio, fill=False) for ratio in sorted(ratios))
    assert all(less[name] >= more[name] for name in groups)
    asked = asked_channels(groups.values(), min(ratios))
    largest = max(width.unit for width in groups.values())
    assert asked - removed(groups, less) < largest or not open_steps(groups, less, most=0.9)


def test_a_global_ranking_takes_the_lowest_of_all_groups():
    groups = {"weak": Width(4, 4), "strong": Width(4, 4)}
    scores = {"weak": torch.tensor([0.1, 0.2, 0.3, 0.4]), "strong": torch.tensor([0.05, 5.0, 6.0, 7.0])}
    assert global_widths(groups, scores, 0.5) == {"weak": 1, "strong": 3}
    floors = {"weak": Width(4, 4, least=2), "strong": Width(4, 4)}
    assert global_widths(floors, scores, 0.5) == {"weak": 2, "strong": 2}
    assert global_widths({"tiny": Width(2, 2, least=4)}, {"tiny": torch.ones(2)}, 0.9) == {"tiny": 2}


def test_units_that_do_not_fit_wait_while_events_follow_and_are_made_up_for_at_the_last():
    groups = {"norm": Width(32, 32, 16, 16), "free": Width(32, 32)}
    scores = {"norm": torch.full((32,), 0.1), "free": torch.arange(1.0, 33)}
    assert global_widths(groups, scores, 0.2, fill=False) == {"norm": 32, "free": 32}
    assert global_widths(groups, scores, 0.2) == {"norm": 32, "free": 20}
    assert global_widths(groups, scores, 0.25, fill=False) == {"norm": 16, "free": 32}


@given(groups=widths(gone=True), ratio=RATIOS)
def test_an_even_share_is_within_one_unit_in_each_group_and_in_total(groups, ratio):
    kept = even_widths(groups, ratio)
    assert_lawful(groups, kept)
    asked, already = asked_channels(groups.values(), ratio), sum(width.gone for width in groups.values())
    already_over = any(width.gone > ratio * width.dense for width in groups.values())
    assert already_over or removed(groups, kept) <= max(asked, already)
    at_floor = False
    for name, width in groups.items():
        share = ratio * width.dense
        assert kept[name] == width.now or width.dense - kept[name] < share + width.unit
        behind = share - (width.dense - kept[name])
        at_floor = at_floor or (behind > 0 and not width.next_step(kept[name]))
        assert behind < width.unit or not width.next_step(kept[name])
    if not at_floor:
        assert asked - removed(groups, kept) < max(width.unit for width in groups.values())


@given(width=widths(floors=False).map(lambda groups: groups["g0"]), number=st.integers(2, 6), ratio=RATIOS)
def test_equal_groups_stay_equal_as_far_as_the_total_allows(width, number, ratio):
    groups = {f"g{index}": replace(width) for index in range(number)}
    kept = even_widths(groups, ratio)
    together = dict.fromkeys(groups, max(kept.values()))
    assert len(set(kept.values())) == 1 or missed(groups, together, ratio) >= width.unit


def test_numbers_of_an_even_share():
    """Half of 64, 48, 32, 24 and 16 in multiples of 16; nothing is left over where shares are whole."""
    sizes = {"a": 64, "b": 48, "c": 32, "d": 24, "e": 16}
    exact = {name: Width(size, size) for name, size in sizes.items()}
    assert even_widths(exact, 0.5) == {"a": 32, "b": 24, "c": 16, "d": 12, "e": 8}
    rounded = {name: Width(size, size, 16, 16) for name, size in sizes.items()}
    kept = even_widths(rounded, 0.5)  # 32 + 16 + 16 + 8 + 0 leave by their shares, 16 are missing, b is 8 of 16 behind
    assert kept == {"a": 32, "b": 16, "c": 16, "d": 16, "e": 16}
    assert missed(rounded, kept, 0.5) == 4
    assert even_widths({"a": Width(10, 10)}, 0.99) == {"a": 1}


def test_what_is_gone_already_counts_and_does_not_come_back():
    groups = {"a": Width(16, 4), "b": Width(16, 16)}
    assert even_widths(groups, 0.25) == {"a": 4, "b": 12}
    assert global_widths(groups, {"a": torch.ones(4), "b": torch.ones(16)}, 0.25) == {"a": 4, "b": 16}
