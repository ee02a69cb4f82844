import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from helpers.models import Classifier, new, train_loader, trainer, val_loader
from lightning_optim.window import Window, planned_steps


@given(
    start=st.one_of(st.floats(0, 1), st.integers(0, 50)),
    end=st.one_of(st.floats(0, 1), st.integers(0, 50)),
    every=st.integers(1, 30),
    planned=st.integers(50, 400),
)
def test_events_are_due_at_start_at_end_and_never_twice(start, end, every, planned):
    """Stepping through a run meets each event step once, the first at `start` and the last at `end`."""
    try:
        window = Window(start, end, every_n_steps=every)
        window.resolve(planned)
    except (ValueError, MisconfigurationException):
        return
    met = []
    for step in range(planned + 1):
        if step:
            window.count_step()
        if window.due():
            met.append(window.step)
            window.event_done()
        assert not window.due()
    assert met == window.event_steps()
    assert met[0] == window.start_step
    assert met[-1] == window.end_step
    assert window.closed
    assert window.progress() == 1.0


def test_fractions_are_of_the_planned_steps_and_ints_are_steps():
    window = Window(0.1, 0.7, every_n_steps=100)
    window.resolve(1000)
    assert window.event_steps() == [100, 200, 300, 400, 500, 600, 700]
    window = Window(5, 1.0, every_n_steps=10)
    window.resolve(30)
    assert window.event_steps() == [5, 15, 25, 30]


def test_a_number_of_events_is_spread_over_the_window():
    window = Window(10, 50, events=4)
    window.resolve(100)
    assert window.event_steps() == [10, 20, 30, 40, 50]
    window = Window(10, 12, events=8)
    window.resolve(100)
    assert window.event_steps() == [10, 11, 12]
    with pytest.raises(ValueError, match="`events` must be a whole number"):
        Window(0.1, 0.5, events=0)


def test_one_event_when_start_is_end():
    window = Window(0.5, 0.5)
    window.resolve(10)
    assert window.event_steps() == [5]
    assert window.progress(5) == 1.0
    assert window.progress(4) == 0.0


def test_fast_dev_run_reaches_the_target():
    window = Window(500, 1000)
    window.resolve(1, clamp=True)
    assert window.event_steps() == [1]


def test_state_keeps_the_resolved_window():
    window = Window(0.1, 0.5)
    window.resolve(100)
    window.step, window.last_event = 17, 15
    other = Window(0.1, 0.5)
    other.load_state_dict(window.state_dict())
    assert other.state_dict() == window.state_dict()
    assert other.end_step == 50


@pytest.mark.parametrize(
    ("start", "end", "error", "message"),
    [
        (0.7, 0.1, ValueError, "`start` must not be after `end`"),
        (10, 5, ValueError, "`start` must not be after `end`"),
        (1.5, 2.0, ValueError, "is a fraction"),
        (-1, 5, ValueError, "step >= 0"),
        (True, 5, TypeError, "`start` must be an int"),
        ("0.1", 0.5, TypeError, "`start` must be an int"),
        (math.nan, 0.5, ValueError, "is a fraction"),
    ],
)
def test_bad_windows_raise(start, end, error, message):
    with pytest.raises(error, match=message):
        Window(start, end)


def test_every_n_steps_is_a_positive_int():
    with pytest.raises(ValueError, match="every_n_steps"):
        Window(0.1, 0.5, every_n_steps=0)
    with pytest.raises(ValueError, match="every_n_steps"):
        Window(0.1, 0.5, every_n_steps=2.5)


def test_a_mixed_window_that_turns_around_raises_when_resolved():
    window = Window(80, 0.5)
    with pytest.raises(MisconfigurationException, match="after `end`"):
        window.resolve(100)


def test_a_fraction_of_unknown_steps_asks_for_ints():
    with pytest.raises(MisconfigurationException, match=r"Give `freeze` as an int"):
        Window(5, 0.5, names=("start", "freeze")).resolve(math.inf)


def test_a_window_beyond_the_run_warns_with_both_numbers():
    with pytest.warns(UserWarning, match=r"step 500, but the run is planned to take 100 steps"):
        Window(10, 500).resolve(100)


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
        ({"max_epochs": 100, "max_steps": 17}, 17),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": -1, "limit_train_batches": 1}, math.inf),
        ({"max_epochs": 2, "fast_dev_run": True}, 1),
    ],
)
def test_planned_steps_of_a_trainer(tmp_path, options, planned):
    class Asks(Classifier):
        def on_fit_start(self):
            self.planned = planned_steps(self.trainer)
            self.trainer.should_stop = True
            self.trainer.fit_loop.min_epochs = None

    module = new(Asks)
    run = trainer(tmp_path, **options)
    run.fit(module, train_loader(), val_loader())
    assert module.planned == planned


def test_manual_optimization_with_max_steps_has_no_known_number(tmp_path):
    run = trainer(tmp_path, max_steps=5)
    assert math.isinf(planned_steps(run, automatic_optimization=False))
