"""One file of a folder of shards: what is no such folder, and the command. That it resumes shows test_presets_run."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.gpt import Language
from helpers.models import assert_same_state
from helpers.ranks import run_alone
from lightning_optim import WeightPruning, load_from_checkpoint
from lightning_optim.checkpoint import KEY
from lightning_optim.cli import main
from lightning_optim.strategies import consolidate

SCRIPT = """
import sys
import lightning.pytorch as pl
from helpers.gpt import Language
from lightning_optim import WeightPruning
from lightning_optim.strategies import OptimFSDP2
trainer = pl.Trainer(
    accelerator="cpu", devices=1, strategy=OptimFSDP2(checkpoint="sharded"), max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, callbacks=[WeightPruning(0.5, start=1, end=5)],
)
trainer.fit(Language())
trainer.save_checkpoint(sys.argv[1])
trainer.save_checkpoint(sys.argv[1])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder, written twice under the same name."""
    folder = tmp_path_factory.mktemp("sharded") / "last.ckpt"
    (folder.parent / "script.py").write_text(SCRIPT)
    code, output = run_alone(folder.parent / "script.py", folder)
    assert code == 0, output[-3000:]
    (folder.parent / "script.py").unlink()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy.ckpt"))


pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_nothing_but_the_checkpoint_is_left(written):
    assert [path.name for path in written.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_the_file_holds_callbacks_and_plan_and_loads_into_the_class(folder, tmp_path):
    consolidate(folder, tmp_path / "one.ckpt", progress=False)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    module = load_from_checkpoint(Language, tmp_path / "one.ckpt")
    assert_same_state(module, checkpoint["state_dict"])
    assert_same_state(Language.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True), module)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith(WeightPruning.__name__))
    assert state["window"]["last_event"] == 5
    (entry,) = checkpoint[KEY]["entries"].values()
    assert entry["reached"] == pytest.approx(0.5, abs=1e-4)
    assert float((module.net.blocks[0].feed.fc1.weight == 0).float().mean()) > 0.3


@pytest.mark.slow
def test_a_bar_is_shown_only_when_asked(folder, tmp_path, capsys):
    consolidate(folder, tmp_path / "one.ckpt", progress=False)
    assert capsys.readouterr().out == ""
    consolidate(folder, tmp_path / "one.ckpt")
    assert "writing" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_no_such_folder(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, error, sentence in (
        (tmp_path / "absent", FileNotFoundError, "there is no folder"),
        (tmp_path / "file", NotADirectoryError, "needs no consolidation"),
        (tmp_path / "empty", ValueError, "it has no 'meta.pt'"),
    ):
        with pytest.raises(error, match=sentence):
            consolidate(given, tmp_path / "one.ckpt")
    with pytest.raises(IsADirectoryError, match="pass the name of the file"):
        consolidate(folder, tmp_path / "empty")
    assert not (tmp_path / "one.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["removed", "cut", "index", "rest"])
def test_a_folder_that_is_incomplete_leaves_the_old_file(folder, tmp_path, damage):
    part = next(folder.glob("*.distcp"))
    damaged = {"removed": part, "cut": part, "index": folder / ".metadata", "rest": folder / "meta.pt"}[damage]
    if damage == "removed":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "one.ckpt").write_text("old")
    with pytest.raises(ValueError, match=r"missing or too short|cannot be read"):
        consolidate(folder, tmp_path / "one.ckpt", progress=False)
    assert (tmp_path / "one.ckpt").read_text() == "old"


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    assert main(["consolidate", str(folder), str(tmp_path / "one.ckpt"), "--no-progress"]) == 0
    assert (tmp_path / "one.ckpt").is_file()
    assert main(["consolidate", str(tmp_path / "absent"), str(tmp_path / "two.ckpt")]) == 1
    assert capsys.readouterr().err.startswith("error: there is no folder")
    with pytest.raises(SystemExit, match="2"):
        main(["consolidate", str(folder)])


@pytest.mark.slow
def test_a_folder_given_as_a_file_names_consolidate(folder):
    with pytest.raises(ValueError, match=r"strategies\.consolidate"):
        load_from_checkpoint(Language, folder)
