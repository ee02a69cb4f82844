"""Searches of several processes: killed and gone on, two on one storage, the ranks of one run."""

import json
from pathlib import Path

import pytest
from search_worker import run

from helpers.ranks import run_alone, run_ranks

WORKER = Path(__file__).parent / "search_worker.py"


def facts(report):
    return [(trial.number, trial.arguments, trial.values) for trial in report.trials if trial.values]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trials_it_would_have_had(tmp_path):
    """SIGKILL in the fourth trial: it is made up for, and so are its proposals."""
    code, output = run_alone(WORKER, "killed", tmp_path)
    assert code == -9, output
    resumed = run(f"sqlite:///{tmp_path}/study.db", trials=6)
    assert [trial.number for trial in resumed.trials] == [0, 1, 2, 4, 5, 6], "the lost trial is not shown"
    assert {trial.state for trial in resumed.trials} == {"complete"}
    straight = facts(run(trials=3))
    assert facts(resumed)[:3] == straight, "the trials before the kill"
    again = run(f"sqlite:///{tmp_path}/study.db", trials=6)
    assert facts(again) == facts(resumed), "nothing is left to do"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_on_one_storage_share_the_work(tmp_path):
    run_ranks(WORKER, "shared", tmp_path)
    found = [json.loads((tmp_path / f"ran{rank}.json").read_text()) for rank in range(2)]
    report = run(f"sqlite:///{tmp_path}/study.db", trials=8)
    assert len(report.trials) == 8
    assert sum(each["ran"] for each in found) == 8
    assert min(each["ran"] for each in found) >= 2, "both work"
    proposals = [tuple(trial.arguments.values()) for trial in report.trials if not trial.dense]
    assert sum(trial.dense for trial in report.trials) == 1
    assert len(set(proposals)) == 7, "no proposal twice"


@pytest.mark.distributed
def test_ranks_of_a_run_train_the_same_trials(tmp_path):
    run_ranks(WORKER, "ranks", tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [bool(recipe) for recipe in first["recipes"]] == [False, True, True, True]
    assert first["report"]["trials"][2]["state"] == "fail"
    assert first["report"]["trials"][2]["error"] == "ValueError: third trial is bad"
