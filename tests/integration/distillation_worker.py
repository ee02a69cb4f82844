"""Runs named distillations on two processes and writes what each rank ended with: ``OUT CASE...``."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, DistributedSampler

from helpers.distilled import HINT, teacher
from helpers.models import Classifier, Files, data, new, trainer, val_loader
from lightning_optim import ChannelPruning, QuantizationAwareTraining, WeightPruning
from lightning_optim.distillation import DistillationModule, IndexedDataset, Ramp
from lightning_optim.strategies.common import end_group_at_exit

EPOCHS = 3


class InDDP(Classifier):
    """Takes its data from one place on every rank."""

    indexed = False

    def train_dataloader(self):
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        dataset = IndexedDataset(data()) if self.indexed else data()
        return DataLoader(dataset, 4, sampler=DistributedSampler(dataset, world, rank, shuffle=True, seed=1))

    def val_dataloader(self):
        return val_loader()


class InDDPIndexed(InDDP):
    indexed = True


class InDDPByHand(InDDP):
    """It steps two optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net[:4], self.net[4:])]


STUDENTS = {"cache": InDDPIndexed, "by_hand": InDDPByHand, "by_hand_channels": InDDPByHand}


def module(name: str, folder: Path) -> DistillationModule:
    words = {
        "kd": {},
        "chunks": {"loss": {"reverse_kd": 1.0, "jsd": 1.0}, "chunk_size": 3},
        "ramps": {"alpha": Ramp(0.9, 0.1, "cosine"), "temperature": Ramp(4.0, 1.0)},
        "cache": {"cache": folder / "logits.cache"},
        "top_k": {"cache": folder / "logits.cache", "cache_top_k": 2},
    }.get(name, {"features": HINT})
    indexed = InDDPIndexed if "cache" in words else InDDP
    return DistillationModule(new(STUDENTS.get(name, indexed)), teacher(), **words)


def callbacks(name: str) -> list:
    return {
        "weights": lambda: [WeightPruning(0.8, every_n_steps=3, start=2, end=0.8)],
        "by_hand_channels": lambda: [ChannelPruning(0.5, start=2, end=0.8, events=3)],
        "channels": lambda: [ChannelPruning(0.5, start=2, end=0.8, events=3)],
        "integers": lambda: [QuantizationAwareTraining(weight_bits=4, start=2, freeze=0.8)],
        "ema": lambda: [EMAWeightAveraging(decay=0.9)],
    }.get(name, list)()


def run(folder: Path, name: str, precision: str, ckpt_path: Path | None = None) -> dict:
    """One fit; the first one writes a file per epoch."""
    files = [Files(folder / "files")] if ckpt_path is None else []
    torch.manual_seed(0)
    distillation = module(name, folder)
    fitted = trainer(
        folder,
        *callbacks(name),
        *files,
        strategy="ddp",
        devices=2,
        max_epochs=EPOCHS,
        precision=precision,
        use_distributed_sampler=False,
    )
    fitted.fit(distillation, ckpt_path=ckpt_path)
    return {
        "state": {name: value.clone() for name, value in distillation.state_dict().items()},
        "parameters": {name: value.detach().clone() for name, value in distillation.named_parameters()},
        "teacher": distillation.teacher.checksum(),
        "metrics": {n: float(v) for n, v in fitted.callback_metrics.items() if n.startswith("distillation")},
    }


def errors(folder: Path) -> dict[str, str]:
    """A teacher of its own on each rank, and a cache that cannot be built: every rank says so, none waits."""
    rank = torch.distributed.get_rank()
    broken = teacher()
    broken.head.bias.data.fill_(float("nan"))
    makers = {
        "teachers differ": lambda: DistillationModule(new(InDDP), teacher(seed=rank)),
        "cache fails": lambda: DistillationModule(new(InDDPIndexed), broken, cache=folder / "nan.cache"),
    }
    said = {}
    for name, make in makers.items():
        one = trainer(folder, strategy="ddp", devices=2, max_epochs=1, use_distributed_sampler=False)
        try:
            one.fit(make())
        except Exception as error:  # noqa: BLE001 - what is raised is what is looked at
            said[name] = f"{type(error).__name__}: {error}"
    return said


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        name, precision = case.split("/")
        folder = out / case.replace("/", "-")
        results = {"straight": run(folder, name, precision)}
        for epoch in range(EPOCHS - 1):
            results[f"resumed after {epoch}"] = run(folder, name, precision, folder / "files" / f"{epoch}.ckpt")
        torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.save(errors(out), out / f"errors{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    end_group_at_exit()
    main()
