"""The ten faults of Lightning's ModelPruning (2.6.6), each reproduced once; WeightPruning has none of them.

Every test is named after the fault, and shows both: what the peer does (so that the test says when it is mended), and
what ours does.
"""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning

from helpers.models import Classifier, Files, Quiet, assert_same_state, fit, new, train_loader, val_loader
from lightning_optim import WeightPruning, load_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*ModelPruning.*")
SELECTED = ("net.0.weight", "net.4.weight")


def peer(module, amount=0.5, **words):
    parameters = [(module.net[i], "weight") for i in (0, 4)]
    words = {"use_lottery_ticket_hypothesis": False, **words}
    return ModelPruning("l1_unstructured", parameters_to_prune=parameters, amount=amount, **words)


def sparsity(module):
    state = module.state_dict()
    return sum(int((state[n] == 0).sum()) for n in SELECTED) / sum(state[n].numel() for n in SELECTED)


def ours(amount=0.5, **words):
    return WeightPruning(amount, **{"every_n_steps": 8, **words})


def test_fault_1_amounts_compound(tmp_path):
    theirs, module = new(), new()
    fit(tmp_path, theirs, peer(theirs), max_epochs=4)
    assert sparsity(theirs) == pytest.approx(0.9375, abs=0.01)
    fit(tmp_path, module, ours(), max_epochs=4)
    assert sparsity(module) == 0.5


def test_fault_2_resume_loses_the_masks(tmp_path):
    theirs = new()
    fit(tmp_path, theirs, peer(theirs, apply_pruning=lambda epoch: epoch == 0), Files(tmp_path / "theirs"))
    again = new()
    fit(tmp_path, again, peer(again, apply_pruning=lambda epoch: epoch == 0), ckpt_path=tmp_path / "theirs" / "0.ckpt")
    assert sparsity(again) < 0.1
    module, resumed = new(), new()
    fit(tmp_path, module, ours(start=4, end=4), Files(tmp_path / "ours"))
    fit(tmp_path, resumed, ours(start=4, end=4), ckpt_path=tmp_path / "ours" / "0.ckpt")
    assert sparsity(resumed) == 0.5
    assert_same_state(module, resumed)


def test_fault_3_files_do_not_load_into_the_class(tmp_path):
    theirs = new()
    fit(tmp_path, theirs, peer(theirs, make_pruning_permanent=False), Files(tmp_path / "theirs"))
    with pytest.raises(RuntimeError, match="weight_orig"):
        Classifier.load_from_checkpoint(tmp_path / "theirs" / "1.ckpt")
    module = new()
    fit(tmp_path, module, ours(), Files(tmp_path / "ours"))
    Classifier.load_from_checkpoint(tmp_path / "ours" / "1.ckpt")
    assert_same_state(module, load_from_checkpoint(Classifier, tmp_path / "ours" / "2.ckpt"))


def test_fault_4_training_is_not_thrown_away_at_every_epoch(tmp_path):
    """Lottery-ticket rewinding is the peer's default; ours never resets a weight that it keeps."""
    module = new()
    initial = copy.deepcopy(module.state_dict())
    cut = ours()
    fit(tmp_path, module, cut)
    for name, mask in cut.masks.items():
        assert (module.state_dict()[name][mask] != initial[name][mask]).all()


def test_fault_5_averaging_crashes(tmp_path):
    theirs = new()
    with pytest.raises(RuntimeError):
        fit(tmp_path, theirs, peer(theirs), EMAWeightAveraging(decay=0.9))
    module = new()
    fit(tmp_path, module, ours(), EMAWeightAveraging(decay=0.9))
    assert sparsity(module) == 0.5


@pytest.mark.slow
def test_fault_6_compiled_modules_crash(tmp_path):
    module = new(Quiet)
    fit(tmp_path, torch.compile(module, backend="aot_eager"), ours())
    assert sparsity(module) == 0.5


def test_fault_7_biases_and_norms_are_pruned_by_default(tmp_path):
    module = new()
    fit(tmp_path, module, ours(0.9))
    for name, value in module.named_parameters():
        if name not in SELECTED:
            assert (value != 0).all(), name


def test_fault_8_no_speed_is_claimed_that_is_not_there():
    """Rows that are zeroed take the time they took: the docstring says so, PerformanceScore measures it."""
    text = " ".join((WeightPruning.__doc__ or "").split())
    assert "do **not** make dense kernels faster" in text


def test_fault_9_a_second_fit_with_a_new_model_raises_and_nothing_reaches_a_logger(tmp_path):
    cut = ours()
    run = fit(tmp_path, new(), cut)
    other = new()
    run.fit_loop.max_epochs = 6
    run.fit(other, train_loader(), val_loader())
    assert sparsity(other) == 0.5
    assert run.callback_metrics["pruning/sparsity"] == 0.5


def test_fault_10_every_weight_that_is_kept_trains_on(tmp_path):
    """Removing by hand leaves the optimizer on old tensors; masks keep the Parameters and their optimizer."""
    module, cut = new(), ours(start=4, end=8)
    parameters = dict(module.named_parameters())
    snapshots = {}

    class Notes(Files):
        def on_train_epoch_end(self, trainer, pl_module):
            snapshots[trainer.current_epoch] = copy.deepcopy(pl_module.state_dict())

    fit(tmp_path, module, cut, Notes(tmp_path))
    assert all(value is parameters[name] for name, value in module.named_parameters())
    for name, mask in cut.masks.items():
        assert (snapshots[2][name][mask] != snapshots[1][name][mask]).all()
