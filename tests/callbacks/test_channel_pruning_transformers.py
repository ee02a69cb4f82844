"""ChannelPruning on a language model: heads, inner channels and the residual width leave while it trains."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.marks import cells
from helpers.models import Files
from lightning_optim import ChannelPruning, DepthPruning, load_from_checkpoint

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

EPOCHS = 4


class Language(pl.LightningModule):
    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        self.net = LlamaForCausalLM(config)

    def forward(self, ids):
        return self.net(ids).logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def run(folder, callbacks, ckpt_path=None):
    ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=ckpt_path is None,
        callbacks=[*callbacks, *([] if ckpt_path else [Files(folder)])],
    )
    module = Language()
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return module


CASES = {
    "activation": lambda: [ChannelPruning(0.5, criterion="activation", start=2, end=7, events=3)],
    "residual width": lambda: [ChannelPruning(0.25, include=[nn.Embedding], start=2, end=7, events=2, round_to=4)],
    "residual width by gradients": lambda: [
        ChannelPruning(0.25, include=[nn.Embedding], criterion="taylor", start=2, end=7, events=2, round_to=4)
    ],
    "with blocks": lambda: [
        ChannelPruning(0.5, scope="layer", start=3, end=7, events=2),
        DepthPruning(1, criterion="influence", start=2, end=6),
    ],
}


@pytest.mark.parametrize("name", cells(list(CASES), quick=["with blocks"]))
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, name):
    whole = run(tmp_path, CASES[name]())
    state = whole.state_dict()
    dense = sum(parameter.numel() for parameter in Language().parameters())
    assert sum(parameter.numel() for parameter in whole.parameters()) < 0.9 * dense
    for epoch in (0, 1, 2):
        again = run(tmp_path, CASES[name](), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
        assert again.net.config.to_dict() == whole.net.config.to_dict()
    loaded = load_from_checkpoint(Language, tmp_path / "3.ckpt")
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids), whole.eval()(ids))


def test_the_configuration_follows_where_the_last_event_removes_nothing(tmp_path):
    """Multiples let the event before it remove all there is."""
    callback = ChannelPruning(0.25, scope="layer", round_to=16, include=["*mlp*"], start=2, end=7, events=5)
    with pytest.warns(UserWarning, match="groups are at their floor"):
        module = run(tmp_path, [callback])
    assert module.net.config.intermediate_size == 48

    callback = ChannelPruning(0.36, scope="layer", round_to=16, include=["*mlp*"], start=2, end=7, events=5)
    module = run(tmp_path, [callback])
    assert module.net.model.layers[0].mlp.up_proj.out_features == module.net.config.intermediate_size == 32


def test_equal_blocks_leave_a_configuration_that_makes_the_model(tmp_path):
    module = run(tmp_path, [ChannelPruning(0.5, scope="layer", start=2, end=7, events=2)])
    config = module.net.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 24)
    made = type(module.net)(config)
    made.load_state_dict(module.net.state_dict())
