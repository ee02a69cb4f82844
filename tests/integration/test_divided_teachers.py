"""Teachers divided among processes: they answer as whole ones, take a share of the memory, and stay out of files."""

from pathlib import Path

import pytest
import torch

from helpers.models import assert_same_state
from helpers.ranks import run_ranks

pytest.importorskip("transformers")
WORKER = Path(__file__).with_name("teacher_worker.py")
pytestmark = pytest.mark.distributed
PRESETS = {"optim_fsdp": 2, "optim_zero2": 2, "optim_hsdp": 4}
DIVIDES = ("optim_fsdp", "optim_hsdp")
every_preset = pytest.mark.parametrize(
    "preset", ["optim_fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name != "optim_fsdp")]
)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    done = {}

    def launch(preset):
        if preset not in done:
            out = tmp_path_factory.mktemp(preset)
            run_ranks(WORKER, out, preset, processes=PRESETS[preset])
            done[preset] = [
                torch.load(out / preset / f"rank{rank}.pt", weights_only=True) for rank in range(PRESETS[preset])
            ]
        return done[preset]

    return launch


@pytest.mark.slow
@every_preset
def test_a_divided_teacher_teaches_what_a_whole_one_does(launched, preset):
    for ours in launched(preset):
        for divided, whole in (("straight", "whole"), ("by hand", "by hand, whole")):
            assert ours[divided]["divided"] == (preset in DIVIDES)
            assert not ours[whole]["divided"]
            assert ours[divided]["losses"] == pytest.approx(ours[whole]["losses"], rel=1e-6)
            assert ours[divided]["checksum"] == ours[whole]["checksum"]
            for name, value in ours[whole]["state"].items():
                torch.testing.assert_close(ours[divided]["state"][name], value, rtol=1e-6, atol=1e-6)


@every_preset
def test_a_divided_teacher_answers_for_a_cache_as_a_whole_one(launched, preset):
    for ours in launched(preset):
        assert ours["bytes"][0] == ours["bytes"][1]
        assert ours["cached"]["divided"] == (preset in DIVIDES)
        assert ours["cached"]["losses"] == ours["cached, whole"]["losses"]
        assert_same_state(ours["cached"]["state"], ours["cached, whole"]["state"])


@every_preset
def test_each_rank_holds_its_share(launched, preset):
    for ours in launched(preset):
        share = ours["straight"]["held"] / ours["straight"]["all"]
        assert share == pytest.approx(0.5 if preset in DIVIDES else 1.0, abs=0.01)
        assert ours["whole"]["held"] == ours["whole"]["all"]


@every_preset
def test_ranks_agree(launched, preset):
    first, *others = launched(preset)
    for other in others:
        for name in ("straight", "by hand", "resumed"):
            assert_same_state(first[name]["state"], other[name]["state"])
            assert first[name]["losses"] == other[name]["losses"]


@every_preset
def test_resumed_again_and_by_another_module(launched, preset):
    ours = launched(preset)[0]
    assert_same_state(ours["straight"]["state"], ours["resumed"]["state"])
    assert all(name.startswith(("student.", "projectors.")) for name in ours["straight"]["state"])
    for name in ("first of two", "second of two"):
        assert_same_state(ours["straight"]["state"], ours[name]["state"])
    assert ours["second fit"]["divided"] == (preset in DIVIDES)
    assert ours["second fit"]["losses"][0] < ours["straight"]["losses"][0]  # it went on from the first
    assert ours["validated without"] > 0


@every_preset
def test_models_of_others_answer_bit_for_bit(launched, preset):
    for ours in launched(preset):
        for name, found in ours["answers"].items():
            assert found["same"], name
            if preset in DIVIDES:
                assert found["share"] == pytest.approx(0.5, abs=0.06), name
                assert not found["gathered"], name


@every_preset
def test_what_cannot_be_divided_says_so(launched, preset):
    for ours in launched(preset):
        assert "is divided already: its parameters are DTensors" in ours["divided by the user"]
        if preset in DIVIDES:
            assert "was divided by an earlier fit, and OptimDDP keeps teachers whole" in ours["under ddp"]
            assert "two teachers share model.embed_tokens.weight" in ours["sharing"]
        else:
            assert ours["under ddp"] == ours["sharing"] == "nothing"
