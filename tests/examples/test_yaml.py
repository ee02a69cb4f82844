"""Both jobs, from the YAML files beside them and from Python: the same weights, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import intents
import recommender
from intents_data import IntentsData
from lightning_optim import Recipe, student_only
from lightning_optim.cli import main
from recommender_data import RetailData

EXAMPLES = Path(recommender.__file__).parent
ITEMS = 500  # of the generated shop


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)


def student_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(student_only(file, file.with_suffix(".student")), weights_only=True)["state_dict"]


def assert_equal(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.items())


@pytest.mark.slow
def test_the_recommender(monkeypatch, tmp_path):
    short = ["--trainer.max_epochs", "1", "--data.synthetic", "true", "--model.items", str(ITEMS)]
    for name, words in (("recommender_teacher", []), ("recommender", ["--teacher.items", str(ITEMS)])):
        shutil.copy(EXAMPLES / f"{name}.yaml", tmp_path)
        assert main(["fit", "--config", f"{name}.yaml", *short, *words]) == 0
    files = tmp_path / "checkpoints"

    monkeypatch.setitem(recommender.TRAINER, "max_epochs", 1)
    data, recipe = RetailData(synthetic=True), Recipe.load("recommender")
    assert len(data.task.items) == ITEMS
    teacher = recommender.fit(recommender.LARGE, data)
    assert_equal(teacher, torch.load(files / "recommender_teacher" / "teacher.ckpt", weights_only=True)["state_dict"])
    assert_equal(
        recommender.fit(recommender.SMALL, data, recipe, teacher), student_of(files / "recommender" / "student.ckpt")
    )


@pytest.mark.slow
def test_the_intents(tmp_path):
    files = tmp_path / "checkpoints" / "intents_teacher"
    intents.main(["--synthetic", "--prepare", "--files", str(files), "--report", str(tmp_path)])
    job, data = intents.SYNTHETIC, IntentsData(synthetic=True, batch_size=intents.SYNTHETIC.batch_size)
    words = yaml.safe_load((EXAMPLES / "intents.yaml").read_text(encoding="utf-8"))
    words["trainer"]["max_epochs"] = 1
    words["data"]["init_args"] |= {"synthetic": True, "batch_size": job.batch_size}
    words["model"]["init_args"] |= {
        "pieces": len(data.task.vocabulary),
        "intents": data.task.intents,
        "embedding_rate": 3.0,
        "vectors": None,
        **vars(job.student),
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(words))
    assert main(["fit", "--config", "short.yaml"]) == 0
    recipe = Recipe.load("text-classifier")
    model = intents.fit(job.student, data, 1, None, recipe, files / "teacher_logits.bin")
    assert_equal(model, student_of(tmp_path / "checkpoints" / "intents" / "student.ckpt"))
