"""The peers get what the benchmark says they get: the same schedule, and a row that says how a run was resumed."""

import ast
import importlib
import sys
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
NAMES = ("task", "environments", "modelpruning", "run", "step_clock")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch):
    """Import the scripts by their names, and forget them again."""
    monkeypatch.setattr(sys, "path", [str(PEERS), str(PEERS.parent), *sys.path])
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize("epochs", [3, 20])
def test_the_amounts_for_modelpruning_compound_to_the_cubic_schedule(peers: dict[str, ModuleType], epochs: int):
    task = SimpleNamespace(epochs=epochs)
    first, last = peers["task"].epoch_window(task)
    amounts = [peers["modelpruning"].amount(epoch, task=task, sparsity=0.9) for epoch in range(epochs)]
    for done in range(1, epochs + 1):
        due = peers["task"].cubic((done - first) / (last - first), 0.9)
        assert 1 - prod(1 - amount for amount in amounts[:done]) == pytest.approx(due)
    assert 1 - prod(1 - amount for amount in amounts) == pytest.approx(0.9)


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone(peers: dict[str, ModuleType]):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = peers["task"].EachEpoch(range(50), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(50))
    assert order(0, 3) != order(0, 4) != order(1, 4)


def test_a_difference_of_one_weight_is_seen(peers: dict[str, ModuleType]):
    reference = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert peers["task"].difference(reference, {k: v.clone() for k, v in reference.items()})["equal"]
    other = {"a": torch.tensor([0.0, 0.5, 0.0]), "b": torch.ones(2)}
    found = peers["task"].difference(reference, other)
    assert (found["equal"], found["differ"], found["most"]) == (False, "1 of 2 tensors", 0.5)
    assert not peers["task"].difference(reference, {"a": torch.zeros(2), "b": torch.ones(2)})["equal"]


def test_every_peer_has_a_script_that_says_what_was_decided_and_an_environment(peers: dict[str, ModuleType]):
    for peer in peers["run"].PEERS.values():
        assert ast.get_docstring(ast.parse((PEERS / peer.script).read_text()))
        assert peer.environment in peers["environments"].ENVIRONMENTS


def test_the_reason_of_pip_is_one_line(peers: dict[str, ModuleType]):
    said = "Collecting x\nERROR: Cannot install x\n  x 1 depends on y<2\nERROR: ResolutionImpossible: see\n"
    assert peers["environments"]._reason(said) == "ERROR: ResolutionImpossible: see; x 1 depends on y<2"


def test_a_preset_without_a_row_gives_the_reason(peers: dict[str, ModuleType]):
    row = {"error": "ValueError: no", "seeds": []}
    written = peers["run"].line("x", row, {"seeds": []}, SimpleNamespace(name="digits", metrics={}))
    assert written.startswith("| x | cannot: ValueError: no |")
    assert written.count("|") == len(peers["run"].COLUMNS) + 1


def test_a_peer_that_is_not_installed_has_a_row_with_the_reason(peers: dict[str, ModuleType]):
    row = {"technique": "channel pruning, 50%", "baseline": "dense", "error": "stopped", "seeds": []}
    found = {
        "ours": {"variants": {"ours": row}, "baselines": {"dense": {"seeds": []}}},
        "torch-pruning": {"failed": "not installed: ERROR: no matching distribution"},
    }
    written = peers["run"].tables(SimpleNamespace(name="digits", metrics={}), found)
    assert any(line.startswith("| torch-pruning | cannot: not installed: ERROR: no matching") for line in written)
