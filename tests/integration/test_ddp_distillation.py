"""Distillation on two gloo processes: ranks agree, resumed equals uninterrupted, and no rank waits for an error.

One launch runs the quick cases and one the slow; a test each then reads what the ranks wrote.
"""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.distilled import teacher
from helpers.models import Classifier, assert_same_state, data, new, trainer, val_loader
from helpers.ranks import Launches, quick_and_slow
from lightning_optim import load_from_checkpoint
from lightning_optim.distillation import DistillationModule, IndexedDataset, LogitCache, Teacher, student_only

WORKER = Path(__file__).with_name("distillation_worker.py")
QUICK = ("kd/32-true", "cache/32-true", "top_k/32-true", "channels/32-true")
SLOW = (
    "kd/bf16-mixed",
    "hint/32-true",
    "hint/bf16-true",
    "ramps/32-true",
    "chunks/32-true",
    "chunks/bf16-mixed",
    "ema/32-true",
    "weights/32-true",
    "integers/32-true",
    "by_hand/32-true",
    "by_hand/bf16-mixed",
    "by_hand_channels/32-true",
)
every_case = pytest.mark.parametrize("case", quick_and_slow(QUICK, SLOW))

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return Launches(WORKER, tmp_path_factory.mktemp, QUICK, SLOW)


def results(launched, case, rank):
    return torch.load(launched(case) / case.replace("/", "-") / f"rank{rank}.pt", weights_only=True)


@every_case
def test_ranks_agree(launched, case):
    first, second = results(launched, case, 0), results(launched, case, 1)
    for run in first:
        assert_same_state(first[run]["parameters"], second[run]["parameters"])
        assert first[run]["metrics"] == pytest.approx(second[run]["metrics"])
        assert {"distillation/task", "distillation/kd"} <= first[run]["metrics"].keys()


@every_case
def test_resumed_at_every_epoch_equals_uninterrupted(launched, case):
    runs = results(launched, case, 0)
    assert len(runs) == 3
    for run in runs.values():
        assert_same_state(runs["straight"]["state"], run["state"])


@every_case
def test_the_teacher_stays_as_it_was_and_out_of_the_file(launched, case):
    expected = Teacher([teacher()]).checksum()
    for rank in (0, 1):
        assert all(run["teacher"] == expected for run in results(launched, case, rank).values())
    file = torch.load(launched(case) / case.replace("/", "-") / "files" / "2.ckpt", weights_only=True)
    assert all(name.startswith(("student.", "projectors.")) for name in file["state_dict"])


@every_case
def test_the_student_alone_loads_in_one_process(launched, case, tmp_path):
    file = launched(case) / case.replace("/", "-") / "files" / "2.ckpt"
    bare = load_from_checkpoint(Classifier, student_only(file, tmp_path / "student.ckpt"))
    state = results(launched, case, 0)["straight"]["state"]
    expected = {n.removeprefix("student."): v for n, v in state.items() if n.startswith("student.")}
    assert_same_state(bare, {n: v.float() if v.is_floating_point() else v for n, v in expected.items()})


def test_channels_left_the_projector_too(launched):
    state = results(launched, "channels/32-true", 1)["straight"]["state"]
    assert state["projectors.0.weight"].shape == (24, state["student.net.0.weight"].shape[0])
    assert state["student.net.0.weight"].shape[0] < 16


@pytest.mark.parametrize(("case", "top_k"), [("cache/32-true", None), ("top_k/32-true", 2)])
def test_both_ranks_wrote_the_bytes_of_one_process(launched, case, top_k, tmp_path):
    module = DistillationModule(new(), teacher(), cache=tmp_path / "c", cache_top_k=top_k)
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(IndexedDataset(data()), 4), val_loader())
    folder = launched(case) / case.replace("/", "-")
    assert (folder / "logits.cache").read_bytes() == (tmp_path / "c").read_bytes()
    assert not list(folder.glob(".logits*"))


def test_the_run_from_a_cache_is_that_of_a_live_teacher(launched):
    cache = LogitCache(
        launched("cache/32-true") / "cache-32-true" / "logits.cache", teacher=Teacher([teacher()]).checksum(), rows=64
    )
    assert (len(cache), cache.rows, cache.identity.classes) == (64, 64, 3)
    live, cached = (results(launched, f"{name}/32-true", 0)["straight"]["metrics"] for name in ("kd", "cache"))
    assert cached == pytest.approx(live, rel=1e-2)  # float16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("teachers differ", "the teacher's weights differ between ranks"), ("cache fails", "cannot be cached")],
)
def test_every_rank_raises(launched, name, sentence):
    for rank in (0, 1):
        assert sentence in torch.load(launched(QUICK[0]) / f"errors{rank}.pt", weights_only=True)[name]
    assert not list(launched(QUICK[0]).glob("*nan.cache*"))
