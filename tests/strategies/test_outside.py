"""Parameters that a unit cannot hold, on two gloo processes: every sharded preset trains them as DDP does."""

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.ranks import run_ranks
from lightning_optim.strategies.whole import groups_by_dtype, kept_whole

WORKER = Path(__file__).with_name("outside_worker.py")
KINDS = ("ScoresByTable", "EmbedsByHead", "ByHand", "Scaled", "Typed")
EXACT = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank wrote."""
    out = tmp_path_factory.mktemp("outside")
    run_ranks(WORKER, out)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_trains_as_ddp(runs, name, strategy, tolerance=EXACT):
    first, second = (run[f"{name} {strategy}"] for run in runs)
    expected = runs[0][f"{name} ddp"]
    assert first["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert first["losses"][-1] < first["losses"][0]
    assert first["val_loss"] == pytest.approx(expected["val_loss"], abs=tolerance)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        torch.testing.assert_close(value, expected["weights"][key], rtol=0, atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "strategy"), [*((kind, "fsdp") for kind in KINDS), *((kind, "zero2") for kind in KINDS[:2])]
)
def test_every_step_equals_ddp(runs, name, strategy):
    assert_trains_as_ddp(runs, name, strategy)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ScoresByTable clipped", "Scaled clipped", "EmbedsByHead recomputed"])
def test_accumulated_clipped_and_recomputed_steps_equal_ddp(runs, name):
    assert_trains_as_ddp(runs, name, "fsdp")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_read_in_half_precision_stays_close(runs):
    half, expected = (runs[0][f"ScoresByTable half {name}"] for name in ("fsdp", "ddp"))
    assert half["losses"] == pytest.approx(expected["losses"], abs=2e-2)
    assert half["val_loss"] == pytest.approx(expected["val_loss"], abs=2e-2)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_read_inside_a_unit_is_a_sentence_that_names_units(runs):
    for run in runs:
        assert "`training_step` uses a parameter of a unit" in run["refused"]
        assert "OptimFSDP2(units=[...])" in run["refused"]
        assert "Units are Block, Embedding, Linear" in run["refused"]


def test_what_stays_whole_and_what_is_divided_apart():
    layer = nn.Linear(4, 4)
    layer.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    layer.shift = nn.Parameter(torch.ones(4, dtype=torch.float64))
    part = nn.Sequential(layer, nn.LayerNorm(4).double(), nn.Linear(4, 4), nn.Embedding(2, 4, dtype=torch.float16))
    part.own = nn.Parameter(torch.ones(4, dtype=torch.float64))
    whole = kept_whole(part)
    assert sorted(whole) == ["0.scale", "0.shift"]
    kept = set(whole.values())
    assert groups_by_dtype(part, kept) == [[part[1]], [part[3]]]
    assert part.own in kept  # the unit cannot be a unit inside itself
