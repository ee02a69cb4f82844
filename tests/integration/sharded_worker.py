"""Runs cases of one launch of the matrix under torchrun: ``sharded_worker.py OUT PRESET quick`` or ``slow``."""

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader

from helpers.gpt import Language
from helpers.models import Files, StepsTwo, trainer
from integration.matrix import LAUNCHES
from lightning_optim import (
    ChannelPruning,
    CompressedCheckpoint,
    DepthPruning,
    DistillationModule,
    Feature,
    IndexedDataset,
    LowRankFactorization,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
)
from lightning_optim.sharding import whole_state
from lightning_optim.strategies import build

EPOCHS = 2
WEIGHTS = {"every_n_steps": 3, "start": 2, "end": 0.8}
BITS = {"weight_bits": 4, "start": 2, "freeze": 0.8}
CHANNELS = {"start": 2, "end": 6, "events": 2, "include": ["*.fc1"], "round_to": 8}


class Deep(Language):
    """It has blocks to spare."""

    def __init__(self) -> None:
        super().__init__(layers=4)


class ByHand(StepsTwo, Language):
    """It steps an optimizer for its blocks and one for the rest itself."""

    def configure_optimizers(self):
        net = self.net
        others = [net.embedding, net.norm, net.head]
        return [
            torch.optim.AdamW(net.blocks.parameters(), 1e-2),
            torch.optim.AdamW([parameter for part in others for parameter in part.parameters()], 1e-2),
        ]


class Convolution(nn.Module):
    """A convolution behind an activation, and what passes by is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(x))


class Convolutions(Language):
    """Additions and activations between convolutions, whose operands have ranges; every convolution has a bias."""

    def __init__(self) -> None:
        super().__init__()
        width = self.hparams.width
        self.net.first = nn.Conv1d(width, width, 3, padding=1)
        self.net.blocks = nn.ModuleList(Convolution(width) for _ in range(2))

    def forward(self, tokens):
        x = self.net.first(self.net.embedding(tokens).mT)
        for block in self.net.blocks:
            x = block(x)
        return self.net.head(self.net.norm(x.mT))


class Distilled(DistillationModule):
    """The small model learns from a wider one, from its logits in chunks and from a layer through a projector."""

    def __init__(self, student: type = Language, block: str = "net.blocks.0") -> None:
        torch.manual_seed(5)
        teacher = Language(width=48)
        torch.manual_seed(3)
        features = [Feature(block, block, "hint")]
        super().__init__(student(), teacher, features=features, chunk_size=5)
        self.losses = []

    def train_dataloader(self):
        return self.student._loader(shuffle=True)

    def val_dataloader(self):
        return self.student._loader(shuffle=False)

    test_dataloader = val_dataloader

    def on_train_batch_end(self, outputs, batch, batch_idx):
        loss = self.trainer.strategy.reduce(outputs["loss"].detach().float().clone(), reduce_op="mean")
        self.losses.append(float(loss))


class FromCache(Distilled):
    """The same from a file of the teacher's likeliest words, which the ranks write together."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(5)
        teacher = Language(width=48)
        torch.manual_seed(3)
        DistillationModule.__init__(self, Language(), teacher, cache=folder / "teacher.cache", cache_top_k=8)
        self.losses = []

    def train_dataloader(self):
        plain = self.student._loader(shuffle=True)
        return DataLoader(IndexedDataset(plain.dataset), plain.batch_size, sampler=plain.sampler)


class DistilledByHand(Distilled):
    """The same with a student that optimizes manually, and the last block by its place."""

    def __init__(self) -> None:
        super().__init__(ByHand, "net.blocks.-1")


TECHNIQUES: dict[str, tuple[type, Any]] = {
    "weights": (Language, lambda: [WeightPruning(0.8, **WEIGHTS)]),
    "wanda": (Language, lambda: [WeightPruning(0.8, criterion="wanda", **WEIGHTS)]),
    "taylor": (Language, lambda: [WeightPruning(0.8, criterion="taylor", **WEIGHTS)]),
    "random": (Language, lambda: [WeightPruning(0.8, criterion="random", scope="layer", **WEIGHTS)]),
    "columns": (Language, lambda: [WeightPruning(0.5, granularity="column", **WEIGHTS)]),
    "nofm": (Language, lambda: [WeightPruning(granularity="2:4", **WEIGHTS)]),
    "integers": (Language, lambda: [QuantizationAwareTraining(**BITS)]),
    "histogram": (
        Language,
        lambda: [QuantizationAwareTraining(observer="histogram", weight_granularity="per_tensor", **BITS)],
    ),
    "learned": (Language, lambda: [QuantizationAwareTraining(observer="learned", **BITS)]),
    "dynamic": (Language, lambda: [QuantizationAwareTraining(activation_ranges="dynamic", **BITS)]),
    "auto": (
        Language,
        lambda: [QuantizationAwareTraining(bits="auto", effective_bits=4.5, **{**BITS, "weight_bits": 8})],
    ),
    "groups": (
        Language,
        lambda: [QuantizationAwareTraining(activation_bits=None, weight_granularity="per_group:16", **BITS)],
    ),
    "functions": (Convolutions, lambda: [QuantizationAwareTraining(**BITS)]),
    "both": (Language, lambda: [WeightPruning(0.8, **WEIGHTS), QuantizationAwareTraining(**BITS)]),
    "score": (Language, lambda: [PerformanceScore(size="nonzero", batch_size=2), WeightPruning(0.8, **WEIGHTS)]),
    "distilled": (Distilled, lambda: []),
    "cached": (FromCache, lambda: []),
    "by_hand": (DistilledByHand, lambda: []),
    "all": (
        Distilled,
        lambda: [
            WeightPruning(0.8, **WEIGHTS),
            QuantizationAwareTraining(**BITS),
            PerformanceScore(size="bits", batch_size=2),
        ],
    ),
    "channels": (Language, lambda: [ChannelPruning(0.5, **CHANNELS)]),
    "blocks": (Deep, lambda: [DepthPruning(0.5, start=2, end=6)]),
    "low_rank": (Language, lambda: [LowRankFactorization(rank=8, start=2, end=6, include=["*.fc1", "*.fc2"])]),
}
"""Name -> LightningModule and callbacks."""

STRUCTURAL = ("channels", "blocks", "low_rank")
"""What replaces parameters: done under DDP, and then divided."""


def run(
    folder: Path, name: str, precision: str, strategy: Any, ckpt_path: Path | None = None, devices: int = 1
) -> dict:
    """One fit and a test; the first one writes a file per epoch."""
    module_class, make = TECHNIQUES[name]
    ours = make()
    torch.manual_seed(3)
    module = module_class(folder) if module_class is FromCache else module_class()
    extra = [Files(folder)] if ckpt_path is None else []
    fitted = trainer(
        folder,
        *ours,
        *extra,
        strategy=strategy,
        devices=devices,
        max_epochs=EPOCHS,
        precision=precision,
        use_distributed_sampler=False,
    )
    fitted.fit(module, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in fitted.callback_metrics.items()}
    tested = fitted.test(module, verbose=False)[0]
    pruning = [callback for callback in ours if isinstance(callback, WeightPruning)]
    return {
        "state": {key: value.clone() for key, value in whole_state(module, keep=True).items()},
        "masks": pruning[0].masks if pruning else {},
        "losses": list(module.losses),
        "metrics": metrics,
        "reached": pruning[0].plan_entry()["reached"] if pruning else 0.0,
        "test": float(tested["val_loss"]),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, launch = Path(sys.argv[1]), LAUNCHES[sys.argv[2]]
    words = {"devices": launch.processes}
    quick = sys.argv[3] == "quick"
    for case in launch.quick if quick else [case for case in launch.cases if case not in launch.quick]:
        name, precision = case.split("/")
        folder = out / case.replace("/", "-")
        first = folder / "files" / "0.ckpt"
        if name in STRUCTURAL and not launch.preset.startswith("optim_ddp"):  # pruned under DDP, then divided
            straight = run(folder / "files", name, precision, build("optim_ddp"), **words)
        else:
            straight = run(folder / "files", name, precision, launch.strategy(), **words)
        runs = {"straight": straight, "resumed": run(folder, name, precision, launch.strategy(), first, **words)}
        if name == "both" and precision == "32-true":  # a file of this preset under DDP, and one of DDP under this
            runs["then ddp"] = run(folder, name, precision, build("optim_ddp"), first, **words)
            run(folder / "ddp", name, precision, build("optim_ddp"), **words)
            runs["ddp before"] = run(folder, name, precision, launch.strategy(), folder / "ddp" / "0.ckpt", **words)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(runs, folder / f"rank{torch.distributed.get_rank()}.pt")
    if sys.argv[2] == "optim_fsdp" and not quick:
        extras = {"best": best(out / "best", launch.strategy(), **words), "others": others(out / "others", **words)}
        torch.save(extras, out / f"extras{torch.distributed.get_rank()}.pt")
    (out / f"refused{torch.distributed.get_rank()}.txt").write_text(refused(out, launch, **words))


def best(folder: Path, strategy: Any, devices: int) -> dict[str, float]:
    """The best file scores again what it was chosen for; after a second fit by the same Trainer too."""
    torch.manual_seed(3)
    module = Language()
    kept = CompressedCheckpoint(dirpath=folder, monitor="val_loss")
    ours = [kept, WeightPruning(0.8, **WEIGHTS), QuantizationAwareTraining(**BITS), PerformanceScore(batch_size=2)]
    fitted = trainer(
        folder, *ours, strategy=strategy, devices=devices, max_epochs=EPOCHS, use_distributed_sampler=False
    )
    scores = {}
    for fit in ("first", "second"):
        fitted.fit(module)
        scores[f"{fit} monitored"] = float(kept.best_model_score)
        scores[fit] = float(fitted.test(module, ckpt_path="best", weights_only=True, verbose=False)[0]["val_loss"])
        fitted.fit_loop.max_epochs = 2 * EPOCHS
    return {**scores, "losses": float(len(module.losses))}


class Rated(Language):
    lr = 1e-3

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


class Compiled(Language):
    """Its blocks are compiled (for the sake of time by the backend that only traces)."""

    def configure_model(self):
        for place, block in enumerate(self.net.blocks):
            if not hasattr(block, "_orig_mod"):
                self.net.blocks[place] = torch.compile(block, backend="eager")


def others(folder: Path, devices: int) -> dict[str, Any]:
    """A learning rate finder, which saves and restores in the middle; and compiled blocks."""
    words = {"strategy": "optim_fsdp", "devices": devices, "max_epochs": EPOCHS, "use_distributed_sampler": False}
    torch.manual_seed(3)
    found = Rated()
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, max_lr=1e-1)
    trainer(folder, finder, WeightPruning(0.8, **WEIGHTS), **words).fit(found)
    torch.manual_seed(3)
    compiled = Compiled()
    trainer(folder, *TECHNIQUES["both"][1](), **words).fit(compiled)
    return {"rate": float(found.lr), "steps": len(found.losses), "compiled": list(compiled.losses)}


def refused(out: Path, launch: Any, devices: int) -> str:
    """Channels and blocks cannot leave a model that is divided."""
    messages = []
    for name in ("channels", "blocks"):
        try:
            run(out / "refused", name, "32-true", launch.strategy(), devices=devices)
        except MisconfigurationException as error:
            messages.append(str(error))
    return " ".join(messages)


if __name__ == "__main__":
    main()
