"""Checkpoints that released versions wrote still load, give the same outputs, and resume."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

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
"""Since 0.2 biases are rounded too, and those before a BatchNorm are noise (:func:`noise_before_norms`)."""


def noise_before_norms(module):
    """Names of biases before a BatchNorm, and of its running means.

    It takes the bias away, whose gradient is rounding alone; Adam makes that as large as any, and it differs between
    processors.
    """
    names = set()
    for name, chain in module.named_modules():
        if isinstance(chain, nn.Sequential):
            for place, (layer, norm) in enumerate(pairwise(chain)):
                if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and getattr(layer, "bias", None) is not None:
                    names |= {f"{name}.{place}.bias", f"{name}.{place + 1}.running_mean"}
    return names


@pytest.mark.filterwarnings("ignore:.*goes on as '2.4@unfold'.*:UserWarning")
@pytest.mark.parametrize(
    "path",
    [path for path in FILES if name_of(path) not in (*ALLOCATED_OTHERWISE, *ROUNDED_OTHERWISE)],
    ids=lambda path: f"{path.parent.name} {path.stem}",
)
def test_a_run_of_a_released_version_is_resumed_to_the_same_end(path, tmp_path):
    expected = torch.load(path, weights_only=True)["state_dict"]
    resumed = resumed_of(path, tmp_path)
    # Not bit for bit: another machine adds up in another order.
    noise = noise_before_norms(resumed)
    found = {name: tensor for name, tensor in resumed.state_dict().items() if name not in noise}
    assert {name.rpartition(".")[2] for name in noise} == {"bias", "running_mean"}
    torch.testing.assert_close(
        found, {name: tensor for name, tensor in expected.items() if name not in noise}, rtol=1e-3, atol=1e-4
    )


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
