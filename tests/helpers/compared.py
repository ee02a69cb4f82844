"""Three tiny nets of one task, and what a comparison of them may look like without measuring."""

import copy

import torch
from torch import nn

from lightning_optim import ComparisonReport, prune_channels, quantize_post_training

ROWS, FEATURES, CLASSES = 48, 12, 4


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, CLASSES)
    )


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1))


def models() -> dict[str, nn.Module]:
    """A net, the same without half of its channels, and the same rounded to 8 bits."""
    dense = net()
    pruned, rounded = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_channels(pruned, inputs()[:1], pruning_ratio=0.5)
    quantize_post_training(rounded, [inputs()], progress_bar=False)
    return {"dense": dense, "pruned": pruned, "rounded": rounded}


def row(name: str, kind: str, accuracy: float, size: int, ratio: float, **more) -> dict:
    low, high = ratio - 0.01, ratio + 0.01
    differs = abs(ratio - 1) >= 0.05
    return {
        "name": name,
        "kind": kind,
        "accuracy": accuracy,
        "parameters": size,
        "nonzero": size,
        "bits": float(size),
        "size_ratio": size / 1000,
        "bytes": 4 * size,
        "onnx_bytes": 5 * size,
        "macs": size,
        "torch_ms": ratio,
        "torch_ratio": ratio,
        "torch_low": low,
        "torch_high": high,
        "torch_differs": differs,
        "P": ratio,
        "torch_P": ratio,
        **more,
    }


def layers(width: int, sparsity: float = 0.0, bits: float = 32.0) -> list[dict]:
    words = {"type": "Linear", "parameters": width * FEATURES, "sparsity": sparsity, "bits": bits, "width": width}
    return [{"layer": f"net.{place}", **words} for place in range(3)]


def report(accuracy: float = 0.9, ratio: float = 0.5) -> ComparisonReport:
    """A comparison that was not measured."""
    found = ComparisonReport(
        reference="dense",
        engines=["torch"],
        batch_size=32,
        metrics=["accuracy"],
        weights={"size": 0.4, "train_time": 0.0, "inference_time": 0.6, "accuracy": 0.1},
        rows=[
            row("dense", "dense", 0.95, 1000, 1.0),
            row("half <b>", "compressed", accuracy, 500, ratio),
            row("scratch", "control", 0.8, 500, 0.5),
        ],
        layers={"dense": layers(32), "half <b>": layers(16, 0.5, 8.0), "scratch": layers(16)},
        notes=["one & only"],
        histories={"half <b>": [{"P/unguarded": 1.0, "P/error": 0.5}, {"P/unguarded": 0.6, "P/error": None}]},
        environment="somewhere",
    )
    found.add_row("word counts", accuracy=0.7)
    return found
