"""CompressedCheckpoint keeps no model that is not compressed yet."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from helpers.models import Classifier, assert_same_state, fit, new, trainer, val_loader
from lightning_optim import CompressedCheckpoint, PerformanceScore, WeightPruning


def kept(folder):
    return sorted(path.name for path in folder.glob("*.ckpt"))


def test_top_k_counts_from_the_end_of_the_compression(tmp_path):
    folder = tmp_path / "best"
    best = CompressedCheckpoint(folder, "{epoch}", monitor="val_acc", mode="max", save_top_k=-1, save_last=True)
    fit(tmp_path, new(), WeightPruning(0.8, start=2, end=20, every_n_steps=4), best, max_epochs=5)
    assert kept(folder) == ["epoch=2.ckpt", "epoch=3.ckpt", "epoch=4.ckpt", "last.ckpt"]
    for name in kept(folder):
        state = torch.load(folder / name, weights_only=True)["state_dict"]
        assert sum(int((state[f"net.{i}.weight"] == 0).sum()) for i in (0, 4)) == 358


def test_last_is_written_every_epoch_and_resumes_bitwise(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        module = new()
        best = CompressedCheckpoint(folder, monitor="val_acc", mode="max", save_last=True)
        pruning = WeightPruning(0.8, start=2, end=20, every_n_steps=4)
        fit(tmp_path, module, pruning, best, max_epochs=epochs, ckpt_path=ckpt_path)
        return module

    with pytest.warns(UserWarning, match="kept no model|planned to take 8 steps") as warned:
        run(tmp_path / "short", 1)
    assert any("kept no model" in str(warning.message) for warning in warned)
    assert kept(tmp_path / "short") == ["last.ckpt"]
    whole = run(tmp_path / "whole", 4)
    (tmp_path / "short" / "last.ckpt").rename(tmp_path / "start.ckpt")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        again = run(tmp_path / "again", 4, tmp_path / "start.ckpt")
    assert_same_state(whole, again)


def test_the_kept_file_scores_again_what_was_monitored(tmp_path):
    best = CompressedCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=True)
    fit(tmp_path, new(), WeightPruning(0.8, every_n_steps=4), best, max_epochs=5)
    score = trainer(tmp_path).validate(new(), val_loader(), best.best_model_path, verbose=False)
    assert score[0]["val_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    Classifier.load_from_checkpoint(best.best_model_path)


def test_without_compression_it_is_a_model_checkpoint(tmp_path):
    fit(tmp_path, new(), CompressedCheckpoint(tmp_path / "best", "{epoch}", save_top_k=-1))
    assert kept(tmp_path / "best") == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]


class Sometimes(Classifier):
    """Logs ``val_acc`` in the validations that ``when`` names, counted from 0, and ``value`` as it is."""

    def __init__(self, when, value=None):
        super().__init__()
        self.when, self.value, self.count = when, value, 0

    def on_validation_epoch_start(self):
        self.now, self.count = self.count in self.when, self.count + 1

    def validation_step(self, batch, batch_idx):
        if self.now and self.value is None:
            super().validation_step(batch, batch_idx)
        elif self.now:
            self.log("val_acc", self.value)


STALE = "ignore:CompressedCheckpoint keeps no model where 'val_acc':UserWarning"


def keep(tmp_path, module, *callbacks, epochs=5, **words):
    best = CompressedCheckpoint(tmp_path / "best", "{epoch}", mode="max", **{"save_top_k": -1, **words})
    fit(tmp_path, module, *callbacks, best, max_epochs=epochs)
    return kept(tmp_path / "best")


@pytest.mark.filterwarnings(STALE)
def test_a_model_is_not_kept_for_the_metric_of_an_earlier_epoch(tmp_path):
    pruning = WeightPruning(0.8, start=2, end=12, every_n_steps=4)
    files = keep(tmp_path, new(Sometimes, when={0, 2, 4}), pruning, monitor="val_acc", save_last=True)
    assert files == ["epoch=2.ckpt", "epoch=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "best" / "last.ckpt", weights_only=True)["epoch"] == 4


@pytest.mark.filterwarnings(STALE)
def test_a_run_whose_metric_is_old_says_that_it_kept_nothing(tmp_path):
    pruning = WeightPruning(0.8, start=2, end=12, every_n_steps=4)
    with pytest.warns(UserWarning, match="kept no model: 'val_acc' had no value of its own"):
        assert keep(tmp_path, new(Sometimes, when={0}), pruning, monitor="val_acc") == []


@pytest.mark.filterwarnings("ignore:CompressedCheckpoint kept no model:UserWarning")
def test_a_model_whose_metric_is_nan_is_not_kept(tmp_path):
    with pytest.warns(UserWarning, match="keeps no model where 'val_acc' is NaN"):
        assert keep(tmp_path, new(Sometimes, when={0, 1}, value=float("nan")), monitor="val_acc", epochs=2) == []


@pytest.mark.filterwarnings(STALE)
def test_a_validation_that_does_not_log_the_metric_keeps_no_model_in_the_same_epoch(tmp_path):
    best = CompressedCheckpoint(tmp_path / "best", "{step}", monitor="val_acc", mode="max", save_top_k=-1)
    fit(tmp_path, new(Sometimes, when={0, 3}), best, max_epochs=2, val_check_interval=0.5)
    assert kept(tmp_path / "best") == ["step=16.ckpt", "step=4.ckpt"]


@pytest.mark.parametrize("monitor", ["train_loss", "epoch", None])
def test_other_monitors_keep_every_epoch(tmp_path, monitor):
    assert len(keep(tmp_path, new(), monitor=monitor, epochs=2)) == 2


@pytest.mark.filterwarnings(STALE.replace("val_acc", "P"), "ignore:PerformanceScore.*not log it in every:UserWarning")
def test_an_epoch_without_p_keeps_no_model(tmp_path):
    score = PerformanceScore(weights={"size": 1.0, "accuracy": 1.0})
    assert keep(tmp_path, new(Sometimes, when={0, 2}), score, monitor="P", epochs=4) == ["epoch=0.ckpt", "epoch=2.ckpt"]


def test_it_gets_no_warning_and_a_link_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_last='link'"):
        CompressedCheckpoint(save_last="link")


def test_a_pytorch_lightning_trainer_is_rejected(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    run = other.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=r"Import the Trainer from lightning\.pytorch"):
        CompressedCheckpoint(tmp_path).setup(run, new(), "fit")
