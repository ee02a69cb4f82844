"""Step time, memory, tokens per second and MFU of one GPU: plain, compiled, and divided by FSDP2 into one shard.

GPTs of 124 M and 350 M parameters (GPT-2 small and medium: tied head, 1,024 tokens of 50,304), AdamW, bf16-mixed. What
sharding costs where it can save nothing is what it costs beside the sending. Each case runs in a process of its own, in
turns; a figure is the mean over the steps after the warm-up, with one synchronisation before and one after. MFU counts
``6 * parameters + 12 * layers * width * length`` FLOPs a token (parameters without the positions; Chowdhery et al.
2022, appendix B) against the device's data sheet. Needs a CUDA device.

    python benchmarks/strategies_gpu.py > benchmarks/strategies_gpu_NAME_DATE.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.strategies.reading import read_board


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    batch_size: int
    length: int = 1024
    vocabulary: int = 50304


SIZES = {
    "124 M": Size(layers=12, width=768, heads=12, batch_size=16),
    "350 M": Size(layers=24, width=1024, heads=16, batch_size=8),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.project, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(pl.LightningModule):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids = batch[0]
        x = self.tokens(ids[:, :-1]) + self.positions.weight[: ids.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-4, fused=True)


CASES: dict[str, tuple[str, bool]] = {
    "optim_single": ("optim_single", False),
    "optim_single, blocks compiled": ("optim_single", True),
    "optim_fsdp": ("optim_fsdp", False),
    "optim_fsdp, blocks compiled": ("optim_fsdp", True),
}
"""Name -> preset, and whether each block is compiled."""


class Clock(pl.Callback):
    """Measures the time between two synchronizations: after the warm-up, and at the end."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last = warm_up, warm_up + steps - 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        if idx == self.first:
            synchronize(pl_module.device)
            self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        if idx == self.last:
            synchronize(pl_module.device)
            self.seconds = (time.perf_counter() - self.began) / (self.last - self.first + 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(size: Size, case: str, warm_up: int, steps: int, accelerator: str = "cuda") -> dict[str, float]:
    """Train for some steps; return seconds per step, bytes at the peak, and FLOPs per token."""
    preset, compiles = CASES[case]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    module = GPT(size)
    if compiles:
        for block in module.blocks:
            block.compile()
    count = sum(parameter.numel() for parameter in module.parameters()) - module.positions.weight.numel()
    ids = torch.randint(size.vocabulary, ((warm_up + steps) * size.batch_size, size.length + 1))
    clock = Clock(warm_up, steps)
    trainer = pl.Trainer(
        strategy=preset,
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(ids), size.batch_size, pin_memory=accelerator == "cuda"))
    return {
        "seconds": clock.seconds,
        "bytes": torch.cuda.max_memory_allocated() if accelerator == "cuda" else 0,
        "flops": 6 * count + 12 * size.layers * size.width * size.length,
    }


def launch(size: str, case: str, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        asked = ["--out", str(out), "--size", size, "--case", case]
        numbers = ["--warm-up", str(args.warm_up), "--steps", str(args.steps)]
        subprocess.run([sys.executable, __file__, *asked, *numbers], check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(out.read_text()))


def table(name: str, found: dict[str, list[dict[str, float]]], peak: float | None) -> str:
    size = SIZES[name]
    tokens = size.batch_size * size.length
    lines = ["| | step, ms | ratio | peak, GB | tokens/s | MFU |", "| --- | --- | --- | --- | --- | --- |"]
    first = fmean(one["seconds"] for one in next(iter(found.values())))
    for case, runs in found.items():
        seconds, peak_bytes = fmean(one["seconds"] for one in runs), max(one["bytes"] for one in runs)
        mfu = "" if peak is None else f"{runs[0]['flops'] * tokens / seconds / (peak * 1e12):.1%}"
        lines.append(
            f"| {case} | {seconds * 1e3:.1f} | {seconds / first:.2f} | {peak_bytes / 1e9:.2f} | "
            f"{tokens / seconds:,.0f} | {mfu} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per case")
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=40, help="steps that are")
    parser.add_argument("--size", choices=SIZES, help="only this one")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    words = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA device.")
    warnings.simplefilter("ignore")
    if words.out:
        Path(words.out).write_text(json.dumps(measure(SIZES[words.size], words.case, words.warm_up, words.steps)))
        return
    board, _ = read_board(None)
    sheet = f"{board.half_tflops} TFLOPS in bfloat16 by data sheet" if board.half_tflops else "no data sheet, so no MFU"
    print("# Single, compiled and FSDP2 on one GPU\n")
    print(
        f"{torch.cuda.get_device_name(0)}, {sheet}; torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"lightning {lightning.__version__}.\n"
        f"`python benchmarks/strategies_gpu.py --rounds {words.rounds} --warm-up {words.warm_up} "
        f"--steps {words.steps}`\n"
    )
    for name in [words.size] if words.size else SIZES:
        size = SIZES[name]
        found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(words.rounds):
            for case in CASES:
                found[case].append(launch(name, case, words))
        print(f"### {name} parameters, {size.batch_size} x {size.length} tokens\n")
        print(table(name, found, board.half_tflops), flush=True)
        print()


if __name__ == "__main__":
    main()
