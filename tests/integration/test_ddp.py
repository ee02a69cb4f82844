"""Two gloo processes: ranks agree, and a resumed run equals the uninterrupted one bit for bit.

One launch runs the quick cases and one the slow; a test each then reads what the ranks wrote.
"""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from helpers.models import Classifier, assert_same_state, data, train_loader, trainer, val_loader
from helpers.ranks import Launches, quick_and_slow
from lightning_optim import WeightPruning, load_from_checkpoint

WORKER = Path(__file__).with_name("ddp_worker.py")
QUICK = ("taylor/bf16-mixed", "score/32-true", "both/32-true", "integers/32-true", "blocks-stack/32-true")
SLOW = (
    "magnitude/32-true",
    "magnitude/bf16-mixed",
    "taylor/32-true",
    "random/32-true",
    "wanda/32-true",
    "nofm/32-true",
    "channels/32-true",
    "channels/bf16-mixed",
    "channels-taylor/32-true",
    "channels-activation/32-true",
    "channels-growing/32-true",
    "channels-lasso/bf16-mixed",
    "blocks-stack/bf16-mixed",
    "blocks-influence-stack/32-true",
    "low-rank/32-true",
    "low-rank/bf16-mixed",
    "integers/bf16-mixed",
    "integers-residual/32-true",
    "integers-late/32-true",
    "integers-unbroadcast/32-true",
    "integers-histogram/32-true",
    "weights-integers/32-true",
)


def cases(keep=lambda case: True):
    return quick_and_slow(QUICK, SLOW, keep)


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return Launches(WORKER, tmp_path_factory.mktemp, QUICK, SLOW)


def results(launched, case, rank):
    return torch.load(launched(case) / case.replace("/", "-") / f"rank{rank}.pt", weights_only=True)


@pytest.mark.parametrize("case", cases())
def test_ranks_agree_on_masks_and_weights(launched, case):
    first, second = results(launched, case, 0), results(launched, case, 1)
    for run in first:
        assert_same_state(first[run]["parameters"], second[run]["parameters"])
        assert_same_state(first[run]["masks"], second[run]["masks"])
        assert first[run]["metrics"] == pytest.approx(second[run]["metrics"])
        assert first[run]["metrics"].keys() == second[run]["metrics"].keys()


@pytest.mark.parametrize("case", cases())
def test_resumed_at_every_epoch_equals_uninterrupted(launched, case):
    runs = results(launched, case, 0)
    for name, run in runs.items():
        assert_same_state(runs["straight"]["state"], run["state"]), name
        assert_same_state(runs["straight"]["masks"], run["masks"])
        assert run["step"] == 24


@pytest.mark.parametrize("case", cases(lambda case: case.startswith("low-rank")))
def test_layers_are_two_on_both_ranks_and_have_the_statistics_of_both(launched, case):
    for rank in (0, 1):
        run = results(launched, case, rank)["straight"]
        shapes = {name: tuple(p.shape) for name, p in run["parameters"].items() if "reduce" in name}
        assert shapes == {"net.0.reduce.weight": (4, 12), "net.4.reduce.weight": (4, 16)}
        assert set(run["masks"]) == {f"net.{i}.{factor}.weight" for i in (0, 4) for factor in ("reduce", "expand")}


@pytest.mark.parametrize("case", cases(lambda case: case.startswith(("channels", "both"))))
def test_channels_left_on_both_ranks(launched, case):
    for rank in (0, 1):
        run = results(launched, case, rank)["straight"]
        widths = [run["parameters"][f"net.{i}.weight"].shape[0] for i in (0, 4)]
        assert sum(widths) == 16
        assert run["metrics"]["channels/parameters"] < 0.6


@pytest.mark.parametrize("case", cases(lambda case: case.startswith("blocks")))
def test_blocks_left_on_both_ranks(launched, case):
    for rank in (0, 1):
        run = results(launched, case, rank)["straight"]
        assert {name.split(".")[1] for name in run["parameters"] if name.startswith("blocks.")} == {"0", "1"}
        assert run["metrics"]["depth/blocks"] == 2


@pytest.mark.parametrize("case", cases(lambda case: not case.startswith(("channels", "both", "integers", "blocks"))))
def test_what_is_asked_is_reached(launched, case):
    run = results(launched, case, 0)["straight"]
    asked = 0.5 if case.startswith(("nofm", "low-rank")) else 0.8
    zeros = sum(int((run["parameters"][name] == 0).sum()) for name in run["masks"])
    weights = sum(run["parameters"][name].numel() for name in run["masks"])
    assert weights < 448 if case.startswith("low-rank") else weights == 448
    assert zeros == pytest.approx(asked * weights, abs=1)
    assert run["metrics"]["pruning/sparsity"] == pytest.approx(asked, abs=1 / weights)


@pytest.mark.parametrize("case", cases(lambda case: "integers" in case))
def test_ranges_are_those_of_both_ranks(launched, case):
    runs = [results(launched, case, rank)["straight"] for rank in (0, 1)]
    ranges = [{n: v for n, v in run["state"].items() if "input_" in n or "output_" in n} for run in runs]
    assert len(ranges[0]) == 4 * next((n for word, n in (("residual", 5), ("late", 4)) if word in case), 3)
    assert_same_state(*ranges)
    assert all(run["metrics"]["quantization/phase"] == 3.0 for run in runs)


def test_ranges_equal_those_of_one_process(launched):
    """The first layer's inputs are the data, so its range is known: the mean of the extremes of the global batches."""
    rows = data().tensors[0]
    samplers = [DistributedSampler(rows, 2, rank, shuffle=True, seed=1) for rank in (0, 1)]
    lows, highs = [], []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        first, second = (torch.tensor(list(sampler)).view(-1, 4) for sampler in samplers)
        batches = rows[torch.cat([first, second], 1)]
        lows += batches.amin((1, 2)).tolist()
        highs += batches.amax((1, 2)).tolist()
    state = results(launched, "integers/32-true", 0)["straight"]["state"]
    assert int(state["net.0.input_batches"]) == 19 - 2
    low, high = -state["net.0.input_statistic"][0], state["net.0.input_statistic"][1]
    assert low.item() == pytest.approx(sum(lows[2:19]) / 17, rel=1e-5)
    assert high.item() == pytest.approx(sum(highs[2:19]) / 17, rel=1e-5)


def test_all_ranks_log_the_same_p(launched):
    metrics = [results(launched, "score/32-true", rank)["straight"]["metrics"] for rank in (0, 1)]
    assert metrics[0]["P"] == pytest.approx(metrics[1]["P"], rel=1e-6)
    assert {"P/train_time", "P/inference_time", "P/size", "P/error"} <= metrics[0].keys()


def test_a_file_of_two_processes_loads_in_one(launched, tmp_path):
    path = launched("taylor/bf16-mixed") / "taylor-bf16-mixed" / "files" / "2.ckpt"
    expected = results(launched, "taylor/bf16-mixed", 0)["straight"]["state"]
    assert_same_state(load_from_checkpoint(Classifier, path), expected)
    fresh = Classifier()
    trainer(tmp_path, WeightPruning(0.8)).test(fresh, val_loader(), path, verbose=False)
    assert_same_state(fresh, expected)


def test_masks_that_differ_between_ranks_are_found_at_the_event(launched):
    for rank in (0, 1):
        message = (launched(QUICK[0]) / f"disagree{rank}.txt").read_text()
        assert f"rank {rank} computed other masks than another rank" in message


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    """Callbacks, hooks and the module pickle."""
    run = trainer(tmp_path, WeightPruning(0.8, every_n_steps=4), strategy="ddp_spawn", devices=2, max_epochs=2)
    module = Classifier()
    run.fit(module, train_loader(), val_loader())
    assert sum(int((module.net[i].weight == 0).sum()) for i in (0, 4)) == 358
