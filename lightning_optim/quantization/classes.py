"""Which class quantizes which: a new one is a row here."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_optim.quantization.attention import QuantizedMultiheadAttention, QuantizedOutProjection
from lightning_optim.quantization.layers import (
    QuantizedBatchNorm1d,
    QuantizedBatchNorm2d,
    QuantizedBatchNorm3d,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLayer,
    QuantizedLinear,
)
from lightning_optim.quantization.recurrent import QuantizedGRU, QuantizedLSTM
from lightning_optim.quantization.transposed import (
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)

__all__ = ["QUANTIZED"]

QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
    NonDynamicallyQuantizableLinear: QuantizedOutProjection,
    nn.Embedding: QuantizedEmbedding,
    nn.EmbeddingBag: QuantizedEmbeddingBag,
    nn.BatchNorm1d: QuantizedBatchNorm1d,
    nn.BatchNorm2d: QuantizedBatchNorm2d,
    nn.BatchNorm3d: QuantizedBatchNorm3d,
}
"""Float class -> quantized class; exact types only."""
