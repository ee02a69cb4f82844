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
from torch.distributed.fsdp import fully_shard

from helpers.gpt import GPT, Language
from lightning_optim import ChannelPruning, DistillationModule, Feature, PerformanceScore, WeightPruning
from lightning_optim.callbacks import inference_time
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


class DividesItself(Language):
    """Its layers are built and divided by its own ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = GPT(32, 2, 4)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        raise AssertionError("a step ran")


class Projected(DistillationModule):
    """A layer through a projector, which is sized while the student is whole."""

    def __init__(self) -> None:
        super().__init__(
            DividesItself(), Language(width=48), features=[Feature("net.blocks.0", "net.blocks.0", "hint")]
        )

    @property
    def device_mesh(self):
        return self.trainer.strategy.device_mesh

    def configure_model(self):
        self.student.__dict__["_device_mesh"] = self.device_mesh
        self.student.configure_model()

    def train_dataloader(self):
        return self.student._loader(shuffle=True)


CASES = {
    "divided channels": (DividesItself, {"strategy": "optim_fsdp", "callbacks": [ChannelPruning(0.5)]}),
    "divided projectors": (Projected, {"strategy": "optim_fsdp"}),
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
    Path(sys.argv[1]).write_text(json.dumps(sentences | not_measured()))


def not_measured() -> dict[str, str]:
    """A model whose whole copies do not fit: what PerformanceScore warns of, and its P."""
    inference_time.free_bytes = lambda device: 0
    score = PerformanceScore()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(accelerator="cpu", devices=1, strategy="optim_fsdp", callbacks=[score], **quiet)
        trainer.fit(Language())
    told = [str(each.message) for each in caught if "PerformanceScore" in str(each.message)]
    return {"not measured": told[0], "P": str(float(trainer.callback_metrics["P"]))}


if __name__ == "__main__":
    main()
