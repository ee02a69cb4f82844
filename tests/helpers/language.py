"""Tiny language models of transformers in a LightningModule, and what is done to them."""

import lightning.pytorch as pl
import torch

from lightning_optim import QuantizationAwareTraining, WeightPruning

ROWS = 32


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
