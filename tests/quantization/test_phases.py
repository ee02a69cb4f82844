"""Phases of a run and of its layers, without a Trainer."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.quantization.layers import PHASES
from lightning_optim.quantization.phases import LayerPhases, observing_steps, phase_at


def test_phases_follow_each_other():
    assert [phase_at(step, 2, 4, 8) for step in (0, 2, 3, 4, 7, 8, 20)] == [
        *("off", "observe", "observe", "fake_quantize", "fake_quantize", "frozen", "frozen")
    ]
    assert phase_at(5, None, None, None) == "off"
    assert phase_at(5, 5, 5, 9) == "fake_quantize"  # weights only: nothing is observed


@pytest.mark.parametrize(
    ("start", "freeze", "steps", "movable", "fast", "expected"),
    [
        (4, 10, 3, False, False, (4, 7)),
        (8, 10, 3, True, False, (7, 10)),  # a fraction makes room
        (1, 2, 5, True, True, (0, 2)),  # fast_dev_run observes what there is
    ],
)
def test_observing_ends_before_ranges_are_frozen(start, freeze, steps, movable, fast, expected):
    assert observing_steps(start, freeze, steps, movable=movable, fast_dev_run=fast) == expected


@pytest.mark.parametrize(("start", "freeze", "steps", "movable"), [(8, 10, 3, False), (0, 2, 3, True)])
def test_observing_that_does_not_fit_raises(start, freeze, steps, movable):
    with pytest.raises(MisconfigurationException, match="which is not over by `freeze`"):
        observing_steps(start, freeze, steps, movable=movable, fast_dev_run=False)


def test_some_layers_are_in_another_phase():
    phases = LayerPhases(rounded=["old"], unseen={"late"})
    found = {due: phases.wanted(("old", "late", "new"), due) for due in PHASES}
    assert found == {
        "off": {"old": "fake_quantize", "late": "observe", "new": "off"},
        "observe": {"old": "fake_quantize", "late": "observe", "new": "observe"},
        "fake_quantize": {"old": "fake_quantize", "late": "observe", "new": "fake_quantize"},
        "frozen": {"old": "frozen", "late": "off", "new": "frozen"},
    }
    phases.rename({"old": "moved", "late": None})
    assert (phases.rounded, phases.unseen) == (["moved"], set())
