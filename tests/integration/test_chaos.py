"""A run of all techniques is killed again and again, and ends as if nothing had happened."""

import random
from pathlib import Path

import pytest
import torch
from chaos_worker import EPOCHS

from helpers.models import Classifier, Quiet, assert_same_state, new
from helpers.ranks import run_alone
from lightning_optim import DistillationModule, load_from_checkpoint

TESTS = Path(__file__).parents[1]
KILLS = 20
KILLED = -9
STEPS_PER_EPOCH = 8


def launch(folder: Path, resume: str = "-", kill: str = "-") -> int:
    code, output = run_alone(TESTS / "integration" / "chaos_worker.py", folder, resume, kill)
    assert code in (0, KILLED), output[-3000:]
    return code


def last_file(folder: Path) -> str:
    files = sorted(folder.glob("files/epoch=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return str(files[-1]) if files else "-"


def moments(seed: int) -> list[str]:
    """Draw when each launch ends: after some steps, or in the middle of one of its files."""
    draw = random.Random(seed)
    return [
        f"write:{draw.randint(1, 3)}" if draw.random() < 0.4 else f"step:{draw.randint(1, STEPS_PER_EPOCH + 4)}"
        for _ in range(KILLS)
    ]


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_equals_uninterrupted(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert launch(whole) == 0
    for moment in moments(seed=8):
        before = {path: path.read_bytes() for path in killed.glob("files/epoch=*.ckpt")}
        assert launch(killed, last_file(killed), moment) == KILLED, moment
        for path, content in before.items():
            assert path.read_bytes() == content, f"{path.name} was there before {moment} and is not what it was"
        for path in killed.glob("files/epoch=*.ckpt"):  # no half file has a checkpoint's name
            torch.load(path, weights_only=True)
    assert launch(killed, last_file(killed)) == 0
    assert_same_state(torch.load(killed / "final.pt"), torch.load(whole / "final.pt"))
    names = [sorted(path.name for path in folder.glob("files/*.ckpt")) for folder in (whole, killed)]
    assert names[0] == names[1]
    assert len(names[0]) == EPOCHS
    best = [sorted((folder / "best").glob("*.ckpt")) for folder in (whole, killed)]
    assert [path.name for path in best[0]] == [path.name for path in best[1]]
    for pair in zip(*best, strict=True):
        models = [
            load_from_checkpoint(DistillationModule(new(Classifier, width=16), new(Quiet)), path) for path in pair
        ]
        assert_same_state(*models)
