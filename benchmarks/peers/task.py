"""Shared by all workers: the two tasks, their training, and the comparison of a resumed run with an uninterrupted one.

A worker describes what its peer does as variants; ``work`` trains and measures them and writes JSON. Everything is
drawn from (seed, epoch): the order of the data, dropout and augmentation. So all variants see the same batches, and a
plain run that is resumed at an epoch ends bit for bit where the uninterrupted one does.
"""

import argparse
import gzip
import importlib.metadata
import io
import json
import logging
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lightning_optim import export_onnx
from lightning_optim.demo import DigitsData, DigitsNet

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

__all__ = [
    "AFTER",
    "CALIBRATION",
    "DENSE",
    "END",
    "START",
    "STUDENT",
    "TASKS",
    "Digits",
    "Recommender",
    "Task",
    "Trained",
    "Variant",
    "aware_variant",
]

BATCH_SIZE = 64
START, END = 0.1, 0.7
"""The window of pruning, as a fraction of the run."""
PACKAGES = (
    "torch",
    "lightning",
    "torch-pruning",
    "torchao",
    "nncf",
    "nvidia-modelopt",
    "torchdistill",
    "onnx",
    "onnxruntime",
    "numpy",
)
BOTH, DIGITS = ("digits", "recommender"), ("digits",)
"""Tasks of a variant: the longer one has fewer rows."""
DENSE, STUDENT, TEACHER = "dense", "student", "teacher"
AFTER = "post-training quantization, 8 bits"
CALIBRATION = 8
"""Training batches that ranges are taken from after training."""


def cubic(progress: float, final: float) -> float:
    """Return the sparsity due when a part of the window is over (Zhu and Gupta 2017), which both sides follow."""
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


def cut_at(task: "Task", part: float) -> int:
    """Return the number of epochs after which a run is interrupted."""
    return max(1, int(part * task.epochs))


def epoch_window(task: "Task") -> tuple[int, int]:
    """Return the window of pruning in whole epochs, for what acts at the ends of epochs only."""
    return int(START * task.epochs), round(END * task.epochs)


class EachEpoch(Sampler[int]):
    """Shuffles by (seed, epoch); the Trainer says which epoch it is."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "rng"):
            self.dataset.rng = np.random.default_rng((self.seed, epoch))

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(len(self.dataset), generator=generator).tolist())


def loader_of(dataset: Any, seed: int, **words: Any) -> DataLoader[Any]:
    """Return a loader that does not draw from the global generator, which dropout uses."""
    own = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, BATCH_SIZE, sampler=EachEpoch(dataset, seed), generator=own, **words)


class Task:
    """A model, its data and its judge."""

    name: str
    title: str
    epochs: int
    metrics: dict[str, str]
    limits: str
    trainer: dict[str, Any] = {}
    shared: Path
    """Folder of what workers have in common: the teachers."""

    def new(self, kind: str, seed: int) -> pl.LightningModule:
        """Return a fresh model, always the same for a seed."""
        raise NotImplementedError

    def loader(self, seed: int) -> DataLoader[Any]:
        raise NotImplementedError

    def judge(self, model: Callable[..., Tensor]) -> dict[str, float]:
        """Return the metrics of what is called like the model; of a file too."""
        raise NotImplementedError

    def prunable(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the weights that may become zero: the same for all."""
        raise NotImplementedError

    def served(self, module: nn.Module) -> nn.Module:
        """Return what is deployed of a trained module."""
        return module

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        """Yield training batches as what is deployed takes them, by name."""
        raise NotImplementedError

    def export(self, module: nn.Module, path: Path, **words: Any) -> None:
        """Export with the package's exporter, which serves the peers that have none of their own."""
        raise NotImplementedError

    def feed(self, batch: int) -> list[Tensor]:
        """Return what a file takes, in its order."""
        raise NotImplementedError

    def introduction(self, seeds: int) -> str:
        """Return the sentences that say what is measured."""
        raise NotImplementedError

    def split(self, module: pl.LightningModule) -> pl.LightningModule:
        """Return the model with all its layers in ``net``."""
        return module

    def net_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return of a batch what ``net`` takes."""
        raise NotImplementedError

    def with_net(self, module: pl.LightningModule, net: nn.Module) -> nn.Module:
        """Return what is scored where a peer has made another net."""
        return net

    def trace(self, module: pl.LightningModule, net: nn.Module, path: Path) -> None:
        """Export a net in the place of the module's by torch's older exporter, which some peers need."""
        if self.name == "digits":
            example, free = {"images": self.feed(32)[0]}, {}
        else:
            from recommender_split import ServedNet

            net, example, free = ServedNet(net, module.terms), self.padded(2), self.free()
        axes = {name: {0: "batch"} | free.get(name, {}) for name in example}
        words = {"dynamo": False, "opset_version": 17, "input_names": list(example), "dynamic_axes": axes}
        with torch.no_grad():
            torch.onnx.export(net, tuple(example.values()), str(path), **words)

    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.loader(0))


class Digits(Task):
    name = "digits"
    title = "scanned digits"
    epochs = 20
    metrics = {"accuracy": "test accuracy, %"}
    limits = (
        "Limits: one machine that others used too, one thread; 719 test images, so one image is 0.14 points, and "
        "differences below 1 point say nothing. A net this small hides what costs grow with the number of weights, and "
        "at batch 1 a call is mostly overhead. No validation runs while it trains, and the last weights are scored."
    )
    widths = {DENSE: 13, STUDENT: 3, TEACHER: 26}

    def __init__(self, path: str | None = None) -> None:
        self.splits = DigitsData().splits

    def introduction(self, seeds: int) -> str:
        return (
            f"The residual net of `lightning_optim.demo` ({{}} parameters), {self.epochs} epochs of 958 scans in "
            f"batches of {BATCH_SIZE}, tested on 719. Test accuracy in percent, mean ± standard deviation over {seeds} "
            "seeds.\n"
        ).format(f"{sum(p.numel() for p in self.new(DENSE, 0).parameters()):,}")

    def new(self, kind: str, seed: int) -> DigitsNet:
        pl.seed_everything(seed, verbose=False)
        return DigitsNet(self.widths[kind])

    def loader(self, seed: int) -> DataLoader[Any]:
        return loader_of(self.splits["train"], seed)

    def judge(self, model: Callable[..., Tensor]) -> dict[str, float]:
        images, labels = self.splits["test"][:]
        with torch.no_grad():
            return {"accuracy": 100 * float((model(images).argmax(1) == labels).float().mean())}

    def prunable(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(layer, "weight") for layer in module.modules() if isinstance(layer, nn.Conv2d)]

    def net_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return (batch[0],)

    def export(self, module: nn.Module, path: Path, **words: Any) -> None:
        images, _ = self.splits["test"][:]
        export_onnx(module, path, images[:32], inputs=images, least_agreement=0.0, **words)

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        for images, _ in islice(self.loader(0), CALIBRATION):
            yield {"images": images}

    def feed(self, batch: int) -> list[Tensor]:
        return [self.splits["test"][:batch][0]]


class Recommender(Task):
    name = "recommender"
    title = "a two-tower recommender"
    epochs = 3
    limits = (
        "Limits: one machine that others used too, one thread, one size of model. Peers whose callback acts at the "
        "ends of epochs have three of them here. No validation runs while it trains, and the last weights are scored."
    )
    metrics = {"recall": "recall", "new_recall": "recall, new items"}

    def __init__(self, path: str | None = None) -> None:
        from recommender import SMALL, TRAINER
        from recommender_data import RetailData, loader

        self.tower = SMALL
        self.task = RetailData(path, synthetic=path is None).task
        self.trainer = {"gradient_clip_val": TRAINER["gradient_clip_val"]}
        self._loader = loader
        self.source = "a generated shop" if path is None else "Online Retail"

    def introduction(self, seeds: int) -> str:
        return (
            f"The small tower of `examples/recommender.py` on {self.source}: {len(self.task.items):,} items, "
            f"{self.epochs} epochs of {len(self.task.train):,} baskets, judged on {len(self.task.evaluation):,} "
            f"customers. Recall at 20 over all items / over items new to the customer, mean ± standard deviation over "
            f"{seeds} seeds.\n"
        )

    def new(self, kind: str, seed: int) -> pl.LightningModule:
        pl.seed_everything(seed, verbose=False)
        return self.tower.build(len(self.task.items))

    def loader(self, seed: int) -> DataLoader[Any]:
        plain = self._loader(self.task.train, self.task.popularity, batch_size=BATCH_SIZE, train=True, seed=seed)
        return loader_of(plain.dataset, seed, collate_fn=plain.collate_fn)

    def judge(self, model: Callable[..., Tensor]) -> dict[str, float]:
        from ranking import ranking_metrics
        from recommender_data import relevant_and_seen
        from recommender_model import TwoTower, padded

        relevant, seen = relevant_and_seen(self.task.evaluation, len(self.task.items))
        arrange = dict if isinstance(model, TwoTower) else padded
        with torch.no_grad():
            scores = torch.cat([model(**arrange(batch["inputs"])) for batch in self._held_out(64)])
        found = ranking_metrics(scores, relevant, seen)
        return {name: found[name] for name in self.metrics}

    def prunable(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(layer, "weight") for layer in module.modules() if isinstance(layer, (nn.Linear, nn.EmbeddingBag))]

    def split(self, module: pl.LightningModule) -> pl.LightningModule:
        from recommender_split import SplitTower

        return SplitTower(module)

    def net_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return tuple(batch["inputs"][name] for name in ("item", "starts", "weight"))

    def with_net(self, module: pl.LightningModule, net: nn.Module) -> nn.Module:
        shell = self.split(self.new(DENSE, 0))
        shell.net, shell.terms = net, module.terms
        return shell

    def served(self, module: nn.Module) -> nn.Module:
        from recommender_model import Serving

        return module if isinstance(module, Serving) else Serving(module)

    def export(self, module: nn.Module, path: Path, **words: Any) -> None:
        example, free = self.padded(2), self.free()
        export_onnx(self.served(module), path, example, dynamic_dims=free, least_agreement=0.0, **words)

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        from recommender_model import padded

        for batch in islice(self.loader(0), CALIBRATION):
            yield padded(batch["inputs"])

    def free(self) -> dict[str, dict[int, str]]:
        """Return the dimensions that are free in a file beside the batch."""
        from recommender_model import RAGGED

        return {name: {1: "entries"} for name in RAGGED}

    def padded(self, batch: int) -> dict[str, Tensor]:
        """Return held-out customers as a file takes them."""
        from recommender_model import padded

        return padded(next(iter(self._held_out(batch)))["inputs"])

    def feed(self, batch: int) -> list[Tensor]:
        return list(self.padded(batch).values())

    def _held_out(self, batch: int) -> DataLoader[Any]:
        return self._loader(self.task.evaluation, self.task.popularity, batch_size=batch)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Digits, Recommender)}


ByHand = Callable[[pl.LightningModule, Task, "Trained"], list[pl.Callback]]


@dataclass(frozen=True)
class Variant:
    """One way to compress, of a peer or ours.

    Attributes:
        name: Of the row.
        technique: Of the table it stands in.
        callbacks: New ones for a run; they get the task.
        wrap: Makes of a fresh model what is trained, given the task and the seed.
        deploy: Returns of the trained module the one that is scored, in eval mode.
        export: Writes the file; None: the peer has no file of another kind than its PyTorch model.
        by_hand: What prepares a fresh module for a checkpoint, given the finished run, where the peer needs that, by
            the words that say what it does.
        baseline: What it is compared with.
        resumed_at: After which part of the epochs the run is cut.
        counted_from: From which part of the run its steps are timed.
        notes: What the table has to say beside the numbers.
        tasks: Those it is for.
    """

    name: str
    technique: str
    callbacks: Callable[[Task], list[pl.Callback]] = lambda task: []
    wrap: Callable[[pl.LightningModule, Task, int], pl.LightningModule] = lambda module, task, seed: module
    deploy: Callable[[pl.LightningModule, Task], nn.Module] = lambda module, task: module.eval()
    export: Callable[[pl.LightningModule, Task, Path], None] | None = lambda module, task, path: task.export(
        module, path
    )
    by_hand: Mapping[str, ByHand] = field(default_factory=dict)
    baseline: str = DENSE
    resumed_at: float = 0.5
    counted_from: float = START
    notes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = BOTH


def aware_variant(peer: str, bits: int, **words: Any) -> Variant:
    """Return the variant of a peer that swaps a rounding net in at half of the run.

    Args:
        peer: Its name in the row.
        bits: Of the weights.
        words: What else the variant has.
    """
    return Variant(
        f"{peer} {bits} bits",
        f"quantization-aware training, {bits}-bit weights",
        wrap=lambda module, task, seed: task.split(module),
        resumed_at=0.75,
        counted_from=0.55,
        tasks=BOTH if bits == 8 else DIGITS,
        **words,
    )


class _Begins(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        self.at = time.thread_time()


class _Seeds(pl.Callback):
    """Draws dropout from (seed, epoch), and stops the clock of each step; last in the list."""

    def __init__(self, seed: int, begins: _Begins) -> None:
        self.seed, self.begins, self.seconds = seed, begins, []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        torch.manual_seed(1000 * self.seed + trainer.current_epoch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.thread_time() - self.begins.at)


@dataclass
class Trained:
    """A finished run."""

    module: pl.LightningModule
    callbacks: list[pl.Callback]
    fit_seconds: float
    step_seconds: list[float]
    checkpoint: Path | None = None


def fit(
    module: pl.LightningModule,
    task: Task,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    *,
    folder: Path | None = None,
    keep_epoch: int | None = None,
    resume: Path | None = None,
) -> Trained:
    """Train, keep the checkpoint of one epoch where asked, and time it in CPU time of the thread."""
    begins = _Begins()
    seeds = _Seeds(seed, begins)
    checkpoints = []
    if keep_epoch is not None:
        checkpoints.append(ModelCheckpoint(folder, "{epoch}", every_n_epochs=keep_epoch, save_top_k=-1))
    trainer = pl.Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(checkpoints),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[begins, *callbacks, seeds, *checkpoints],
        default_root_dir=folder,
        **task.trainer,
    )
    begin = time.thread_time()
    trainer.fit(module, task.loader(seed), ckpt_path=resume, weights_only=False if resume else None)
    seconds = time.thread_time() - begin
    kept = None if keep_epoch is None else folder / f"epoch={keep_epoch - 1}.ckpt"
    return Trained(module, list(callbacks), seconds, seeds.seconds, kept)


def teacher_of(task: Task, seed: int) -> pl.LightningModule:
    """Return the trained teacher of a seed; the first call trains it."""
    path = task.shared / f"teacher_{task.name}_{seed}.pt"
    module = task.new(TEACHER, seed)
    if not path.exists():
        fit(module, task, seed)
        torch.save(module.state_dict(), path)
    module.load_state_dict(torch.load(path))
    return module.eval()


def work(variants: Sequence[Variant]) -> None:
    """Main function of a worker: train all variants with all seeds and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", help="the Online Retail file; default a generated shop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True, help="for files and the JSON")
    parser.add_argument("--epochs", type=int, help="fewer, to try it out")
    args = parser.parse_args()
    quiet()
    task = TASKS[args.task](args.data)
    task.epochs = args.epochs or task.epochs
    task.shared = args.folder.parent
    Worker(task, [each for each in variants if task.name in each.tasks], args.folder, args.seeds).run()


def quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "nncf", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Worker:
    """Trains variants and their baselines in turns, seed by seed."""

    def __init__(self, task: Task, variants: list[Variant], folder: Path, seeds: int) -> None:
        self.task, self.variants, self.folder, self.seeds = task, variants, folder, seeds
        self.baselines = sorted({variant.baseline for variant in variants})
        self.found: dict[str, Any] = {"versions": versions(), "baselines": {}, "variants": {}}

    def run(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # a checkpoint of an earlier run would keep its name
        self.folder.mkdir(parents=True)
        for seed in range(self.seeds):
            for kind in self.baselines:
                self.baseline(kind, seed)
            for variant in self.variants:
                self.variant(variant, seed)
                self.write()

    def write(self) -> None:
        (self.folder / "found.json").write_text(json.dumps(self.found, indent=1))

    def baseline(self, kind: str, seed: int) -> None:
        plain = Variant(kind, "baseline")
        row = self.found["baselines"].setdefault(kind, {"seeds": []})
        first = {"keep_epoch": cut_at(self.task, 0.5), "folder": self.folder / kind} if seed == 0 else {}
        run = fit(self.task.new(kind, seed), self.task, seed, **first)
        row["seeds"].append(self.figures(plain, run, seed))
        if run.checkpoint is not None:
            row["resume"] = {"plain": self.resumed(plain, run)}

    def variant(self, variant: Variant, seed: int) -> None:
        row = self.found["variants"].setdefault(variant.name, {"technique": variant.technique, "seeds": []})
        row.update(baseline=variant.baseline, notes=variant.notes)
        if "error" in row:
            return
        name = file_name(variant.name)
        keep = cut_at(self.task, variant.resumed_at)
        first = {"keep_epoch": keep, "folder": self.folder / name} if seed == 0 else {}
        try:
            module = variant.wrap(self.task.new(variant.baseline, seed), self.task, seed)
            run = fit(module, self.task, seed, variant.callbacks(self.task), **first)
            row["seeds"].append(self.figures(variant, run, seed))
        except Exception as error:  # noqa: BLE001 - what a peer cannot do is a result
            row["error"] = reason(error)
            traceback.print_exc()
            return
        print(variant.name, seed, row["seeds"][-1]["metrics"], f"{run.fit_seconds:.1f} s", flush=True)
        if run.checkpoint is not None:
            row["resume"] = {"plain": self.resumed(variant, run)}
            row["by_hand"] = {words: self.resumed(variant, run, each) for words, each in variant.by_hand.items()}

    def figures(self, variant: Variant, run: Trained, seed: int) -> dict[str, Any]:
        trained = run.module
        skipped = round(variant.counted_from * len(run.step_seconds))
        found: dict[str, Any] = {
            "fit_seconds": run.fit_seconds,
            "step_seconds": run.step_seconds[skipped:],
            "own_parameters": sum(p.numel() for p in trained.parameters()),
        }
        deployed = variant.deploy(trained, self.task)
        found |= {
            "metrics": self.task.judge(deployed),
            "parameters": sum(p.numel() for p in deployed.parameters()),
            "zeros": zeros(self.task, deployed),
            "state_bytes": compressed(deployed),
        }
        if variant.export is None:
            return found
        path = self.folder / f"{file_name(variant.name)}_{seed}.onnx"
        try:
            variant.export(trained, self.task, path)
            found["onnx"] = str(path)
        except Exception as error:  # noqa: BLE001 - what a peer cannot do is a result
            found["onnx_error"] = reason(error)
            traceback.print_exc()
        return found

    def resumed(self, variant: Variant, run: Trained, by_hand: ByHand | None = None) -> dict[str, Any]:
        """Go on from the checkpoint in a fresh module, and compare with the run that was not interrupted."""
        reference = {name: tensor.clone() for name, tensor in tensors(run.module).items()}
        kind = variant.name if variant.technique == "baseline" else variant.baseline
        try:
            module = variant.wrap(self.task.new(kind, 0), self.task, 0)
            callbacks = by_hand(module, self.task, run) if by_hand else variant.callbacks(self.task)
            again = fit(module, self.task, 0, callbacks, resume=run.checkpoint)
            deployed = variant.deploy(again.module, self.task)
            return {
                **difference(reference, tensors(again.module)),
                "zeros": zeros(self.task, deployed),
                "parameters": sum(p.numel() for p in deployed.parameters()),
                "metrics": self.task.judge(deployed),
            }
        except Exception as error:  # noqa: BLE001 - what a peer cannot do is a result
            traceback.print_exc()
            return {"error": reason(error)}


def file_name(row: str) -> str:
    return re.sub(r"\W+", "_", row).strip("_")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def difference(reference: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Describe how many tensors differ, and by how much at most."""
    if {name: t.shape for name, t in reference.items()} != {name: t.shape for name, t in found.items()}:
        return {"equal": False, "differ": "shapes or names"}
    unequal = [name for name, tensor in reference.items() if not torch.equal(tensor, found[name])]
    most = max((float((reference[n].float() - found[n].float()).abs().max()) for n in unequal), default=0.0)
    return {"equal": not unequal, "differ": f"{len(unequal)} of {len(reference)} tensors", "most": most}


def zeros(task: Task, module: nn.Module) -> float | None:
    """Return the fraction of zeros among the prunable weights; None where the model has no such layers any more."""
    weights = [getattr(layer, name).detach() for layer, name in task.prunable(module)]
    if not weights:
        return None
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


def compressed(module: nn.Module) -> int:
    """Return the bytes of ``torch.save(state_dict)`` after gzip."""
    file = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in tensors(module).items()}, file)
    return len(gzip.compress(file.getvalue(), 9, mtime=0))


def reason(error: Exception) -> str:
    """Return an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:260]}"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
