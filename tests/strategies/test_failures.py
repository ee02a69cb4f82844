"""A rank that fails ends the run, says who it was, and the run goes on from its last file."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.models import assert_same_state

SCRIPT = Path(__file__).with_name("failing_script.py")

pytestmark = pytest.mark.distributed


def run(folder, *words, torchrun=False):
    """Return the exit code, both outputs and the seconds of a script that starts its own second process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def succeed(*words, **options):
    code, output, _ = run(*words, **options)
    assert code == 0, output[-4000:]
    assert "group left: False" in output  # a gloo group that is left aborts one exit in five
    assert "group left: True" not in output


def children_of(folder):
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and "failing_script" in line]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["optim_ddp", pytest.param("optim_fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_raises_ends_the_run_and_is_named(tmp_path, strategy):
    code, output, _ = run(tmp_path, strategy, "raise")
    assert code != 0
    assert "the second rank fails" in output
    assert "raised on rank 1 of 2" in output
    assert "another rank ended or is late" in output  # what rank 0 sees
    assert not children_of(tmp_path)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_with_the_timeout(tmp_path):
    code, output, seconds = run(tmp_path, "optim_fsdp", "hang")
    assert code != 0
    assert "raised on rank 0 of 2" in output
    assert seconds < 100
    assert not children_of(tmp_path)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_run_resumes_from_its_file(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeed(straight, "optim_fsdp", "none")
    code, _, _ = run(killed, "optim_fsdp", "kill")
    assert code != 0
    assert not children_of(killed)
    assert not (killed / "weights.pt").exists()
    succeed(killed, "optim_fsdp", "none")
    left, right = (torch.load(each / "weights.pt", weights_only=True) for each in (straight, killed))
    assert_same_state(left["weights"], right["weights"])
    assert (left["first epoch"], right["first epoch"]) == (0, 2)


@pytest.mark.slow
def test_torchrun_trains_the_same(tmp_path):
    ours, theirs = tmp_path / "popen", tmp_path / "torchrun"
    succeed(ours, "optim_fsdp", "none")
    succeed(theirs, "optim_fsdp", "none", torchrun=True)
    left, right = (torch.load(each / "weights.pt", weights_only=True) for each in (ours, theirs))
    assert_same_state(left["weights"], right["weights"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the notebook preset forks, which this system cannot")
@pytest.mark.slow
def test_the_notebook_preset_forks(tmp_path):
    code, output, _ = run(tmp_path, "optim_ddp_notebook", "none")
    assert code == 0, output[-2000:]
    assert (tmp_path / "weights.pt").is_file()
