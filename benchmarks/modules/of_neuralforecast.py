"""neuralforecast: a model's own arguments, its `TimeSeriesDataset` and DataModule, and the Trainer that `fit` makes.

Eight generated series; the modules are of `pytorch_lightning`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from case import Case
from neuralforecast import models
from neuralforecast.losses.pytorch import MAE
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

SERIES, LENGTH, PAST, FUTURE, STEPS = 8, 48, 12, 4, 12


@cache
def dataset() -> TimeSeriesDataset:
    noise = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=LENGTH, freq="D")
    frames = [
        pd.DataFrame(
            {
                "unique_id": f"series {each}",
                "ds": days,
                "y": np.sin(np.arange(LENGTH) / (2 + each)) + noise.normal(0, 0.1, LENGTH),
            }
        )
        for each in range(SERIES)
    ]
    return TimeSeriesDataset.from_df(pd.concat(frames))[0]


def case(model: Callable[..., Any], batch: int = 2, **options: Any) -> Case:
    def make(seed: int) -> Any:
        return model(
            h=FUTURE,
            input_size=PAST,
            max_steps=STEPS,
            batch_size=batch,
            windows_batch_size=16,
            scaler_type="standard",
            random_seed=seed,
            loss=MAE(),
            **options,
        )

    def data() -> TimeSeriesDataModule:
        return TimeSeriesDataModule(dataset(), batch_size=batch, valid_batch_size=SERIES)

    return Case(make, data, pl.Trainer)


CASES = {
    "MLP": case(models.MLP, num_layers=2, hidden_size=32),
    "NHITS": case(models.NHITS, mlp_units=[[32, 32]] * 3),
    "NBEATS": case(models.NBEATS, mlp_units=[[32, 32]] * 3),
    "TFT": case(models.TFT, hidden_size=16, n_head=2),
    "PatchTST": case(
        models.PatchTST, encoder_layers=1, n_heads=2, hidden_size=16, linear_hidden_size=32, patch_len=4, stride=2
    ),
    "iTransformer": case(models.iTransformer, n_series=2, hidden_size=16, n_heads=2, e_layers=1, d_ff=32),
    "TSMixer": case(models.TSMixer, n_series=2, n_block=1, ff_dim=8),
    "GRU": case(models.GRU, encoder_hidden_size=16, decoder_hidden_size=16),
    "LSTM": case(models.LSTM, encoder_hidden_size=16, decoder_hidden_size=16),
    "TCN": case(models.TCN, encoder_hidden_size=16, decoder_hidden_size=16, kernel_size=2, dilations=[1, 2]),
    "TiDE": case(models.TiDE, hidden_size=16, decoder_output_dim=4, temporal_decoder_dim=8),
}
