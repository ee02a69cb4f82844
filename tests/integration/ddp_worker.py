"""Runs named cases on two processes and writes what each rank ended with: ``ddp_worker.py OUT CASE...``."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from helpers.models import Classifier, Files, Stacked, data, new, trainer, val_loader
from lightning_optim import (
    DepthPruning,
    LowRankFactorization,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
)
from lightning_optim.callbacks import ChannelPruning
from lightning_optim.strategies.common import end_group_at_exit

EPOCHS = 3


def loader() -> DataLoader:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sampler = DistributedSampler(data(), world, rank, shuffle=True, seed=1)
    return DataLoader(data(), 4, sampler=sampler)


class InDDP(Classifier):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return val_loader()


class StackedInDDP(Stacked, InDDP):
    """It has a stack of blocks."""


class ResidualInDDP(InDDP):
    """A convolution before an addition: its output gets a range in the middle of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))

    def forward(self, x):
        x = self.stem(x.view(-1, 3, 2, 2)).relu()
        return self.net(x + self.branch(x))


class LateInDDP(InDDP):
    """A layer that one rank alone calls, from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        logits = self.net(x)
        return logits + self.later(logits) if self.current_epoch > 0 and self.global_rank == 1 else logits


MODULES = {"residual": ResidualInDDP, "late": LateInDDP, "stack": StackedInDDP}


def callbacks(name: str) -> list:
    words = {"every_n_steps": 3, "start": 2, "end": 0.8}
    bits = {"weight_bits": 4, "start": 2, "freeze": 0.8}
    return {
        "magnitude": lambda: [WeightPruning(0.8, **words)],
        "random": lambda: [WeightPruning(0.8, criterion="random", scope="layer", **words)],
        "taylor": lambda: [WeightPruning(0.8, criterion="taylor", **words)],
        "wanda": lambda: [WeightPruning(0.8, criterion="wanda", **words)],
        "channels": lambda: [ChannelPruning(0.5, start=2, end=0.8, events=3)],
        "channels-taylor": lambda: [ChannelPruning(0.5, criterion="taylor", start=2, end=0.8, events=3)],
        "channels-activation": lambda: [ChannelPruning(0.5, criterion="activation", start=2, end=0.8, events=3)],
        "channels-growing": lambda: [
            ChannelPruning(0.5, regularization="growing", criterion="taylor", start=2, end=0.8, events=3)
        ],
        "channels-lasso": lambda: [ChannelPruning(0.5, regularization="group_lasso", start=2, end=0.8, events=3)],
        "low-rank": lambda: [
            LowRankFactorization(rank=4, start=2, end=12),
            WeightPruning(0.5, **{**words, "start": 0.6}),
        ],
        "both": lambda: [ChannelPruning(0.5, start=2, end=0.8, events=3), WeightPruning(0.8, **words)],
        "blocks-stack": lambda: [DepthPruning(0.5, start=2, end=0.8)],
        "blocks-influence-stack": lambda: [DepthPruning(0.5, criterion="influence", start=2, end=0.8)],
        "nofm": lambda: [WeightPruning(granularity="2:4", **words)],
        "integers": lambda: [QuantizationAwareTraining(**bits)],
        "integers-residual": lambda: [QuantizationAwareTraining(**bits)],
        "integers-late": lambda: [QuantizationAwareTraining(**bits)],
        "integers-unbroadcast": lambda: [QuantizationAwareTraining(**bits)],
        "integers-histogram": lambda: [QuantizationAwareTraining(observer="histogram", **bits)],
        "weights-integers": lambda: [WeightPruning(0.8, **words), QuantizationAwareTraining(**bits)],
        "score": lambda: [
            PerformanceScore(weights=dict.fromkeys(("size", "train_time", "inference_time", "accuracy"), 1)),
            WeightPruning(0.8, **words),
        ],
    }[name]()


def run(folder: Path, name: str, precision: str, ckpt_path: Path | None = None) -> dict:
    """One fit; the first one writes a file per epoch."""
    ours = callbacks(name)
    extra = [Files(folder)] if ckpt_path is None else []
    torch.manual_seed(0)
    module = new(MODULES.get(name.rpartition("-")[2], InDDP))
    fitted = trainer(
        folder,
        *ours,
        *extra,
        strategy=DDPStrategy(broadcast_buffers=not name.endswith("unbroadcast")),
        devices=2,
        max_epochs=EPOCHS,
        precision=precision,
        use_distributed_sampler=False,
    )
    fitted.fit(module, ckpt_path=ckpt_path)
    pruning = next((c for c in ours if isinstance(c, WeightPruning)), ours[0])
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "state": {n: v.clone() for n, v in module.state_dict().items()},
        "masks": getattr(pruning, "masks", {}),
        "step": pruning.window.step,
        "metrics": {
            name: float(value)
            for name, value in fitted.callback_metrics.items()
            if name.startswith(("P", "pruning", "channels", "low_rank", "quantization", "depth/par", "depth/blocks"))
        },
    }


def disagreeing(folder: Path) -> str:
    """Ranks whose weights differ must be found at the event."""

    class Differs(InDDP):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3 and self.global_rank == 1:
                with torch.no_grad():
                    self.net[0].weight.neg_().add_(torch.arange(192.0).view(16, 12))

    try:
        trainer(
            folder, *callbacks("magnitude"), strategy="ddp", devices=2, max_epochs=1, use_distributed_sampler=False
        ).fit(new(Differs))
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        name, precision = case.split("/")
        folder = out / case.replace("/", "-")
        results = {"straight": run(folder / "files", name, precision)}
        for epoch in range(EPOCHS - 1):
            results[f"resumed after {epoch}"] = run(folder, name, precision, folder / "files" / f"{epoch}.ckpt")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    message = disagreeing(out)
    (out / f"disagree{torch.distributed.get_rank()}.txt").write_text(message)


if __name__ == "__main__":
    end_group_at_exit()
    main()
