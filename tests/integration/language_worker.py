"""Trains language models on all processes of ``torchrun`` under ``optim_fsdp``: python language_worker.py FOLDER."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.language import TECHNIQUES, Language, ids

CASES = [f"{kind} {technique}" for kind in ("gpt2", "mixtral") for technique in ("2:4", "zeros", "8 bits")]


def run(case: str, path: Path, *, devices: int) -> None:
    """Train a case and write its checkpoint."""
    kind, _, technique = case.partition(" ")
    module = Language(kind)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.05)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="optim_fsdp" if devices > 1 else "auto",
        max_steps=12,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=TECHNIQUES[technique](kind),
    )
    trainer.fit(module, DataLoader(ids(), 8))
    trainer.save_checkpoint(path)


if __name__ == "__main__":
    for each in CASES:
        run(each, Path(sys.argv[1]) / each, devices=2)
