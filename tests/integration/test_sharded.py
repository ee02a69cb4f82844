"""Every technique under every preset: as one process, resumed bit for bit, and going on under another preset.

One launch per preset runs its quick cases of ``matrix.py``, one the slow; a test each then reads what the ranks wrote.
"""

from pathlib import Path

import pytest
import torch

from helpers.models import assert_same_state
from helpers.ranks import run_ranks
from integration.matrix import FILES, INTEGERS, LAUNCHES, with_table
from integration.sharded_worker import STRUCTURAL, run

WORKER = Path(__file__).with_name("sharded_worker.py")
DIVIDED = [name for name in LAUNCHES if not name.startswith("optim_ddp")]
# With dynamic ranges each rank's part of a batch is rounded with the range of that part.
TOLERANCE = {"optim_ddp_bf16": 5e-4, "32-true": 2e-6, "bits": 2e-3, "dynamic": 2e-2}


def _marks(name, case=None):
    return [pytest.mark.distributed, *([] if case in LAUNCHES[name].quick else [pytest.mark.slow])]


def _cases(keep=lambda name, technique, precision: True):
    return [
        pytest.param(name, case, marks=_marks(name, case), id=f"{name}-{case}")
        for name, launch in LAUNCHES.items()
        for case in launch.cases
        if keep(name, *case.split("/"))
    ]


def _has_masks(name, technique, precision):
    return precision == "32-true" and technique in ("weights", "wanda", "columns", "both", "score", "all")


def _goes_on(name, technique, precision):
    return technique == "both" and precision == "32-true"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    done = {}

    def launch(name, case=None):
        speed = "quick" if case in LAUNCHES[name].quick else "slow"
        if (name, speed) not in done:
            out = tmp_path_factory.mktemp(f"{name}-{speed}")
            run_ranks(WORKER, out, name, speed, processes=LAUNCHES[name].processes)
            done[name, speed] = out
        return done[name, speed]

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes with the same global batch."""
    done = {}

    def fit(technique, precision):
        if (technique, precision) not in done:
            folder = tmp_path_factory.mktemp("alone")
            done[technique, precision] = run(folder, technique, precision, "optim_single")
        return done[technique, precision]

    return fit


def results(out, case, rank):
    return torch.load(out / case.replace("/", "-") / f"rank{rank}.pt", weights_only=True)


def _logged(run_):
    """Return what a rank logged, without its own times."""
    return {name: value for name, value in run_["metrics"].items() if not name.endswith("/seconds")}


@pytest.mark.parametrize(("name", "case"), _cases())
def test_ranks_agree(launched, name, case):
    out = launched(name, case)
    first = results(out, case, 0)
    for rank in range(1, LAUNCHES[name].processes):
        for kind, run_ in results(out, case, rank).items():
            assert_same_state(first[kind]["state"], run_["state"])
            assert_same_state(first[kind]["masks"], run_["masks"])
            assert first[kind]["losses"] == run_["losses"]
            assert _logged(first[kind]) == pytest.approx(_logged(run_))


@pytest.mark.parametrize(("name", "case"), _cases(lambda name, technique, precision: technique not in STRUCTURAL))
def test_resumed_equals_uninterrupted(launched, name, case):
    runs = results(launched(name, case), case, 0)
    assert_same_state(runs["straight"]["state"], runs["resumed"]["state"])
    assert_same_state(runs["straight"]["masks"], runs["resumed"]["masks"])
    assert runs["straight"]["test"] == runs["resumed"]["test"]
    assert runs["straight"]["losses"][8:] == runs["resumed"]["losses"]


@pytest.mark.parametrize(
    ("name", "case"),
    # Bits are chosen on batches of rank 0, which one process does not have.
    _cases(lambda name, technique, precision: precision == "32-true" and technique not in (*STRUCTURAL, "auto")),
)
def test_equals_one_process(launched, alone, name, case):
    technique, precision = case.split("/")
    ours, theirs = results(launched(name, case), case, 0)["straight"], alone(technique, precision)
    rounds = technique in ("integers", "histogram", "both", "all", *INTEGERS)
    tolerance = TOLERANCE.get(technique, TOLERANCE["bits"]) if rounds else TOLERANCE.get(name, TOLERANCE[precision])
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=tolerance)
    assert ours["test"] == pytest.approx(theirs["test"], abs=10 * tolerance)
    assert ours["reached"] == theirs["reached"]
    timed = ("P", "P/unguarded", "P/shown", "P/inference_time", "P/raw/inference_time_ms")
    for metric, value in theirs["metrics"].items():
        if metric not in timed:
            assert ours["metrics"][metric] == pytest.approx(value, abs=20 * tolerance), metric


@pytest.mark.parametrize(("name", "case"), _cases(_has_masks))
def test_masks_are_those_of_one_process(launched, alone, name, case):
    """A sum in another order moves a weight by an ulp, so of all weights one at the threshold may fall otherwise."""
    ours = results(launched(name, case), case, 0)["straight"]["masks"]
    theirs = alone(*case.split("/"))["masks"]
    differ = sum(int((mask != theirs[key]).sum()) for key, mask in ours.items())
    assert differ <= (0 if case.startswith(("weights", "columns", "wanda")) and name != "optim_ddp_bf16" else 24)


@pytest.mark.parametrize(("name", "case"), _cases(_goes_on))
def test_goes_on_under_another_preset(launched, name, case):
    runs = results(launched(name, case), case, 0)
    for kind in ("then ddp", "ddp before"):
        assert runs[kind]["losses"] == pytest.approx(runs["straight"]["losses"][8:], abs=TOLERANCE["bits"])
        assert runs[kind]["reached"] == runs["straight"]["reached"]


@pytest.mark.parametrize(("name", "case"), _cases(lambda name, technique, precision: technique in STRUCTURAL))
def test_a_file_of_another_structure_goes_on_divided(launched, name, case):
    runs = results(launched(name, case), case, 0)
    straight, resumed = runs["straight"], runs["resumed"]
    widths = {key: value.shape for key, value in straight["state"].items()}
    if case.startswith("channels"):
        width = sum(widths[f"net.blocks.{i}.feed.fc1.weight"][0] for i in range(2))
        assert width in (120, 128, 136)  # of 256, by eights
    elif case.startswith("blocks"):
        assert {key.split(".")[2] for key in widths if key.startswith("net.blocks.")} == {"0", "1"}
    else:
        assert all(widths[f"net.blocks.{i}.feed.fc2.expand.weight"] == (32, 8) for i in range(2))
    assert {key: value.shape for key, value in resumed["state"].items()} == widths
    assert resumed["losses"] == pytest.approx(straight["losses"][8:], abs=TOLERANCE["32-true"])


def _first_quick(name):
    return next(iter(LAUNCHES[name].quick), None)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name, _first_quick(name))) for name in DIVIDED])
def test_no_channels_are_removed_from_a_sharded_model(launched, name):
    for rank in range(LAUNCHES[name].processes):
        message = (launched(name, _first_quick(name)) / f"refused{rank}.txt").read_text()
        assert "ChannelPruning cannot remove channels under OptimFSDP2" in message
        assert "DepthPruning cannot remove blocks under OptimFSDP2" in message
        assert "optim_ddp" in message


@pytest.mark.distributed
@pytest.mark.slow
def test_the_best_file_scores_what_it_was_chosen_for(launched):
    for rank in range(2):
        scores = torch.load(launched("optim_fsdp") / f"extras{rank}.pt", weights_only=True)["best"]
        for fit in ("first", "second"):
            assert scores[fit] == pytest.approx(scores[f"{fit} monitored"], abs=1e-6)
        assert scores["losses"] == 32


@pytest.mark.distributed
@pytest.mark.slow
def test_a_learning_rate_finder_and_compiled_blocks_under_fsdp(launched, alone):
    others = torch.load(launched("optim_fsdp") / "extras0.pt", weights_only=True)["others"]
    assert 1e-5 < others["rate"] < 1e-1
    assert others["rate"] != 1e-3
    assert others["steps"] >= 16
    assert others["compiled"] == pytest.approx(alone("both", "32-true")["losses"], abs=TOLERANCE["bits"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_support_table_is_that_of_the_matrix(file):
    """``python tests/integration/matrix.py`` writes it."""
    assert with_table(file.read_text()) == file.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["optim_fsdp", "optim_tp"])
def test_masks_and_phases_of_several_ranks_go_on_in_one_process(launched, tmp_path, name):
    out = launched(name, "both/32-true")
    runs = results(out, "both/32-true", 0)
    first = out / "both-32-true" / "files" / "0.ckpt"
    ours = run(tmp_path, "both", "32-true", "optim_single", first)
    assert ours["losses"] == pytest.approx(runs["straight"]["losses"][8:], abs=TOLERANCE["bits"])
    assert ours["reached"] == runs["straight"]["reached"]
