"""A language model's teacher as k words a position: perplexity after 100 steps, bytes a token, and time of a step.

Small Llama models on Banking77's messages (no labels used), whose vocabulary are its words. The teacher is trained
first; each student then takes 100 steps over the same messages in another order for each seed: alone (cross-entropy),
with the live teacher, and with caches of k = 8, 32, 128 words or the logits of all (kd, temperature 1, alpha 0.5).
Perplexity is that of the test messages. Times are CPU times of steps in a Trainer, variants in turns, the mean of the
faster ones (the 5th to the 40th hundredth); once at this vocabulary, and once at 32,000 words with random tokens.

    python benchmarks/top_k_cache.py --data ../shared/data/banking77 > benchmarks/top_k_cache_cpu_2026-11-30.md
"""

import argparse
import csv
import math
import platform
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import transformers
from step_clock import faster, step_seconds
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim import DistillationModule, IndexedDataset
from lightning_optim.distillation import IndexedCollate, LogitCache

LONGEST, BATCH, STEPS, LARGE = 48, 16, 100, 32_000
PAD, UNKNOWN, END = 0, 1, 2
WAYS: dict[str, int | None] = {"k = 8": 8, "k = 32": 32, "k = 128": 128, "all logits": None}


class Writer(pl.LightningModule):
    """A Llama of some width and depth."""

    def __init__(self, words: int, width: int, blocks: int, rate: float = 3e-3) -> None:
        super().__init__()
        self.rate = rate
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=blocks,
            num_attention_heads=width // 32,
            tie_word_embeddings=False,
            use_cache=False,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
        )
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.0)


def read_texts(folder: Path) -> tuple[list[Tensor], list[Tensor], int]:
    """Return training and test messages as token ids, and the number of words."""

    def split(file: Path) -> list[list[str]]:
        with file.open() as rows:
            return [re.findall(r"\w+|[^\w\s]", row["text"].lower()) for row in csv.DictReader(rows)]

    train, test = split(folder / "train.csv"), split(folder / "test.csv")
    counted = Counter(word for text in train for word in text)
    numbers = {word: number for number, (word, _) in enumerate(counted.most_common(), 3)}
    ids = [
        [torch.tensor([END, *(numbers.get(word, UNKNOWN) for word in text), END][:LONGEST]) for text in texts]
        for texts in (train, test)
    ]
    return ids[0], ids[1], len(numbers) + 3


def collate(chosen: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(list(chosen), batch_first=True, padding_value=PAD)
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fit(module: pl.LightningModule, texts: Sequence[Any], seed: int, folder: str, epochs: int = 1) -> None:
    torch.manual_seed(seed)
    indexed = isinstance(texts, IndexedDataset)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(
        module, DataLoader(texts, BATCH, shuffle=True, collate_fn=IndexedCollate(collate) if indexed else collate)
    )


@torch.no_grad()
def perplexity(model: Writer, texts: Sequence[Tensor]) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), 64):
        batch = collate(texts[start : start + 64])
        size = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + size * float(model(**batch).loss), count + size
    return math.exp(total / count)


def student_with(make: Callable[[], Writer], teacher: Writer, way: str, folder: str) -> pl.LightningModule:
    """Return a student alone, with the live teacher, or with a cache."""
    if way == "alone":
        return make()
    words: dict[str, Any] = {}
    if way != "live teacher":
        words = {"cache": Path(folder) / way.replace(" ", ""), "cache_top_k": WAYS[way]}
    return DistillationModule(make(), teacher, loss="kd", temperature=1.0, alpha=0.5, **words)


def step_times(
    make: Callable[[], Writer], teacher: Writer, texts: list[Tensor], batch: int, ways: Sequence[str], rounds: int
) -> dict[str, float]:
    """Return the ratio of each way's step to that of the student alone, and the seconds of that one."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way in ("alone", "live teacher", *ways):
                module = student_with(make, teacher, way, folder)
                loader = DataLoader(IndexedDataset(texts), batch, collate_fn=IndexedCollate(collate))
                if way == "alone":
                    loader = DataLoader(texts, batch, collate_fn=collate)  # type: ignore[arg-type]
                seconds.setdefault(way, []).extend(step_seconds(module, loader, folder, skip=1))
    alone = faster(seconds["alone"])
    return {"seconds": alone, **{way: faster(times) / alone for way, times in seconds.items()}}


def print_quality(train: list[Tensor], test: list[Tensor], words: int, seeds: int) -> None:
    """Train the teacher and all students, and print their perplexities."""
    seen, ways = train[: BATCH * STEPS], ("alone", "live teacher", *WAYS)
    values: dict[str, list[float]] = {way: [] for way in ways}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        teacher = Writer(words, 128, 2)
        fit(teacher, train, 0, folder)
        of_teacher = perplexity(teacher, test)
        for seed in range(seeds):
            for way in ways:
                torch.manual_seed(seed)
                module = student_with(partial(Writer, words, 64, 1), teacher, way, folder)
                fit(module, seen if way == "alone" else IndexedDataset(seen), seed, folder)  # type: ignore[arg-type]
                values[way].append(perplexity(getattr(module, "student", module), test))
        for way in WAYS:
            cache = LogitCache(Path(folder) / way.replace(" ", ""))
            sizes[way] = (f"{cache.bytes_per_row:,}", f"{cache.path.stat().st_size / 1e6:.1f}")
    print("## Quality\n")
    print(f"Banking77's messages, {words:,} words. Teacher: width 128, 2 blocks, {len(train) // BATCH} steps, ", end="")
    print(f"perplexity {of_teacher:.1f}. Students: width 64, 1 block, {STEPS} steps of {BATCH} messages, ", end="")
    print(f"{seeds} seeds (mean ± std).\n\n| | bytes a token | cache, MB | perplexity |\n| --- | --- | --- | --- |")
    for way in ways:
        token, total = sizes.get(way, ("", ""))
        spread = stdev(values[way]) if seeds > 1 else 0.0
        print(f"| {way} | {token} | {total} | {fmean(values[way]):.2f} ± {spread:.2f} |")


def print_times(train: list[Tensor], words: int, rounds: int) -> None:
    """Measure steps at two sizes, and print their ratios."""
    make = partial(Writer, words, 64, 1)
    small = step_times(make, Writer(words, 128, 2), train[: 20 * BATCH], BATCH, tuple(WAYS), rounds)
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, LARGE, (LONGEST,), generator=random) for _ in range(5 * 8)]
    make = partial(Writer, LARGE, 384, 8, 1e-4)
    large = step_times(make, Writer(LARGE, 384, 8), texts, 8, ("k = 32",), max(rounds - 1, 1))
    print("\n## Time of a step\n")
    print(f"Ratios to the student alone ({small['seconds'] * 1e3:.0f} ms; {large['seconds'] * 1e3:.0f} ms). ", end="")
    print(
        f"{words:,} words: the models above. {LARGE:,} words: width 384, 8 blocks, a teacher of the same size, ", end=""
    )
    print(f"8 x {LONGEST} random tokens.\n")
    print(f"| | {words:,} words | {LARGE:,} words |\n| --- | --- | --- |")
    for way in ("alone", "live teacher", *WAYS):
        print(f"| {way} | {small[way]:.2f} | {f'{large[way]:.2f}' if way in large else ''} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("quality", "time", "both"), default="both")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train, test, words = read_texts(arguments.data)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    train = [train[place] for place in order]
    print("# A teacher as k words a position\n")
    print(f"{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}, ", end="")
    print(f"transformers {transformers.__version__}.")
    print(f"`python benchmarks/top_k_cache.py --seeds {arguments.seeds} --rounds {arguments.rounds}`\n")
    if arguments.part != "time":
        print_quality(train, test[:1024], words, arguments.seeds)
    if arguments.part != "quality":
        print_times(train, words, arguments.rounds)


if __name__ == "__main__":
    main()
