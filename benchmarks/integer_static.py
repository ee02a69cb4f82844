"""Our int8 files against those of ``onnxruntime.quantization.quantize_static``: time, bytes, agreement with float.

The demo's residual net on scikit-learn's digits with ReLU, Hardswish and SiLU, trained in float. Both quantize the same
net with the same 512 training images, 8 bits, weights per channel, ranges from the smallest to the largest value seen;
theirs in its QDQ format after its own pre-processing. Both files run in ONNX Runtime on one thread, loaded in the same
way (on processors without VNNI with uint8 weights, without which the products overflow), calls in turns; each file is
loaded several times, at other places in memory. Needs the extras ``onnx`` and ``examples``.

    python benchmarks/integer_static.py --output benchmarks/integer_static_cpu_2026-12-01.md
"""

import argparse
import copy
import logging
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from time import thread_time
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from quiet import prepare, vnni
from torch import Tensor, nn

from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.demo import DigitsData, DigitsNet
from lightning_optim.export.runtimes import Runtime, load_runtime

EPOCHS = 10
CALIBRATION, BATCH = 512, 64
ROWS = (1, 32)
LOADS, ROUNDS = 4, 16
CALLS = {1: 20, 32: 3}

ACTIVATIONS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    "residual (ReLU)": (nn.ReLU, F.relu),
    "Hardswish": (nn.Hardswish, F.hardswish),
    "SiLU": (nn.SiLU, F.silu),
}


class Block(nn.Module):
    """A residual block whose last activation is a function."""

    def __init__(self, layers: nn.Sequential, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.function = layers, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.layers(x))


def net(activation: str, seed: int, data: DigitsData) -> nn.Module:
    """Return a trained net of the demo's shape."""
    cls, function = ACTIVATIONS[activation]
    pl.seed_everything(seed, verbose=False)
    model = DigitsNet()
    for place, layer in enumerate(model.net):
        if hasattr(layer, "layers"):
            layer.layers[2] = cls()
            model.net[place] = Block(layer.layers, function)
        elif isinstance(layer, nn.ReLU):
            model.net[place] = cls()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data.train_dataloader())
    return model.eval()


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def theirs(model: nn.Module, batches: list[Tensor], path: Path) -> None:
    plain, prepared = path.with_name("float.onnx"), path.with_name("prepared.onnx")
    export_onnx(model, plain, batches[0], verify=False)
    quant_pre_process(str(plain), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def ours(model: nn.Module, batches: list[Tensor], path: Path, images: Tensor) -> float:
    """Write our file, and return its mean difference from the rounded model as a fraction of the output's range."""
    rounded = quantize_post_training(copy.deepcopy(model), batches, observer="min_max", progress_bar=False)
    report = export_onnx(rounded, path, images[:8], inputs=images, least_agreement=0.0, keep_float="none")
    with torch.no_grad():
        answers = rounded(images)
    return report.mean_difference / float(answers.max().clamp_min(0) - answers.min().clamp_max(0))


def time_ratio(first: Runtime, second: Runtime, images: Tensor) -> float:
    """Return the median ratio of times of calls in turns, over several loads of both files."""
    ratios = []
    for _ in range(LOADS):
        pair = first.again(), second.again()
        for turn in range(ROUNDS + 1):
            took = []
            for engine in pair:
                start = thread_time()
                for _ in range(CALLS[len(images)]):
                    engine.run([images])
                took.append(thread_time() - start)
            if turn:  # the first warms up
                ratios.append(took[0] / took[1])
    return median(ratios)


def kernels(engine: Any) -> str:
    counts = Counter(engine._operators)
    floats = [f"{counts[name]} {name}" for name in counts if name not in _INTEGER]
    integers = sum(counts[name] for name in counts if name in _INTEGER)
    return f"{integers} integer; {', '.join(floats) or 'none in float'}"


_INTEGER = {"QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearAveragePool", "Transpose",
            "Reshape", "Squeeze"}  # fmt: skip


def rows(seeds: int, folder: Path) -> Iterator[str]:
    data = DigitsData()
    images, labels = data.splits["test"].tensors
    for activation in ACTIVATIONS:
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            model = net(activation, seed, data)
            chosen = torch.randperm(len(data.splits["train"]), generator=torch.Generator().manual_seed(seed))
            batches = list(data.splits["train"].tensors[0][chosen[:CALIBRATION]].split(BATCH))
            paths = folder / "ours.onnx", folder / "theirs.onnx"
            found.setdefault("difference", []).append(ours(model, batches, paths[0], images))
            theirs(model, batches, paths[1])
            engines = [load_runtime(path, "onnxruntime") for path in paths]
            with torch.no_grad():
                expected = model(images)
            for who, engine in zip(("ours", "theirs"), engines, strict=True):
                answers = engine.run([images])[0]
                found.setdefault(f"{who} agree", []).append(
                    float((answers.argmax(1) == expected.argmax(1)).float().mean())
                )
                found.setdefault(f"{who} right", []).append(float((answers.argmax(1) == labels).float().mean()))
                found.setdefault(f"{who} error", []).append(float((answers - expected).abs().mean()))
            for count in ROWS:
                found.setdefault(f"time {count}", []).append(time_ratio(*engines, images[:count]))
            found.setdefault("bytes", []).append(paths[0].stat().st_size / paths[1].stat().st_size)
        size = paths[0].stat().st_size, paths[1].stat().st_size
        cells = [
            *(_spread(found[f"time {count}"]) for count in ROWS),
            f"{mean(found['bytes']):.3f} ({size[0]:,} / {size[1]:,})",
            *(f"{mean(found[f'ours {what}']):{form}} / {mean(found[f'theirs {what}']):{form}}"
              for what, form in (("agree", ".2%"), ("right", ".2%"), ("error", ".4f"))),
            f"{mean(found['difference']):.1e}",
        ]  # fmt: skip
        yield f"| {activation} | {' | '.join(cells)} |"
        yield from (
            f"<!-- {activation}, {who}: {kernels(e)} -->" for who, e in zip(("ours", "theirs"), engines, strict=True)
        )


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    prepare(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        table = list(rows(args.seeds, Path(folder)))
    lines = [
        "# int8 files: ours against onnxruntime.quantization.quantize_static\n",
        f"{date.today()}, {platform.machine()}, one thread; torch {torch.__version__}, ONNX Runtime "
        f"{onnxruntime.__version__}; the processor has {vnni()}.\n"
        f"`python benchmarks/integer_static.py --seeds {args.seeds}`\n",
        "Time and bytes are ours / theirs: below 1 is better. Time: median ratio of calls in turns, mean ± standard "
        f"deviation over {args.seeds} trained nets. Agreement: test images ({719}) with the float net's class, ours / "
        "theirs; then accuracy, and mean distance of the logits from the float net's. Last: mean distance of our file "
        "from our rounded model, as a fraction of the outputs' range.\n",
        "| net | time, 1 row | time, 32 rows | bytes | agreement | accuracy | logit error | file - model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line for line in table if line.startswith("|")),
        "\nOperators of the optimized graph:\n",
        *(f"- {line[5:-4]}" for line in table if line.startswith("<!--")),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
