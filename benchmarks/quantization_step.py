"""What quantization-aware training adds to a training step, beside two other implementations.

Batch 32, Adam, one thread. Every variant trains in a Lightning Trainer of its own; the variants take turns, round
after round in one run, and each one's figure is the mean of its faster steps (the 5th to the 40th hundredth) in CPU
time, from the start of the batch to its end with all hooks in it. Ratios are to the float run. torchao (PT2E) and nncf
are measured where they are installed; what they cannot do is printed with the reason.

    python benchmarks/quantization_step.py > benchmarks/quantization_step_cpu_2026-11-25.md
"""

import argparse
import importlib.metadata
import platform
import tempfile
import warnings
from collections.abc import Callable

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from step_clock import faster, step_seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import QuantizationAwareTraining

BATCH = 32
SKIPPED = 4
"""Steps of a round that are not counted: the first ones, and the one that changes the phase."""


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class ConvNet(nn.Module):
    """9 convolutions of width 32 on 3x32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(*(Residual(32) for _ in range(4)))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


class TwoTower(nn.Module):
    """A history of 60 items -> EmbeddingBag of 3,100 x 256 -> 2 x 1024 -> scores of the 3,100 items."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(3100, 256)
        self.tower = nn.Sequential(
            nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.LayerNorm(256)
        )
        self.items = nn.Linear(256, 3100)

    def forward(self, history: Tensor) -> Tensor:
        return self.items(self.tower(self.history(history)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Text(nn.Module):
    """Two transformer blocks of width 128 on 32 word pieces of 2,000."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 128)
        self.body = nn.Sequential(Block(128, 4), Block(128, 4))
        self.head = nn.Linear(128, 20)

    def forward(self, pieces: Tensor) -> Tensor:
        return self.head(self.body(self.table(pieces)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "conv net, 9 convolutions": (ConvNet, lambda rows: torch.randn(rows, 3, 32, 32)),
    "two-tower recommender": (TwoTower, lambda rows: torch.randint(0, 3100, (rows, 60))),
    "transformer": (Text, lambda rows: torch.randint(0, 2000, (rows, 32))),
}


class Trained(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4)


Variant = Callable[[nn.Module, Tensor], tuple[nn.Module, list[pl.Callback]]]


def ours(**words: object) -> Variant:
    return lambda net, example: (net, [QuantizationAwareTraining(**words)])


def pt2e(net: nn.Module, example: Tensor) -> tuple[nn.Module, list[pl.Callback]]:
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(net.train(), (example,), strict=True).module()
    return allow_exported_model_train_eval(prepare_qat_pt2e(exported, quantizer)), []


def nncf_quantize(net: nn.Module, example: Tensor) -> tuple[nn.Module, list[pl.Callback]]:
    import nncf

    return nncf.quantize(net, nncf.Dataset([example])), []


VARIANTS: dict[str, Variant] = {
    "float": lambda net, example: (net, []),
    "before the window opens": ours(start=10**6, freeze=2 * 10**6, observe_steps=1),
    "observing": ours(start=0, observe_steps=10**6, freeze=2 * 10**6),
    "rounding": ours(start=0, observe_steps=1, freeze=10**6),
    "rounding, ranges frozen": ours(start=0, observe_steps=1, freeze=2),
    "rounding, weights only": ours(start=0, freeze=10**6, activation_bits=None),
    "rounding, 4 bits in groups of 32": ours(
        start=0, observe_steps=1, freeze=10**6, weight_bits=4, weight_granularity="per_group:32"
    ),
    "torchao PT2E QAT": pt2e,
    "nncf": nncf_quantize,
}


def steps_of(model: str, variant: str, steps: int, folder: str) -> list[float]:
    torch.manual_seed(0)
    make, draw = MODELS[model]
    net, callbacks = VARIANTS[variant](make(), draw(BATCH))
    data = TensorDataset(draw(BATCH * steps), torch.zeros(BATCH * steps, dtype=torch.long))
    return step_seconds(Trained(net), DataLoader(data, BATCH), folder, callbacks, skip=SKIPPED)


def table(model: str, rounds: int, steps: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in [name for name in VARIANTS if name not in failed]:
                try:
                    times[name] += steps_of(model, name, steps, folder)
                except Exception as error:  # noqa: BLE001 - a peer that cannot is a result
                    failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    lines = [f"\n### {model}\n", "| | step, ms | ratio |", "| --- | --- | --- |"]
    dense = faster(times["float"])
    for name in VARIANTS:
        if name in failed:
            lines.append(f"| {name} | | {failed[name]} |")
        else:
            lines.append(f"| {name} | {faster(times[name]) * 1e3:.2f} | {faster(times[name]) / dense:.2f} |")
    return "\n".join(lines)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("# Cost of a training step with quantization-aware training\n")
    print(
        f"{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}, torchao "
        f"{version('torchao')}, nncf {version('nncf')}.\n"
        f"`python benchmarks/quantization_step.py --rounds {args.rounds} --steps {args.steps}`\n"
    )
    print(
        f"Batch {BATCH}, Adam, 8-bit weights per channel and 8-bit activations unless said. CPU time in a Trainer with "
        f"all hooks, mean of the faster steps of {args.rounds * (args.steps - SKIPPED)}; the variants take turns."
    )
    for model in MODELS:
        print(table(model, args.rounds, args.steps), flush=True)


if __name__ == "__main__":
    main()
