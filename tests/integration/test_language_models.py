"""GPT-2 and Mixtral of transformers, from tiny configurations: pruned, rounded, resumed and reloaded."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.models import EpochSampler, Files, assert_same_state, trainer
from lightning_optim import QuantizationAwareTraining, WeightPruning, load_from_checkpoint
from lightning_optim.modules import Conv1D, Experts, matrices_of

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

ROWS, EPOCHS = 32, 3


class Language(pl.LightningModule):
    """A language model whose batches are token ids."""

    def __init__(self, kind: str = "gpt2") -> None:
        super().__init__()
        self.save_hyperparameters()
        import transformers

        torch.manual_seed(3)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 40, "use_cache": False}
        if kind == "gpt2":
            config = transformers.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends
            )
            self.model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.MixtralConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
                **ends,
            )
            self.model = transformers.MixtralForCausalLM(config)

    def forward(self, ids):
        return self.model(input_ids=ids).logits

    def training_step(self, ids, batch_idx):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def ids(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(0, 40, (rows, 8), generator=torch.Generator().manual_seed(5))


def fit(tmp_path, module, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    run = trainer(tmp_path, *callbacks, max_epochs=EPOCHS)
    run.fit(module, DataLoader(list(ids()), 8, sampler=EpochSampler(ROWS)), ckpt_path=ckpt_path)
    return run


ROUTERS = {"gpt2": None, "mixtral": ["*gate"]}
TECHNIQUES = {
    "zeros": lambda kind: [WeightPruning(0.5, start=1, end=9, every_n_steps=2, granularity="row", scope="layer")],
    "2:4": lambda kind: [WeightPruning(granularity="2:4", start=1, end=9, every_n_steps=2, exclude=ROUTERS[kind])],
    "8 bits": lambda kind: [QuantizationAwareTraining(start=2, observe_steps=2, freeze=10)],
    "both": lambda kind: [
        WeightPruning(0.5, start=1, end=9, every_n_steps=2),
        QuantizationAwareTraining(start=2, observe_steps=2, freeze=10, weight_bits=4),
    ],
}


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
