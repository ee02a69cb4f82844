"""GradientNoiseScale: unbiased on a problem with a known noise scale, without a trace in training, and resumable."""

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.ranks import run_ranks
from lightning_optim import GradientNoiseScale, scale_learning_rate
from lightning_optim.functional.noise_scale import gradient_moments, sample_efficiency, speedup

WORKER = Path(__file__).parent / "noise_worker.py"
WIDTH, NOISE = 50, 2.0
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Known(pl.LightningModule):
    """Its gradient is (1, ..., 1) plus the mean noise of the batch: ``|G|² = 50`` and ``tr(Σ) = 200``, so 4 samples."""

    def __init__(self, lr=0.0):
        super().__init__()
        self.point, self.lr = nn.Parameter(torch.zeros(WIDTH)), lr

    def training_step(self, batch, batch_idx):
        self.log("train_rows", float(len(batch[0])))
        return ((1.0 + batch[0]) * self.point).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def noise(rows, seed=0):
    return NOISE * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def measured(*, batch=8, steps=400, **options):
    callback = GradientNoiseScale(every_n_steps=1, smoothing=0.999)
    rows = batch * steps * options.get("accumulate_grad_batches", 1)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **{**QUIET, **options})
    module = Known()
    trainer.fit(module, DataLoader(TensorDataset(noise(rows)), batch))
    assert not module.point._backward_hooks
    return callback, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_moments_are_unbiased_also_where_the_batches_share_samples():
    rows = 1.0 + noise(64_000).view(2000, 32, WIDTH)
    small, big = rows[:, :8].mean(1).square().sum(1).mean(), rows.mean(1).square().sum(1).mean()
    squared, trace = gradient_moments(float(small), float(big), small_batch=8, big_batch=32)
    assert squared == pytest.approx(WIDTH, rel=0.05)
    assert trace == pytest.approx(WIDTH * NOISE**2, rel=0.05)
    with pytest.raises(ValueError, match="`big_batch` must be larger"):
        gradient_moments(1.0, 1.0, small_batch=8, big_batch=8)


@pytest.mark.parametrize("accumulated", [1, 4], ids=["split batch", "accumulation"])
def test_the_known_noise_scale_is_found(accumulated):
    callback, logged = measured(accumulate_grad_batches=accumulated, steps=400 // accumulated)
    assert callback.noise_scale == pytest.approx(NOISE**2, rel=0.15)
    assert logged["batch/critical_size"] == 4
    assert logged["batch/noise_scale"] == pytest.approx(callback.noise_scale)
    assert logged["batch/efficiency"] == pytest.approx(1 / (1 + 8 * accumulated / callback.noise_scale))


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_find_it_too(tmp_path):
    run_ranks(WORKER, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for case in ("ranks", "both"):
        assert first[case]["noise"] == pytest.approx(NOISE**2, rel=0.2)
    assert first["ranks"]["batch/efficiency"] == pytest.approx(1 / (1 + 16 / first["ranks"]["noise"]))


class Net(Known):
    """With what could leave a trace: dropout, BatchNorm, momentum."""

    def __init__(self, dropout):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9)


def trained(tmp_path, *callbacks, epochs=2, checkpoint=None, dropout=0.5, **options):
    torch.manual_seed(3)
    module = Net(dropout)
    options = {**QUIET, "max_epochs": epochs, "default_root_dir": tmp_path, **options}
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(TensorDataset(noise(80)), 8), ckpt_path=checkpoint)
    return module, trainer


BN = pytest.mark.filterwarnings("ignore:GradientNoiseScale splits batches on one device:UserWarning")


@BN
@pytest.mark.parametrize("accumulated", [1, 3])
def test_training_is_the_same_without_it(tmp_path, accumulated):
    options = {"accumulate_grad_batches": accumulated}
    plain, first = trained(tmp_path, **options)
    watched, second = trained(tmp_path, GradientNoiseScale(every_n_steps=2), **options)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert first.callback_metrics["train_loss_epoch"] == second.callback_metrics["train_loss_epoch"]


@BN
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, accumulated):
    """Without dropout: Lightning's checkpoints hold no state of the random numbers."""
    options = {"accumulate_grad_batches": accumulated, "dropout": 0.0}
    straight = GradientNoiseScale(every_n_steps=2)
    trained(tmp_path, straight, epochs=4, **options)
    begun = GradientNoiseScale(every_n_steps=2)
    _, trainer = trained(tmp_path, begun, epochs=2, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = GradientNoiseScale(every_n_steps=2)
    trained(tmp_path, resumed, epochs=4, checkpoint=tmp_path / "half.ckpt", **options)
    assert resumed.state_dict() == straight.state_dict()
    assert begun.state_dict() != straight.state_dict()


def test_only_every_nth_step_is_measured_and_loggers_get_it(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callback = GradientNoiseScale(every_n_steps=5)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], **{**QUIET, "logger": logger}, log_every_n_steps=1000
    )
    trainer.fit(Known(), DataLoader(TensorDataset(noise(160)), 8))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["batch/noise_scale"]] == [0, 5, 10, 15]


def test_batch_norm_in_a_batch_that_is_split_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="BatchNorm normalizes half a batch differently"):
        trained(tmp_path, GradientNoiseScale(), epochs=1)


def test_what_it_cannot_measure_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`smoothing` must be a fraction in \[0, 1\), got 1"):
        GradientNoiseScale(smoothing=1)
    with pytest.raises(ValueError, match="`every_n_steps`"):
        GradientNoiseScale(every_n_steps=0)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[GradientNoiseScale()], **QUIET)
    with pytest.raises(MisconfigurationException, match="a batch of one sample cannot be split"):
        trainer.fit(Known(), DataLoader(TensorDataset(noise(4)), 1))

    class ByHand(Known):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[GradientNoiseScale()], **QUIET)
    with pytest.raises(MisconfigurationException, match="optimizes manually"):
        trainer.fit(ByHand(), DataLoader(TensorDataset(noise(4)), 2))


def test_rules():
    assert scale_learning_rate(0.1, batch_size=400, base_batch_size=100) == pytest.approx(0.2)
    assert scale_learning_rate(0.1, batch_size=400, base_batch_size=100, rule="linear") == pytest.approx(0.4)
    assert scale_learning_rate(0.1, batch_size=400, base_batch_size=100, rule="none") == 0.1
    with pytest.raises(ValueError, match="rule"):
        scale_learning_rate(0.1, batch_size=400, base_batch_size=100, rule="cube")
    with pytest.raises(ValueError, match="`base_batch_size` must be a number above 0"):
        scale_learning_rate(0.1, batch_size=400, base_batch_size=0)
    assert sample_efficiency(300, 100) == 0.25
    assert speedup(100, 2, 1e12) == pytest.approx(2)
    assert speedup(1e12, 2, 100) == pytest.approx(1)
