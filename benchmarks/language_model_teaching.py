"""A language model cut by a third of its blocks, taught by its whole self, against labels alone and from scratch.

The model is a Hugging Face folder (`--model`); the messages are Banking77's (`--data`, no labels used). It is
fine-tuned first and is then the teacher. The smaller model is trained in a Trainer, with the next words alone (`next
words`), with a `DistillationModule` around it (`kd`), and from random weights of the same shape (`from scratch`); the
seed decides the order of the messages. Perplexity is that of held-out messages.

    python benchmarks/language_model_teaching.py --model FOLDER --data ../shared/data/banking77 --output FILE
"""

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from language_model import Texts, loss_of, parser_of, perplexity, read, train, versions
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import DistillationModule, prune_depth

WAYS = {"next words": None, "kd, alpha 0.5": 0.5, "kd, alpha 0.9": 0.9, "from scratch": None}


class Student(pl.LightningModule):
    """A language model, its loss and its optimizer."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches of messages, in an order that a seed decides."""

    def __init__(self, texts: Texts, size: int, seed: int) -> None:
        self.texts, self.size = copy.copy(texts), size
        order = torch.randperm(len(texts.ids), generator=torch.Generator().manual_seed(seed)).tolist()
        self.texts.ids = [texts.ids[place] for place in order]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.texts.batches(self.size)


class Perplexities(pl.Callback):
    """Notes the perplexity of held-out messages after some steps."""

    def __init__(self, model: nn.Module, texts: Texts, steps: list[int]) -> None:
        self.model, self.texts, self.steps = model, texts, steps
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.found[trainer.global_step] = perplexity(self.model, self.texts)
            self.model.train()


def taught(
    way: str,
    model: nn.Module,
    teacher: nn.Module,
    texts: Texts,
    held_out: Texts,
    arguments: argparse.Namespace,
    seed: int,
) -> tuple[dict[int, float], float]:
    """Train a copy in one way, and return the perplexities by step and the seconds of CPU."""
    pl.seed_everything(seed, verbose=False)
    model = type(model)(model.config) if way == "from scratch" else copy.deepcopy(model)
    student = Student(model, 5e-4 if way == "from scratch" else 2e-4)
    alpha = WAYS[way]
    # the teacher is one of the student's kind: its step calls `model`, and so does the teacher's
    module = (
        student
        if alpha is None
        else DistillationModule(student, teacher, loss="kd", alpha=alpha, temperature=1.0, logits_from="model")
    )
    seen = Perplexities(model, held_out, arguments.steps)
    began = time.process_time()
    pl.Trainer(
        max_steps=max(arguments.steps),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[seen],
    ).fit(module.train(), DataLoader(Stream(texts, arguments.batch, seed), batch_size=None))
    return seen.found, time.process_time() - began


def main() -> None:
    """Measure every way over the seeds and write the result file."""
    parser = parser_of(__doc__, batch=8)
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    teacher, texts, held_out = read(arguments)
    train(teacher, texts, steps=arguments.teacher_steps, size=arguments.batch, rate=1e-4)
    smaller = copy.deepcopy(teacher).eval()
    judged = next(texts.batches(8))
    inputs = {key: judged[key] for key in ("input_ids", "attention_mask")}
    blocks = teacher.config.num_hidden_layers // 3
    prune_depth(smaller, inputs, pruning_ratio=blocks, criterion="loss", loss=lambda net: float(loss_of(net, judged)))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, smaller)]
    command = (
        f"python benchmarks/language_model_teaching.py --model FOLDER --data DATA --teacher-steps "
        f"{arguments.teacher_steps} --steps {' '.join(map(str, arguments.steps))} --seeds {arguments.seeds} --batch "
        f"{arguments.batch} --test {arguments.test} --output FILE"
    )
    lines = [
        "# A smaller language model, taught by the whole one",
        "",
        versions(),
        f"`{command}`",
        "",
        f"{arguments.model.name}: {sizes[0]:,} parameters, fine-tuned for {arguments.teacher_steps} steps of "
        f"{arguments.batch} messages of Banking77 (no labels): perplexity {perplexity(teacher, held_out):.2f} on "
        f"{arguments.test} held-out messages. Without {blocks} blocks, chosen by loss: {sizes[1]:,} parameters, "
        f"{perplexity(smaller, held_out):.1f}. Then AdamW, 2e-4 (from scratch 5e-4). Perplexity, mean ± std over "
        f"{arguments.seeds} seeds; time of a run against `next words` (CPU time).",
        "",
        f"| | {' | '.join(f'{step} steps' for step in arguments.steps)} | time |",
        f"|{' --- |' * (len(arguments.steps) + 2)}",
    ]
    usual = 0.0
    for way in arguments.ways:
        runs = [taught(way, smaller, teacher, texts, held_out, arguments, seed) for seed in range(arguments.seeds)]
        seconds = statistics.mean(run[1] for run in runs)
        usual = usual or seconds
        cells = [_mean_and_std([run[0][step] for run in runs]) for step in arguments.steps]
        lines.append(f"| {way} | {' | '.join(cells)} | {seconds / usual:.2f} |")
        print(lines[-1], flush=True)
        arguments.output.write_text("\n".join(lines) + "\n")


def _mean_and_std(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
