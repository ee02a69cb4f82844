"""Cost of removing channels of transformers: growth with the number of blocks, and models of 5 to 135 M parameters.

Random Llamas (grouped queries, tied table) of `transformers`. For each a process of its own calls `prune_channels`
(half of the inner channels of every block, and heads), and another one trains a few steps: the start of the fit and one
event beside a training step of 8 texts of 64 tokens. CPU time of one thread; memory is the largest of the process above
what it had with the model, in units of the weights.

    python benchmarks/channels_transformers.py --output benchmarks/channels_transformers_cpu_2026-11-30.md
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from channel_event import EVENT, StepClock, TimedPruning, peak_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import prune_channels

TEXTS, TOKENS = 8, 64
SIZES: dict[str, dict[str, int]] = {
    # name: hidden size, inner size, blocks, heads, key/value heads, vocabulary
    "4 blocks of width 32": {"width": 32, "inner": 128, "blocks": 4, "heads": 8, "shared": 4, "vocabulary": 256},
    "8 blocks of width 32": {"width": 32, "inner": 128, "blocks": 8, "heads": 8, "shared": 4, "vocabulary": 256},
    "16 blocks of width 32": {"width": 32, "inner": 128, "blocks": 16, "heads": 8, "shared": 4, "vocabulary": 256},
    "32 blocks of width 32": {"width": 32, "inner": 128, "blocks": 32, "heads": 8, "shared": 4, "vocabulary": 256},
    "5 M": {"width": 192, "inner": 512, "blocks": 8, "heads": 6, "shared": 3, "vocabulary": 8192},
    "20 M": {"width": 384, "inner": 1024, "blocks": 10, "heads": 6, "shared": 3, "vocabulary": 8192},
    "80 M": {"width": 768, "inner": 2048, "blocks": 12, "heads": 12, "shared": 4, "vocabulary": 8192},
    "135 M (SmolLM2's shape)": {
        "width": 576,
        "inner": 1536,
        "blocks": 30,
        "heads": 9,
        "shared": 3,
        "vocabulary": 49152,
    },
}
COLUMNS = (
    "model",
    "parameters",
    "left",
    "prune_channels, s",
    "memory, of the weights",
    "start of the fit, s",
    "step, s",
    "event, steps",
)
BY_DEPTH = [name for name in SIZES if "blocks" in name]


def llama(size: dict[str, int]) -> nn.Module:
    """Return a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["shared"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


class LanguageModel(pl.LightningModule):
    """Predicts random texts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.net(ids).logits
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def prune_once(size: dict[str, int]) -> dict[str, Any]:
    """Return the CPU seconds and the memory of `prune_channels`."""
    model = llama(size)
    weights = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(1, size["vocabulary"], (2, 16))
    with torch.no_grad():
        model(ids)
    before, began = peak_memory(), time.thread_time()
    report = prune_channels(model, ids, scope="layer")
    seconds = time.thread_time() - began
    heads = sum("attn" in name for name in report.channels)
    return {
        "parameters": weights,
        "left": report.parameters[1],
        "seconds": seconds,
        "memory": (peak_memory() - before) / (4 * weights),
        "total": peak_memory(),
        "groups": f"{len(report.channels) - heads} inner, {heads} heads",
    }


def train_once(size: dict[str, int]) -> dict[str, Any]:
    """Return the CPU seconds of the start of a fit, of a step, and of an event."""
    net = llama(size)
    ids = torch.randint(1, size["vocabulary"], (TEXTS * EVENT, TOKENS))
    clock = StepClock()
    pruning = TimedPruning(0.5, start=EVENT, end=EVENT, scope="layer", example_inputs=ids[:2, :16])
    trainer = pl.Trainer(
        max_steps=EVENT,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, pruning],
    )
    trainer.fit(LanguageModel(net), DataLoader(TensorDataset(ids), batch_size=TEXTS))
    return {"start": pruning.start_cpu, "event": pruning.event_cpu, "step": statistics.median(clock.seconds)}


def in_process(kind: str, name: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--worker", kind, "--size", name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Return the result file."""
    import torch_pruning
    import transformers

    lines = [
        "# Channels of transformers",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, CPU time; "
        f"torch {torch.__version__}; lightning {lightning.__version__}; "
        f"torch-pruning {torch_pruning.__version__}; transformers {transformers.__version__}.",
        "`python benchmarks/channels_transformers.py --output " + OUTPUT + "`",
        "",
        (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['left'] / row['parameters']:.2f} | "
            f"{row['seconds']:.1f} | {row['memory']:.2f} | {row['start']:.1f} | {row['step']:.3f} | "
            f"{row['event'] / row['step']:.1f} |"
        )
    by_depth = [rows[name] for name in BY_DEPTH if name in rows]
    growth = [later["seconds"] / earlier["seconds"] for earlier, later in pairwise(by_depth)]
    if growth:
        lines += ["", f"Twice the blocks take {', '.join(f'{each:.2f}' for each in growth)} times as long."]
    largest = max(rows.values(), key=lambda row: row["parameters"])
    lines += ["", f"The process of the largest model took {largest['total'] / 1e9:.2f} GB in all with prune_channels."]
    return "\n".join(lines) + "\n"


OUTPUT = "benchmarks/channels_transformers_cpu_2026-11-30.md"


def main() -> None:
    """Measure every size and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(OUTPUT))
    parser.add_argument("--size", choices=SIZES, action="append", help="only these sizes")
    parser.add_argument("--worker", choices=("prune", "train"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        warnings.simplefilter("ignore")
        run = prune_once if arguments.worker == "prune" else train_once
        print(json.dumps(run(SIZES[arguments.size[0]])))
        return
    rows = {}
    for name in arguments.size or SIZES:
        rows[name] = in_process("prune", name) | in_process("train", name)
        print(name, rows[name], flush=True)
    arguments.output.write_text(report(rows))


if __name__ == "__main__":
    main()
