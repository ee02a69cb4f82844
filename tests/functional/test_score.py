import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.score import DEFAULT_WEIGHTS, Terms, guarded, performance_score

positive = st.floats(0.01, 100)
weights = st.fixed_dictionaries({name: st.floats(0, 10) for name in DEFAULT_WEIGHTS})


def test_the_sources_formula_to_the_letter():
    """All references 1: 0.4 * 3,165,988 parameters + 0.6 * 0.62 + 0.1 * (1 - 0.323), by hand."""
    score = performance_score(Terms(size=3_165_988, inference_time=0.62, error=1 - 0.323))
    assert score == pytest.approx(1_266_395.2 + 0.372 + 0.0677)


@given(size=positive, train=positive, infer=positive, error=st.floats(0, 1), weights=weights, more=st.floats(0.01, 5))
def test_p_grows_with_each_term_that_has_weight(size, train, infer, error, weights, more):
    base = performance_score(Terms(size, train, infer, error), weights)
    worse = {
        "size": Terms(size + more, train, infer, error),
        "train_time": Terms(size, train + more, infer, error),
        "inference_time": Terms(size, train, infer + more, error),
        "accuracy": Terms(size, train, infer, error + more),
    }
    for name, terms in worse.items():
        assert performance_score(terms, weights) == pytest.approx(base + weights[name] * more, rel=1e-9)


def test_a_term_without_weight_need_not_be_measured_and_one_with_weight_makes_nan():
    assert performance_score(Terms(size=1.0, inference_time=1.0, error=0.0)) == 1.0
    assert math.isnan(performance_score(Terms(size=1.0, error=0.0)))


def test_an_infeasible_model_is_finite_and_worse_than_any_feasible_one():
    assert guarded(0.2, True) == 0.2
    assert guarded(0.0, False) == 1000.0
    assert guarded(0.0, False) > guarded(50.0, True)


def test_the_empty_model_wins_without_a_guard():
    """Why the guard exists (wA = 0.1): a model of one parameter that is always wrong scores better."""
    dense = performance_score(Terms(size=1.0, inference_time=1.0, error=0.05))
    empty = performance_score(Terms(size=1e-6, inference_time=1e-6, error=1.0))
    assert empty < dense
