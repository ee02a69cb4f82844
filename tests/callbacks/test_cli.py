"""LightningCLI configures everything from YAML."""

import sys

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Classifier, data
from lightning_optim import (
    ChannelPruning,
    CompressedCheckpoint,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
)

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optim.WeightPruning
      init_args:
        sparsity: {sparsity}
        granularity: {granularity}
        start: 2
        end: 0.5
        every_n_steps: 4
        include: {include}
    - class_path: lightning_optim.PerformanceScore
      init_args:
        weights: {{size: 1.0, inference_time: 0.5, accuracy: 2}}
        max_drop: 0.5
        reference: {reference}
    - class_path: lightning_optim.CompressedCheckpoint
      init_args:
        dirpath: best
        monitor: P
model:
  width: 16
"""


@pytest.fixture(autouse=True)
def _lightning_calls_what_jsonargparse_deprecates(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), 8)

    def val_dataloader(self):
        return DataLoader(data(), 16)


def run(tmp_path, monkeypatch, *, fit="fit", **words):
    words = {"sparsity": 0.5, "granularity": "weight", "include": "null", "reference": "baseline", **words}
    (tmp_path / "config.yaml").write_text(CONFIG.format(**words))
    monkeypatch.setattr(sys, "argv", ["train.py", fit, "--config", str(tmp_path / "config.yaml")])
    return LightningCLI(Classifier, Data, save_config_callback=None, seed_everything_default=1)


def test_a_run_from_yaml(tmp_path, monkeypatch):
    cli = run(tmp_path, monkeypatch)
    pruning, score, best = (
        next(c for c in cli.trainer.callbacks if type(c) is cls)
        for cls in (WeightPruning, PerformanceScore, CompressedCheckpoint)
    )
    assert pruning.window.start == 2
    assert pruning.window.end == 0.5
    assert score.weights == {"size": 1.0, "train_time": 0.0, "inference_time": 0.5, "accuracy": 2.0}
    assert best.best_model_path
    zeros = sum(int((cli.model.net[i].weight == 0).sum()) for i in (0, 4))
    assert zeros == 224


@pytest.mark.parametrize(
    "words",
    [
        {"sparsity": "{net.0: 0.9, net.4: 0.1}"},
        {"sparsity": "null", "granularity": "'2:4'"},
        {"include": "[net.0, torch.nn.Linear]"},
        {"reference": "raw"},
        {"granularity": "weight\n        criterion: lightning_optim.functional.criteria.lamp"},
        {"reference": "{size: 100, inference_time: 0.1}"},
    ],
    ids=str,
)
def test_every_kind_of_argument_can_be_written_in_yaml(tmp_path, monkeypatch, words):
    cli = run(tmp_path, monkeypatch, **words)
    pruning = next(c for c in cli.trainer.callbacks if isinstance(c, WeightPruning))
    if "include" in words:
        assert pruning.include == ["net.0", nn.Linear]
        assert "net.6.weight" in pruning.masks
    assert pruning.reached_end
    assert torch.isfinite(cli.trainer.callback_metrics["P"])


def test_hold_in_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(WeightPruning, "callback")
    parsed = parser.parse_object(
        {"callback": {"class_path": "lightning_optim.WeightPruning", "init_args": {"sparsity": "hold"}}}
    )
    assert parser.instantiate_classes(parsed).callback.sparsity == "hold"


@pytest.mark.parametrize(
    "words",
    [
        {"pruning_ratio": 0.5},
        {"pruning_ratio": {"net.0": 0.5, "net.4": 0.25}},
        {"target": {"parameters": 0.5}, "strict": False},
        {"include": ["net.0", "torch.nn.Linear"], "exclude": ["net.6"], "schedule": "linear", "criterion": "taylor"},
    ],
    ids=str,
)
def test_channel_pruning_in_yaml(tmp_path, monkeypatch, words):
    config = yaml.safe_load(CONFIG.format(sparsity=0.5, granularity="weight", include="null", reference="baseline"))
    words = {"start": 2, "end": 10, "events": 2, "scope": "layer", **words}
    config["trainer"]["callbacks"][0] = {"class_path": "lightning_optim.ChannelPruning", "init_args": words}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Classifier, Data, save_config_callback=None, seed_everything_default=1)
    assert next(c for c in cli.trainer.callbacks if isinstance(c, ChannelPruning)).reached_end
    assert cli.model.net[0].out_features < 16


INTEGERS = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optim.QuantizationAwareTraining
      init_args:
        weight_bits: 4
        activation_bits: {activation_bits}
        start: 2
        freeze: 0.9
        observer: histogram
        weight_granularity: {granularity}
        bits: {{net.6: 8}}
        exclude: [torch.nn.LayerNorm, net.0]
model:
  width: 16
"""


@pytest.mark.parametrize("activation_bits", [8, "null"])
def test_integers_from_yaml(tmp_path, monkeypatch, activation_bits):
    config = INTEGERS.format(activation_bits=activation_bits, granularity="'per_group:8'")
    (tmp_path / "config.yaml").write_text(config.replace("torch.nn.LayerNorm", "torch.nn.BatchNorm1d"))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Classifier, Data, save_config_callback=None, seed_everything_default=1)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, QuantizationAwareTraining))
    assert callback.scheme.activation_bits == (8 if activation_bits == 8 else None)
    assert callback.scheme.weight_granularity == "per_group:8"
    assert [getattr(cli.model.net[i], "weight_bits", None) for i in (0, 4, 6)] == [None, 4, 8]
