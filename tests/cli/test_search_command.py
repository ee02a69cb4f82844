"""``lightning-optim search``: a study from two YAML files, and user errors in one sentence."""

import pytest
import yaml

from lightning_optim import Recipe, search
from lightning_optim.cli import main
from lightning_optim.demo import DigitsNet

QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
RUN = {
    "seed_everything": 3,
    "model": {"class_path": "lightning_optim.demo.DigitsNet", "init_args": {"width": 4}},
    "data": {"class_path": "lightning_optim.demo.DigitsData"},
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 6, **dict.fromkeys(QUIET, False)},
}


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "space.yaml").write_text("weight_pruning: {sparsity: {low: 0.2, high: 0.8}, start: 0.1, end: 0.6}\n")


COMMAND = ["search", "--config", "run.yaml", "--space", "space.yaml", "--accuracy", "val_acc", "--trials", "2"]
OPTIONS = ["--objectives", "accuracy", "nonzero"]


def test_a_study_goes_on_and_its_report_is_written(tmp_path, capsys):
    storage = ["--storage", "sqlite:///study.db", "--report", "found"]
    assert main([*COMMAND, *OPTIONS, *storage]) == 0
    assert "2 trials" in " ".join(capsys.readouterr().out.split())
    assert main([*COMMAND, *OPTIONS, *storage, "--trials", "3", "--noise", "{accuracy: 0.001}"]) == 0
    printed = capsys.readouterr().out
    assert "3 trials" in " ".join(printed.split())
    assert Recipe.load(tmp_path / "found" / "best.yaml").weight_pruning["sparsity"] >= 0.2
    assert "<svg" in (tmp_path / "found" / "report.html").read_text()

    def never():
        raise AssertionError

    report = search(
        space="space.yaml",
        make_module=never,
        make_trainer=never,
        evaluate=lambda model: 0.0,
        objectives=("accuracy", "nonzero"),
        storage="sqlite:///study.db",
        seed=3,
        trials=3,
        progress=False,
    )
    assert report.trials[0].values["nonzero"] == sum(p.numel() for p in DigitsNet(4).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*COMMAND, "--space", "none.yaml"], "there is no space file 'none.yaml'"),
        ([*COMMAND, "--objectives", "speed"], "'speed', which is no column of `compare`"),
        ([*COMMAND, "--accuracy", "acc"], "`monitor` is 'acc'"),
        ([*COMMAND, "--config", "none.yaml"], "there is no configuration file"),
        ([*COMMAND, "--storage", "study.db"], "must be the URL of a database"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
