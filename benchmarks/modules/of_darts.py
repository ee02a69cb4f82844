"""darts: `Model(...).fit(series)`, whose module and loader are taken from it as it hands them to its Trainer.

One generated series in float32; the modules are of `pytorch_lightning`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
from case import Case
from darts import TimeSeries
from darts.models import (
    BlockRNNModel,
    NBEATSModel,
    NHiTSModel,
    NLinearModel,
    TCNModel,
    TFTModel,
    TiDEModel,
    TransformerModel,
    TSMixerModel,
)

PAST, FUTURE, BATCH, WINDOWS = 12, 4, 8, 32


def series() -> TimeSeries:
    length = WINDOWS + PAST + FUTURE - 1
    noise = np.random.default_rng(0).normal(0, 0.1, length)
    return TimeSeries.from_values((np.sin(np.arange(length) / 3) + noise).astype(np.float32))


class Taken(pl.Trainer):
    """Keeps what it is asked to fit, and fits nothing."""

    module: Any = None
    loader: Any = None

    def fit(self, model: Any, train_dataloaders: Any = None, **others: Any) -> None:
        self.module, self.loader = model, train_dataloaders


def fitted(model: Callable[..., Any], seed: int, /, **options: Any) -> Taken:
    taken = Taken(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    forecaster = model(
        input_chunk_length=PAST, output_chunk_length=FUTURE, batch_size=BATCH, random_state=seed, **options
    )
    forecaster.fit(series(), trainer=taken)
    return taken


def case(model: Callable[..., Any], /, **options: Any) -> Case:
    return Case(
        make=lambda seed: fitted(model, seed, **options).module,
        data=lambda: fitted(model, 0, **options).loader,
        trainer=pl.Trainer,
        class_dim=-1,  # [rows, steps, components, parameters of the likelihood]
    )


CASES = {
    "TiDEModel": case(TiDEModel, hidden_size=16, decoder_output_dim=4, temporal_decoder_hidden=8, dropout=0.1),
    "TFTModel": case(TFTModel, hidden_size=16, num_attention_heads=2, add_relative_index=True),
    "NLinearModel": case(NLinearModel),
    "TCNModel": case(TCNModel, num_filters=8, num_layers=2),
    "TCNModel with weight_norm": case(TCNModel, num_filters=8, num_layers=2, weight_norm=True),
    "TransformerModel": case(
        TransformerModel, d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=32
    ),
    "BlockRNNModel": case(BlockRNNModel, model="LSTM", hidden_dim=16, n_rnn_layers=2, hidden_fc_sizes=[16]),
    "NBEATSModel": case(NBEATSModel, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=32),
    "NHiTSModel": case(NHiTSModel, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=32),
    "TSMixerModel": case(TSMixerModel, hidden_size=16, ff_size=16, num_blocks=1),
}
