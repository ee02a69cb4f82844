"""Removing half of the channels of well-known architectures: gain and cost, compared with plain torch-pruning.

python benchmarks/channel_zoo.py > benchmarks/channel_zoo_cpu_2026-11-24.md

Models are built from configurations with random weights (no accuracy is measured): a ResNet-18, a ConvNeXt-tiny, a
ViT-small and a BERT-small of `transformers`, a DLRM-like net and a two-tower net. Reported are parameters, operations,
latency at batch 1 and 32 (CPU minima of interleaved pairs, one thread), whether the output keeps its shape, whether
gradients reach every parameter, and whether removing equals setting to zero where that can be told.
"""

import copy
import datetime
import logging
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning as tp
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_optim.measure.latency import interleaved_latency
from lightning_optim.measure.macs import count_macs
from lightning_optim.structured.check import damage
from lightning_optim.structured.groups import TracedModel
from lightning_optim.structured.prune import prune_channels
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows

SIDE, TOKENS, ROWS, LIMIT = 32, 32, 1000, 20


COLUMNS = (
    "model",
    "by",
    "parameters, M",
    "MACs, M",
    "batch 1, ms",
    "batch 32, ms",
    "output",
    "gradients reach",
    "removing equals zeroing",
    "pruning, s",
)


class DLRM(nn.Module):
    """Embeddings of four features and an MLP of numbers, their products, and an MLP on top."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, width) for _ in range(4))
        self.bottom = nn.Sequential(
            nn.Linear(13, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, width)
        )
        self.top = nn.Sequential(
            nn.Linear(width + 25, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        features = [dense, *(table(categories[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(features, 1)
        products = (stacked @ stacked.transpose(1, 2)).flatten(1)
        return self.top(torch.cat([dense, products], 1)).squeeze(1)


class TwoTower(nn.Module):
    """The product of a customer's vector and an item's, each through an MLP."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.customer, self.item = nn.EmbeddingBag(ROWS, width), nn.Embedding(ROWS, width)
        self.left = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, width))
        self.right = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, width))

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        return (self.left(self.customer(history)) * self.right(self.item(item))).sum(1)


def resnet() -> nn.Module:
    words = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**words))


def convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig())


def vit() -> nn.Module:
    words = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return transformers.ViTForImageClassification(transformers.ViTConfig(**words))


def bert() -> nn.Module:
    words = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**words))


def pixels() -> Any:
    return {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}


def words() -> Any:
    return {"input_ids": torch.randint(1000, (2, TOKENS))}


def numbers_and_categories() -> Any:
    return torch.randn(2, 13), torch.randint(ROWS, (2, 4, 3))


def history_and_item() -> Any:
    return torch.randint(ROWS, (2, 20)), torch.randint(ROWS, (2,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "ResNet-18": (resnet, pixels, {}),
    "ConvNeXt-tiny": (convnext, pixels, {}),
    "ViT-small": (vit, pixels, {}),
    "BERT-small": (bert, words, {}),
    "DLRM-like": (DLRM, numbers_and_categories, {"include": ["bottom*", "top.0", "top.2", "tables*"]}),
    "two-tower": (TwoTower, history_and_item, {"include": ["left*", "right*", "customer", "item"]}),
}


def outputs(model: nn.Module, inputs: ForwardInputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs.call(model)) if isinstance(leaf, Tensor)]


def health(model: nn.Module, dense: nn.Module, inputs: ForwardInputs) -> tuple[str, str]:
    """Describe whether the output keeps its shape and gradients reach the same parameters as in the dense model."""
    reached = []
    shapes = []
    for net in (dense, model):
        net.zero_grad()
        leaves = outputs(net, inputs)
        sum(leaf.float().sum() for leaf in leaves).backward()
        reached.append({name for name, p in net.named_parameters() if p.grad is not None})
        shapes.append([leaf.shape for leaf in leaves])
        net.zero_grad()
    return ("kept" if shapes[0] == shapes[1] else "CHANGED"), (
        "all" if reached[0] == reached[1] else f"{len(reached[1])} of {len(reached[0])}"
    )


def row(
    name: str, how: str, model: nn.Module, dense: nn.Module, inputs: ForwardInputs, seconds: float, zeroed: str
) -> str:
    parameters = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (dense, model)]
    macs = [count_macs(net, first_rows(inputs, 1)) / 1e6 for net in (dense, model)]
    cells = [f"{parameters[0]:.2f} -> {parameters[1]:.2f}", f"{macs[0]:.1f} -> {macs[1]:.1f}"]
    for rows in (1, 32):
        few = {"seconds": 0.5, "least": 10} if rows == 1 else {"seconds": 1.0, "least": 3, "most": 20}
        timed = interleaved_latency(model, first_rows(inputs, rows), dense, **few)
        cells.append(f"{timed.against_milliseconds:.2f} -> {timed.milliseconds:.2f} ({timed.ratio:.2f})")
    return f"| {name} | {how} | {' | '.join([*cells, *health(model, dense, inputs)])} | {zeroed} | {seconds:.1f} |"


def plainly(model: nn.Module, inputs: ForwardInputs) -> dict[str, list[int]]:
    """Prune half of the channels as in torch-pruning's documentation: all layers but the last, heads ignored.

    Returns the outputs removed from each layer that a group begins with.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    pruner = tp.pruner.BasePruner(
        model,
        inputs.kwargs or inputs.args,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[layers[-1]],
        output_transform=lambda output: [leaf for leaf in tree_leaves(output) if leaf.requires_grad],
    )
    pruner.step()
    return {name: list(indices) for name, _, indices in pruner.DG.pruning_history()}


def verdict(dense: nn.Module, inputs: ForwardInputs, removed: dict[str, list[int]]) -> str:
    """Describe whether this removal equals setting the same channels to zero."""
    return str(damage(dense, inputs, TracedModel(dense, inputs).remove(removed)) or "equals")


def too_long(*_: object) -> None:
    raise RuntimeError(f"not finished after {LIMIT} s, its lists of indices grow at every turn")


def attempt(name: str, inputs: ForwardInputs, dense: nn.Module, include: dict[str, Any]) -> tuple[list[str], str]:
    """Return the rows of one model, and the notes on it."""
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    start = time.perf_counter()
    report = prune_channels(ours, inputs, scope="layer", **include)
    seconds = time.perf_counter() - start
    rows = [row(name, "prune_channels", ours, dense, inputs, seconds, "checked")]
    left = sorted({reason.split(" (")[0].split(" by ")[0] for reason in report.left_out.values()})
    note = (
        f"- {name}: {len(report.channels)} groups pruned; {len(report.left_out)} left alone ({'; '.join(left) or '-'})."
    )
    try:
        start = time.perf_counter()
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT)
        removed = plainly(theirs, inputs)
        signal.alarm(0)
        seconds = time.perf_counter() - start
        rows.append(row(name, "torch-pruning", theirs.eval(), dense, inputs, seconds, verdict(dense, inputs, removed)))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError) as error:
        signal.alarm(0)
        problem = (str(error).splitlines() or [""])[0].replace("|", "/")[:150]
        rows.append(f"| {name} | torch-pruning | FAILS: {type(error).__name__}: {problem} | | | | | | | |")
    return rows, note


def main() -> None:
    """Write the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, rows, notes = time.perf_counter(), [], []
    for name, (make, example, include) in MODELS.items():
        torch.manual_seed(0)
        dense, inputs = make().eval(), as_forward_inputs(example())
        more, note = attempt(name, inputs, dense, include)
        rows += more
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        notes.append(note)
    print("# Half of the channels of well-known architectures\n")
    print(
        f"{datetime.date.today()}, {platform.machine()} CPU, one thread; torch {torch.__version__}, torch-pruning "
        f"{version('torch-pruning')}, transformers {transformers.__version__}. Command: "
        f"`python benchmarks/channel_zoo.py` ({time.perf_counter() - start:.0f} s). Random weights from "
        f"configurations, images of {SIDE} x {SIDE}, {TOKENS} tokens. `pruning_ratio=0.5`, "
        '`scope="layer"`; embedding columns of the DLRM-like and the two-tower net by `include`. torch-pruning: '
        "BasePruner with its defaults, the last Linear ignored. Its transformers keep the output's shape, and their "
        "heads are scrambled: single channels leave, and what is left is cut into heads anew.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- " * len(COLUMNS) + "|")
    print("\n".join(rows))
    print("\nWhat prune_channels left alone:\n")
    print("\n".join(notes))


if __name__ == "__main__":
    main()
