"""GPT-2 and Mixtral of transformers, from tiny configurations: pruned, rounded, resumed and reloaded."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.language import ROWS, TECHNIQUES, Language, ids
from helpers.models import EpochSampler, Files, assert_same_state, trainer
from helpers.ranks import run_ranks
from lightning_optim import WeightPruning, load_from_checkpoint
from lightning_optim.modules import Conv1D, Experts, matrices_of

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

EPOCHS = 3
WORKER = Path(__file__).with_name("language_worker.py")


def fit(tmp_path, module, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    run = trainer(tmp_path, *callbacks, max_epochs=EPOCHS)
    run.fit(module, DataLoader(list(ids()), 8, sampler=EpochSampler(ROWS)), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_resumed_run_is_the_uninterrupted_one_and_its_file_reloads(tmp_path, kind, technique):
    whole = Language(kind)
    fit(tmp_path, whole, *TECHNIQUES[technique](kind), Files(tmp_path))
    again = Language(kind)
    fit(tmp_path, again, *TECHNIQUES[technique](kind), ckpt_path=tmp_path / "0.ckpt")
    assert_same_state(whole, again)
    loaded = load_from_checkpoint(Language, tmp_path / f"{EPOCHS - 1}.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids(2)), whole.eval()(ids(2)))


def matrices(module, kinds):
    return [
        matrix
        for layer in module.modules()
        if isinstance(layer, kinds)
        for name, weight in layer.named_parameters(recurse=False)
        if weight.ndim > 1
        for matrix in matrices_of(layer, name, weight.detach())
    ]


def test_two_of_four_inputs_of_each_output_stay(tmp_path):
    for kind, kinds, count in (("gpt2", Conv1D, 8), ("mixtral", Experts, 16)):
        module = Language(kind)
        fit(tmp_path, module, *TECHNIQUES["2:4"](kind))
        found = matrices(module, kinds)
        assert len(found) == count
        for matrix in found:
            assert bool(((matrix.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all())


def test_wanda_scores_conv1d_by_its_inputs_and_refuses_experts(tmp_path):
    module = Language("gpt2")
    fit(tmp_path, module, WeightPruning(0.5, criterion="wanda", scope="layer", start=1, end=9, every_n_steps=4))
    assert all(float((matrix == 0).float().mean()) == 0.5 for matrix in matrices(module, Conv1D))
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"experts.*Pass it in `exclude`"):
        fit(tmp_path, Language("mixtral"), WeightPruning(0.5, criterion="wanda", exclude=["*gate"]))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_shards_make_the_masks_and_scales_of_one(tmp_path):
    """Every process gets the same batches, so that the weights are those of one process."""
    from integration.language_worker import CASES, run

    run_ranks(WORKER, tmp_path)
    for case in CASES:
        run(case, tmp_path / "alone.ckpt", devices=1)
        alone, sharded = (
            torch.load(path, weights_only=True)["state_dict"] for path in (tmp_path / "alone.ckpt", tmp_path / case)
        )
        assert_same_state(alone, sharded)
