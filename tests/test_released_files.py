"""Checkpoints that released versions wrote still load, give the same outputs, and resume."""

from pathlib import Path

import pytest
import torch

from helpers.models import data, fit
from lightning_optim import load_from_checkpoint
from released.write import CASES, EPOCHS, callbacks, module

RELEASED = Path(__file__).parent / "released"
FILES = sorted(RELEASED.glob("*/*-end.ckpt"))


def name_of(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def test_every_case_has_a_file_of_every_release():
    for release in (folder for folder in RELEASED.iterdir() if folder.is_dir() and folder.name[0].isdigit()):
        kinds = {f"{name}-{kind}" for name in CASES for kind in ("middle", "end")}
        assert {path.stem for path in release.glob("*.ckpt")} == kinds


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_file_of_a_released_version_gives_the_outputs_it_gave(path):
    expected = torch.load(path, weights_only=True)["outputs"]
    loaded = load_from_checkpoint(module(name_of(path)), path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(data().tensors[0]), expected)


def resumed_of(path, tmp_path):
    """The run of a middle file, resumed to its end."""
    resumed = module(name_of(path))
    middle = path.with_name(path.name.replace("-end", "-middle"))
    fit(tmp_path, resumed, *callbacks(name_of(path)), ckpt_path=middle, max_epochs=EPOCHS)
    return resumed


ALLOCATED_OTHERWISE = ("channels-conv",)
"""Since 0.2 groups make up for each other's blocks, so that other channels are removed from the middle file on."""


ROUNDED_OTHERWISE = ("integers", "together")
"""Since 0.2 biases are rounded too. Before a BatchNorm their gradients are noise, which Adam makes as large as any."""


@pytest.mark.filterwarnings("ignore:.*goes on as '2.4@unfold'.*:UserWarning")
@pytest.mark.parametrize(
    "path",
    [path for path in FILES if name_of(path) not in (*ALLOCATED_OTHERWISE, *ROUNDED_OTHERWISE)],
    ids=lambda path: f"{path.parent.name} {path.stem}",
)
def test_a_run_of_a_released_version_is_resumed_to_the_same_end(path, tmp_path):
    expected = torch.load(path, weights_only=True)["state_dict"]
    # Not bit for bit: another machine adds up in another order.
    torch.testing.assert_close(dict(resumed_of(path, tmp_path).state_dict()), dict(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ROUNDED_OTHERWISE)
def test_a_run_of_0_1_that_rounded_no_biases_is_resumed_to_the_same_answers(name, tmp_path):
    path = RELEASED / "0.1.0" / f"{name}-end.ckpt"
    expected, resumed = torch.load(path, weights_only=True)["outputs"], resumed_of(path, tmp_path)
    with torch.no_grad():
        outputs = resumed.eval()(data().tensors[0])
    assert float((outputs - expected).abs().max() / (expected.max() - expected.min())) < 0.01


def test_a_run_of_0_1_that_missed_its_ratio_now_reaches_it(tmp_path):
    path = RELEASED / "0.1.0" / "channels-conv-end.ckpt"
    before = torch.load(path, weights_only=True)["state_dict"]
    after = resumed_of(path, tmp_path).state_dict()
    outputs = [name for name in after if name in ("net.1.weight", "net.4.weight")]
    assert sum(len(before[name]) for name in outputs) > 8  # of 16; half was asked
    assert sum(len(after[name]) for name in outputs) == 8
