"""Trains on GPUs and writes the losses: ``gpu_worker.py STRATEGY DEVICES PRECISION eager|compiled OUT``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch

from helpers.gpt import Language
from lightning_optim.strategies import build


class Compiled(Language):
    def configure_model(self):
        for place, block in enumerate(self.net.blocks):
            if not hasattr(block, "_orig_mod"):
                self.net.blocks[place] = torch.compile(block)


def main() -> None:
    strategy, devices, precision, compiled, out = sys.argv[1:]
    torch.manual_seed(3)
    module = Compiled() if compiled == "compiled" else Language()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=int(devices),
        strategy=build(strategy),
        precision=precision,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=Path(out).parent,
    )
    trainer.fit(module)
    if trainer.is_global_zero:
        torch.save(module.losses, out)


if __name__ == "__main__":
    main()
