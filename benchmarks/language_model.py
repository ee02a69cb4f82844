"""A language model with a third of its blocks, or half of its inner channels, before and after recovery.

The model is a Hugging Face folder (`--model`); the messages are Banking77's (`--data`, no labels used). It is
fine-tuned first; then each criterion removes from a copy of it, and the copy is trained on. Perplexity is that of
held-out messages. Removal takes the CPU seconds of one thread; one seed, as each row is minutes of training.

    python benchmarks/language_model.py --model FOLDER --data ../shared/data/banking77 --output FILE
"""

import argparse
import copy
import csv
import math
import platform
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim import prune_channels, prune_depth

COLUMNS = ("removed", "criterion", "parameters", "seconds", "perplexity", "after recovery")
LONGEST = 48


class Texts:
    """Messages as batches of token ids, padded, with -100 as the label of padding."""

    def __init__(self, file: Path, tokenizer: Any, limit: int | None = None) -> None:
        with file.open() as rows:
            texts = [row["text"] for row in csv.DictReader(rows)]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
        template = "<|im_start|>{}<|im_end|>"
        self.ids = [tokenizer(template.format(texts[i].strip()))["input_ids"][:LONGEST] for i in order]

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches in their order, again and again."""
        place = 0
        while True:
            chosen = [self.ids[i % len(self.ids)] for i in range(place, place + size)]
            place += size
            yield collate(chosen)


def collate(chosen: list[list[int]]) -> dict[str, Tensor]:
    """Return token ids, a mask and labels of some messages."""
    longest = max(map(len, chosen))
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(chosen):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch's tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def perplexity(model: nn.Module, texts: Texts) -> float:
    """Return the perplexity of some messages."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(texts.ids), 16):
            batch = collate(texts.ids[start : start + 16])
            number = int((batch["labels"][:, 1:] != -100).sum())
            total += float(loss_of(model, batch)) * number
            tokens += number
    return math.exp(total / tokens)


def train(model: nn.Module, texts: Texts, *, steps: int, size: int, rate: float) -> None:
    """Train with AdamW and a short warm-up."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    for _, batch in zip(range(steps), texts.batches(size), strict=False):
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def removals(judged: dict[str, Tensor], blocks: int) -> dict[tuple[str, str], Callable[[nn.Module], object]]:
    """Return what removes something from a model, by what is removed and the criterion."""
    inputs = {key: judged[key] for key in ("input_ids", "attention_mask")}
    found: dict[tuple[str, str], Callable[[nn.Module], object]] = {}
    for criterion in ("loss", "influence", "last", "random"):
        found[f"{blocks} blocks", criterion] = lambda model, criterion=criterion: prune_depth(
            model,
            inputs,
            pruning_ratio=blocks,
            criterion=criterion,
            loss=(lambda net: float(loss_of(net, judged))) if criterion == "loss" else None,
        )
    for criterion in ("activation", "magnitude", "random"):
        found["half of the inner channels", criterion] = lambda model, criterion=criterion: prune_channels(
            model,
            inputs,
            pruning_ratio=0.5,
            criterion=criterion,
            scope="layer",
            include=["*.mlp.up_proj", "*.mlp.gate_proj"],
        )
    return found


def parser_of(description: str | None, *, batch: int) -> argparse.ArgumentParser:
    """Return the options of a benchmark of a language model on messages."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.csv and test.csv, column text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--test", type=int, default=128, help="held-out messages")
    return parser


def read(arguments: argparse.Namespace) -> tuple[Any, Texts, Texts]:
    """Return the model, the messages of training, and those held out; from here on one thread computes."""
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.config.use_cache = False
    training = Texts(arguments.data / "train.csv", tokenizer)
    return model, training, Texts(arguments.data / "test.csv", tokenizer, arguments.test)


def versions() -> str:
    """Return the date, the machine and the versions that a result file names."""
    import transformers

    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread; torch {torch.__version__}; transformers "
        f"{transformers.__version__}."
    )


def main() -> None:
    """Measure every criterion and write the result file."""
    parser = parser_of(__doc__, batch=16)
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning, and of recovery")
    parser.add_argument("--judged", type=int, default=24, help="messages of training on which candidates are judged")
    arguments = parser.parse_args()
    model, training, held_out = read(arguments)
    lines = [
        "# A language model with fewer blocks and channels",
        "",
        versions(),
        f"`python benchmarks/language_model.py --model FOLDER --data DATA --steps {arguments.steps} --batch "
        f"{arguments.batch} --judged {arguments.judged} --test {arguments.test} --output FILE`",
        "",
        f"{arguments.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters. Banking77's messages, "
        f"without labels; {arguments.steps} steps of {arguments.batch} messages of fine-tuning (AdamW, 1e-4), as many "
        f"of recovery (2e-4). Perplexity of {arguments.test} held-out messages, one seed. Seconds: CPU time. "
        f"Candidates are judged, and activations measured, on {arguments.judged} messages of training.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]

    def write(row: tuple[str, ...]) -> None:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
        arguments.output.write_text("\n".join(lines) + "\n")

    before = perplexity(model, held_out)
    train(model, training, steps=arguments.steps, size=arguments.batch, rate=1e-4)
    size = sum(p.numel() for p in model.parameters())
    write(("nothing", "", f"{size:,}", "", f"{before:.1f}", f"{perplexity(model, held_out):.2f}"))
    judged = next(training.batches(arguments.judged))
    blocks = model.config.num_hidden_layers // 3
    for (what, criterion), remove in removals(judged, blocks).items():
        smaller = copy.deepcopy(model).eval()
        began = time.thread_time()
        remove(smaller)
        seconds = time.thread_time() - began
        cut = perplexity(smaller, held_out)
        train(smaller, training, steps=arguments.steps, size=arguments.batch, rate=2e-4)
        size = sum(p.numel() for p in smaller.parameters())
        after = perplexity(smaller, held_out)
        write((what, criterion, f"{size:,}", f"{seconds:.0f}", f"{cut:,.1f}", f"{after:.2f}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    lines += ["", f"The process took {peak:.1f} GB at most (training included: two models, gradients, AdamW's state)."]
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
