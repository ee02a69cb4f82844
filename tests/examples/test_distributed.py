"""The distributed example as a user runs it: by the Trainer's own launcher, and by torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "distributed.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*words, launcher=()):
    foreign = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    command = [sys.executable, *launcher, str(SCRIPT), "--synthetic", "--fast", *words]
    return subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def rows(finished):
    """Return what the printed table has in its two rows, as text."""
    assert finished.returncode == 0, finished.stderr[-3000:]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in finished.stdout.splitlines() if "│" in line]
    table = {row[0]: row[1:] for row in cells if row[0] in ("dense", "80% zeros")}
    assert len(table) == 2, finished.stdout
    return table


def check(table, held):
    for row in table.values():
        recall, new, _, _, *kilobytes, agree = row
        assert float(recall) > 0.6
        assert float(new) > 0.1
        assert agree == "yes"
        assert [float(each.replace(",", "")) for each in kilobytes] == pytest.approx(held, abs=1)
    assert table["dense"][2] == "-"
    assert float(table["80% zeros"][2]) == pytest.approx(0.8, abs=1e-4)
    assert float(table["80% zeros"][3]) < float(table["dense"][3])  # P


ITEMS = 500
PARAMETERS = 64 * ITEMS * 2 + ITEMS + 64 * 128 * 2 + 128 + 64 + 128 + 9
"""Both tables, the biases of the items, both matrices with their biases, the norm, the three added terms."""


@pytest.mark.slow
@pytest.mark.distributed
def test_each_of_two_processes_holds_half_of_the_recommender():
    finished = run("--strategy", "optim_fsdp")
    halves = [4 * PARAMETERS / 2e3, 4 * PARAMETERS / 2e3, 8 * PARAMETERS / 2e3]
    table = rows(finished)
    check(table, halves)
    assert finished.stdout.count("dense") == 1  # one rank speaks


@pytest.mark.distributed
@pytest.mark.slow
def test_under_torchrun_the_same_numbers_come_out_with_everything_on_each_process():
    words = ("--strategy", "optim_ddp")
    table = rows(run(*words, launcher=TORCHRUN))
    check(table, [4 * PARAMETERS / 1e3, 4 * PARAMETERS / 1e3, 8 * PARAMETERS / 1e3])
    own = rows(run(*words))
    for name in table:
        assert table[name][:3] == own[name][:3]


@pytest.mark.slow
def test_the_recommended_strategy_is_taken():
    finished = run("--recommend")
    assert "taking optim_single on 1" in finished.stdout
    assert "80% zeros" in finished.stdout
    assert rows(finished)["dense"][-1] == "yes"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("optim_tp", "found no pair of Linear layers in Tower"),
        ("optim_hsdp", "the Trainer has one node"),
    ],
)
def test_a_preset_that_cannot_run_the_model_ends_in_one_sentence(name, sentence):
    finished = run("--strategy", name)
    assert finished.returncode == 1
    assert re.search(rf"^error: .*{re.escape(sentence)}", finished.stderr, re.MULTILINE)


@pytest.mark.slow
def test_help_names_every_preset():
    from lightning_optim.strategies import PRESETS

    shown = " ".join(run("--help").stdout.split())
    assert all(name in shown for name in PRESETS)
