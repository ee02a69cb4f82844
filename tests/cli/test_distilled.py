"""Distillation from the command line: what a file claims, and a teacher that is missing."""

import pytest
import torch

from helpers.distilled import distilled
from helpers.models import Files, fit, new
from lightning_optim.cli.main import main

OFF = [
    "--seed_everything",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_epochs",
    "1",
]


def shown(path, capsys):
    assert main(["show", str(path)]) == 0
    return capsys.readouterr().out


def test_show_gives_the_number_of_distilled_batches(tmp_path, capsys):
    fit(tmp_path, distilled(), Files(tmp_path), max_epochs=1)
    text = shown(tmp_path / "0.ckpt", capsys)
    assert "batches taught" in text
    assert "width" in text  # the student's arguments
    file = torch.load(tmp_path / "0.ckpt", weights_only=True)
    del file["distillation"]["batches"]  # as 0.1 wrote it
    torch.save(file, tmp_path / "old.ckpt")
    text = shown(tmp_path / "old.ckpt", capsys)
    assert "kd" in text
    assert "no batch" not in text


def test_show_does_not_claim_a_distillation_that_never_ran(tmp_path, capsys):
    fit(tmp_path, distilled(new(), alpha=0.0), Files(tmp_path), max_epochs=1)
    assert "distillation: requested, but no batch was distilled" in shown(tmp_path / "0.ckpt", capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, of what LightningCLI calls
def test_a_recipe_that_distills_without_a_teacher_names_the_missing_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", "lightning_optim.demo.DigitsNet", "--data", "lightning_optim.demo.DigitsData"]
    assert main(["fit", *model, *OFF, "--recipe", "{distillation: true}"]) == 1
    assert "there is no teacher. Pass --teacher CLASS" in capsys.readouterr().err
