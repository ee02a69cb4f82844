"""The table of techniques: what a row must be, and the windows that follow from their number."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.techniques import TRIED
from lightning_optim import (
    ChannelPruning,
    DepthPruning,
    LowRankFactorization,
    PerformanceScore,
    QuantizationAwareTraining,
    Recipe,
    WeightPruning,
)
from lightning_optim.techniques import RESERVED, TECHNIQUES, Technique, Techniques, windows


def test_the_rows_and_their_order():
    assert [row.callback_class for row in TECHNIQUES.values()] == [
        DepthPruning,
        ChannelPruning,
        LowRankFactorization,
        WeightPruning,
        QuantizationAwareTraining,
    ]


def test_the_tests_try_every_technique():
    assert TRIED.keys() == TECHNIQUES.keys()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_row_names_arguments_of_its_callback(name):
    """A class is checked when the row is made; one that is named by its path is checked here."""
    row = TECHNIQUES[name]
    Technique(row.name, row.callback_class, row.first, row.window, row.order)


def test_a_callback_acts_where_its_row_says():
    class Own(WeightPruning):
        pass

    callbacks = [QuantizationAwareTraining(), Own(0.5), ChannelPruning(0.5), DepthPruning(0.5)]
    assert [callback.order for callback in callbacks] == [30, 20, 10, 5]
    assert TECHNIQUES.of(Own(0.5)) is TECHNIQUES["weight_pruning"]
    assert TECHNIQUES.of(PerformanceScore()) is None
    assert TECHNIQUES.order_of(PerformanceScore()) == 30


def test_a_row_of_a_subclass_counts_before_that_of_its_base():
    class Own(WeightPruning):
        pass

    table = Techniques()
    for row in (TECHNIQUES["weight_pruning"], Technique("own", Own, "sparsity", order=15)):
        table.register(row)
    assert list(table) == ["own", "weight_pruning"]
    assert table.of(Own(0.5)).name == "own"
    table.unregister("own")
    assert table.of(Own(0.5)).name == "weight_pruning"


def test_a_recipe_has_no_other_attributes():
    assert {name for name in (*vars(Recipe), *Recipe.__dataclass_fields__) if not name.startswith("_")} == RESERVED


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"name": "low-rank"}, "must be a Python identifier"),
        ({"name": "score"}, "no attribute of Recipe, got 'score'"),
        ({"callback": "WeightPruning"}, "a class or its dotted path"),
        ({"order": "last"}, "`order` must be a number"),
        ({"window": ("start",)}, "must name two arguments, or be empty"),
        ({"first": "rank"}, "WeightPruning has no argument 'rank'; its arguments are sparsity"),
    ],
    ids=str,
)
def test_a_wrong_row_is_rejected(row, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Technique(**{"name": "mine", "callback": WeightPruning, "first": "sparsity", **row})


def test_a_taken_name_is_rejected():
    with pytest.raises(ValueError, match="'quantization' is already registered"):
        TECHNIQUES.register(TECHNIQUES["quantization"])
    with pytest.raises(TypeError, match=r"is a Technique\(name, callback"):
        TECHNIQUES.register("quantization")


@given(count=st.integers(1, 30))
def test_windows_follow_each_other_with_equal_time_to_recover(count):
    laid_out = windows(count)
    assert len(laid_out) == count
    assert all(start < end for start, end in laid_out)
    gaps = [laid_out[0][0], *(after - before for (_, before), (after, _) in pairwise(laid_out)), 1 - laid_out[-1][1]]
    assert gaps == pytest.approx([min(0.1, 0.5 / (count + 1))] * (count + 1), abs=2e-4)
    lengths = [end - start for start, end in laid_out]
    assert all(later <= earlier + 2e-4 for earlier, later in pairwise(lengths))
