"""What ``setup`` refuses, by case: ``refused_worker.py FILE`` writes the sentences as JSON."""

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from helpers.gpt import Language
from lightning_optim import ChannelPruning, WeightPruning
from lightning_optim.strategies import OptimFSDP2


class Never(Language):
    """No step of it may run."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("a step ran")


class Nothing(Never):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.ReLU()


class Bare(Never):
    def configure_model(self):
        """Lightning's own strategy wants one."""


CASES = {
    "synchronised": (Never, {"strategy": "optim_fsdp", "sync_batchnorm": True}),
    "averaging": (Never, {"strategy": "optim_fsdp", "callbacks": [WeightAveraging()]}),
    "half": (Never, {"strategy": "optim_fsdp", "precision": "16-true"}),
    "units": (Never, {"strategy": OptimFSDP2(units=["Blok"])}),
    "nothing": (Nothing, {"strategy": "optim_fsdp"}),
    "channels": (Never, {"strategy": "optim_fsdp", "callbacks": [ChannelPruning(0.5)]}),
    "bare": (Bare, {"strategy": ModelParallelStrategy(1, 1), "callbacks": [WeightPruning(0.5)]}),
}


def main() -> None:
    warnings.simplefilter("ignore")
    sentences = {}
    for case, (module, words) in CASES.items():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
        try:
            pl.Trainer(accelerator="cpu", devices=1, **quiet, **words).fit(module())
        except (MisconfigurationException, ValueError) as error:
            sentences[case] = str(error)
    Path(sys.argv[1]).write_text(json.dumps(sentences))


if __name__ == "__main__":
    main()
