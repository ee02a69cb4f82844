"""Optimizers that were built before the strategy gave the module new parameters."""

import sys
from functools import partial, update_wrapper
from types import MethodType

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from helpers.models import Classifier, data
from lightning_optim import ChannelPruning
from lightning_optim.optimizers import following

DIVIDING = ("optim_fsdp", "optim_zero2")


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), 16)


class Without(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier().net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Early(Without):
    """Builds its optimizer in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.early = [torch.optim.SGD(self.parameters(), 0.1)]

    def configure_optimizers(self):
        return self.early[0]


def of_lightning_cli(folder, monkeypatch, strategy, optimizer, scheduler=None):
    """Train by Lightning's own CLI, from an ``optimizer:`` section; return the module before and after."""
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "strategy": strategy,
            "use_distributed_sampler": False,  # Lightning's shuffles
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "optimizer": optimizer,
        **({"lr_scheduler": scheduler} if scheduler else {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(folder / "config.yaml")])
    cli = LightningCLI(Without, Data, save_config_callback=None, run=False)
    before = {name: value.clone() for name, value in cli.model.state_dict().items()}
    cli.trainer.fit(cli.model, cli.datamodule)
    return before, cli


@pytest.mark.parametrize("strategy", DIVIDING)
@pytest.mark.parametrize("name", ["SGD", pytest.param("LBFGS", marks=pytest.mark.slow)])
def test_the_optimizer_of_lightning_cli_trains_the_new_parameters(tmp_path, monkeypatch, strategy, name):
    optimizer = {"class_path": f"torch.optim.{name}", "init_args": {"lr": 0.05}}
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    _, alike = of_lightning_cli(tmp_path, monkeypatch, "auto", optimizer, scheduler)
    before, cli = of_lightning_cli(tmp_path, monkeypatch, strategy, optimizer, scheduler)
    (held,) = cli.trainer.optimizers
    assert [id(p) for p in held.param_groups[0]["params"]] == [id(p) for p in cli.model.parameters()]
    assert held.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    for key, value in alike.model.state_dict().items():
        now = cli.model.state_dict()[key]
        now = now.full_tensor() if hasattr(now, "full_tensor") else now
        torch.testing.assert_close(now, value, rtol=0, atol=1e-5)
        assert "weight" not in key or not torch.equal(now, before[key])


@pytest.mark.parametrize("strategy", DIVIDING)
def test_an_optimizer_built_in_init_is_named(strategy):
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(
        MisconfigurationException, match=r"gave Early new parameters, .* SGD holds 8 of them .*net\.0\.weight"
    ):
        trainer.fit(Early(), datamodule=Data())


def test_following_gives_groups_their_parameters_by_name():
    module = Without()
    optimizer = torch.optim.SGD(
        [{"params": [module.net[0].weight], "lr": 1.0}, {"params": list(module.net[4].parameters())}], 0.1
    )
    module.configure_optimizers = LightningCLI.configure_optimizers.__get__(module)  # no partial: nobody's
    with following(module):
        assert optimizer.param_groups[0]["params"] == [module.net[0].weight]
    module.configure_optimizers = partial(LightningCLI.configure_optimizers, optimizer=optimizer)
    old = module.net[0].weight
    with following(module):
        assert optimizer.param_groups[0]["params"] == []
        module.net[0].weight = torch.nn.Parameter(torch.zeros(3, 12))
    assert optimizer.param_groups[0]["params"][0] is module.net[0].weight is not old
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in module.net[4].parameters()]
    assert optimizer.param_groups[0]["lr"] == 1.0


def pruned_file(folder):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[pruning()]
    )
    trainer.fit(WithOptimizer(), datamodule=Data())
    trainer.save_checkpoint(folder / "pruned.ckpt")
    return folder / "pruned.ckpt"


def pruning():
    return ChannelPruning(0.5, start=1, end=2, events=1, example_inputs=torch.zeros(1, 12))


class WithOptimizer(Without):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_resumed_pruned_run_refuses_an_optimizer_of_the_dense_parameters(tmp_path):
    file = pruned_file(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[pruning()]
    )
    with pytest.raises(MisconfigurationException, match="Restoring the checkpoint's structure gave Early"):
        trainer.fit(Early(), datamodule=Data(), ckpt_path=file)


def test_a_resumed_pruned_run_gives_lightning_clis_optimizer_its_parameters(tmp_path):
    file = pruned_file(tmp_path)
    module = Without()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    configured = partial(LightningCLI.configure_optimizers, optimizer=optimizer)
    module.configure_optimizers = MethodType(update_wrapper(configured, LightningCLI.configure_optimizers), module)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[pruning()]
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=file)
    assert trainer.global_step == 8
    assert module.net[0].out_features == 8
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
