"""A net with every kind of product that is quantized: it resumes, reloads and exports what it computes."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.models import Files, assert_same_state
from lightning_optim import QuantizationAwareTraining, export_onnx, load_from_checkpoint


class Mixed(pl.LightningModule):
    """A convolution, a transposed one, attention, an LSTM and a Linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Conv1d(4, 16, 3, padding=1)
        self.longer = nn.ConvTranspose1d(16, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.longer(F.relu(self.narrow(x))).transpose(1, 2)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.out(self.recurrent(hidden)[0].mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


def inputs():
    return torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(1))


def run(folder, observer, ckpt_path=None):
    labels = (inputs().mean((1, 2)) * 3).round().clamp(0, 2).long()
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=ckpt_path is None,
        callbacks=[
            QuantizationAwareTraining(observer=observer, start=0.25, freeze=0.8),
            *([Files(folder)] if ckpt_path is None else []),
        ],
    )
    module = Mixed()
    trainer.fit(module, DataLoader(TensorDataset(inputs(), labels), 8), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["moving_average", pytest.param("learned", marks=pytest.mark.slow)])
def test_it_resumes_reloads_and_exports(observer, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = run(tmp_path, observer)
    for epoch in range(3):
        assert_same_state(module, run(tmp_path, observer, tmp_path / f"{epoch}.ckpt"))
    loaded = load_from_checkpoint(Mixed, tmp_path / "3.ckpt")
    assert torch.equal(loaded.eval()(inputs()), module.eval()(inputs()))
    report = export_onnx(module, tmp_path / "net.onnx", inputs()[:4], least_agreement=0.9)
    assert report.max_difference < 1e-4
