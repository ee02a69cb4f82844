"""CompressedCheckpoint keeps no model that is not compressed yet."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from helpers.models import Classifier, assert_same_state, fit, new, trainer, val_loader
from lightning_optim import CompressedCheckpoint, WeightPruning


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


def test_it_gets_no_warning_and_a_link_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_last='link'"):
        CompressedCheckpoint(save_last="link")


def test_a_pytorch_lightning_trainer_is_told(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    run = other.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=r"Import the Trainer from lightning\.pytorch"):
        CompressedCheckpoint(tmp_path).setup(run, new(), "fit")
