"""Schedules: exact ends, never back, and the formulas of the papers."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim import ChannelPruning, Ramp, WeightPruning
from lightning_optim.functional.schedules import SCHEDULES, multi_step

FRACTIONS = st.floats(0, 1)
SPARSITIES = st.floats(0, 0.999)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@settings(deadline=None, derandomize=True)
@given(a=FRACTIONS, b=FRACTIONS, initial=SPARSITIES, final=SPARSITIES)
def test_every_schedule_goes_from_initial_to_final_and_never_back(name, a, b, initial, final):
    schedule = SCHEDULES[name]
    assert schedule(0.0, initial, final) == initial
    assert schedule(1.0, initial, final) == final
    early, late = schedule(min(a, b), initial, final), schedule(max(a, b), initial, final)
    low, high = sorted((initial, final))
    assert low <= early <= high
    assert early <= late if initial <= final else early >= late


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@settings(deadline=None, derandomize=True)
@given(u=FRACTIONS, final=SPARSITIES)
def test_every_schedule_is_monotone_between_neighbouring_floats(name, u, final):
    schedule = SCHEDULES[name]
    values = [u]
    for _ in range(8):
        values.append(math.nextafter(values[-1], 2.0))
    results = [schedule(value, 0.0, final) for value in values]
    assert results == sorted(results)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_clips_the_progress(name):
    schedule = SCHEDULES[name]
    assert schedule(-0.5, 0.1, 0.7) == 0.1
    assert schedule(1.5, 0.1, 0.7) == 0.7


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    ("u", "initial", "final", "what"),
    [(0.5, 0.0, 80, "`final`.*got 80"), (0.5, -0.1, 0.8, "`initial`.*-0.1"), (0.5, 0.0, 1.0, "`final`.*1.0")],
)
def test_every_schedule_refuses_what_is_no_sparsity(name, u, initial, final, what):
    with pytest.raises(ValueError, match=what):
        SCHEDULES[name](u, initial, final)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_refuses_nan_as_progress(name):
    with pytest.raises(ValueError, match="nan"):
        SCHEDULES[name](math.nan, 0.0, 0.8)


@pytest.mark.parametrize(
    ("name", "u", "expected"),
    [
        # Zhu and Gupta 2017: 0.8 * (1 - (1 - u)^3), by hand: 0.8 * (1 - 27/64) and 0.8 * (1 - 1/8).
        ("cubic", 0.25, 0.4625),
        ("cubic", 0.5, 0.7),
        ("linear", 0.25, 0.2),
        # (1 - cos(pi/3)) / 2 = 1/4.
        ("cosine", 1 / 3, 0.2),
        ("cosine", 0.5, 0.4),
        # Density falls geometrically: 0.2 ** 0.5.
        ("exponential", 0.5, 1 - math.sqrt(0.2)),
        ("one_shot", 1e-9, 0.8),
    ],
)
def test_values_by_hand(name, u, expected):
    assert SCHEDULES[name](u, 0.0, 0.8) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("u", [0.1, 0.3, 3 / 7, 0.8])
def test_one_cycle_is_the_papers_curve_moved_to_an_exact_start(u):
    """Hubens et al. 2021: s_i + (s_f - s_i) (1 + e^(b-a)) / (1 + e^(b-a u)), a = 14, b = 6."""

    def paper(u):
        return (1 + math.exp(6 - 14)) / (1 + math.exp(6 - 14 * u))

    expected = 0.1 + 0.8 * (paper(u) - paper(0)) / (1 - paper(0))
    assert SCHEDULES["one_cycle"](u, 0.1, 0.9) == pytest.approx(expected, abs=1e-6)
    assert SCHEDULES["one_cycle"](u, 0.1, 0.9) == pytest.approx(0.1 + 0.8 * paper(u), abs=0.0025)


def test_exponential_with_equal_ends_stays():
    assert SCHEDULES["exponential"](0.3, 0.5, 0.5) == 0.5


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown schedule 'cubical'; known: cosine, cubic, exponential"):
        SCHEDULES.resolve("cubical")


STEPS = {"milestones": [0.3, 0.6, 1.0], "values": [0.5, 0.8, 1.0]}


def test_multi_step_stays_and_jumps():
    schedule = SCHEDULES.resolve({"multi_step": STEPS})
    values = [schedule(u, 0.2, 0.7) for u in (0.0, 0.29, 0.3, 0.59, 0.6, 0.99, 1.0)]
    assert values == pytest.approx([0.2, 0.2, 0.45, 0.45, 0.6, 0.6, 0.7])
    assert values == [multi_step(u, 0.2, 0.7, **STEPS) for u in (0.0, 0.29, 0.3, 0.59, 0.6, 0.99, 1.0)]


@settings(deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.floats(0.01, 1), FRACTIONS), min_size=1, max_size=5, unique_by=lambda step: step[0]),
    a=FRACTIONS,
    b=FRACTIONS,
    final=SPARSITIES,
)
def test_multi_step_goes_from_initial_to_final_and_never_back(steps, a, b, final):
    values = sorted(value for _, value in steps)
    steps = {"milestones": sorted(at for at, _ in steps), "values": [*values[:-1], 1.0]}
    schedule = SCHEDULES.resolve({"multi_step": steps})
    assert schedule(0.0, 0.0, final) == 0.0
    assert schedule(1.0, 0.0, final) == final
    assert 0.0 <= schedule(min(a, b), 0.0, final) <= schedule(max(a, b), 0.0, final) <= final


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ({"milestones": [0.5]}, "one number for each step, got 1 and 3"),
        ({"milestones": [], "values": []}, "one number for each step, got 0 and 0"),
        ({"milestones": [0.6, 0.3, 1.0], "values": [0.1, 0.2, 1.0]}, "`milestones` must rise"),
        ({"milestones": [0.0, 1.0], "values": [0.1, 1.0]}, "`milestones` must rise"),
        ({"milestones": [30, 60], "values": [0.1, 1.0]}, "`milestones` must rise, each in"),
        ({"milestones": [0.5, 1.0], "values": [0.9, 0.8]}, "`values` must not fall and end at 1"),
        ({"milestones": [0.5, 1.0], "values": [0.5, 0.8]}, "`values` must not fall and end at 1"),
        ({"milestones": [math.nan, 1.0], "values": [0.5, 1.0]}, "`milestones` must rise"),
        ({"milestones": [0.2, math.nan, 1.0], "values": [0.1, 0.5, 1.0]}, "`milestones` must rise"),
        ({"milestones": [0.2, 0.5, 1.0], "values": [0.1, math.nan, 1.0]}, "`values` must not fall"),
        ({"milestones": [0.5, 1.0], "values": [math.nan, 1.0]}, "`values` must not fall"),
        ({"milestones": "0.5"}, "`milestones` must be a list of numbers"),
        ({"values": ["a", 1.0, 1.0]}, "`values` must be a list of numbers"),
        ({"steps": 3}, "schedule 'multi_step' has no argument 'steps'; known: milestones, values"),
        (3, r"is \{name: \{argument: value\}\}, got"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda schedule: WeightPruning(0.5, schedule=schedule),
        lambda schedule: ChannelPruning(0.5, schedule=schedule),
        lambda schedule: Ramp(0.0, 1.0, schedule=schedule),
    ],
    ids=["weights", "channels", "ramp"],
)
def test_wrong_steps_are_rejected_by_the_constructor(make, steps, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make({"multi_step": steps})


def test_events_of_a_callback_follow_the_steps():
    pruning = WeightPruning(0.8, schedule={"multi_step": STEPS}, start=0, end=10, every_n_steps=1)
    assert pruning.preview(10) == [
        (step, pytest.approx(0.8 * (1.0 if step == 10 else 0.8 if step >= 6 else 0.5 if step >= 3 else 0.0)))
        for step in range(11)
    ]
