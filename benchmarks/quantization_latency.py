"""Latency and size of exported models, float32 against int8, in ONNX Runtime and OpenVINO.

Untrained models of ``quantization_step.py`` and a small BERT, calibrated on random inputs: speed and size do not depend
on the weights' values. Each ratio compares int8 with float32 in the same engine on one thread, calls in turns. Sizes
are of the files, raw and after zlib; "80 % zeros" sets the smallest weights to zero before. Needs the extras ``onnx``
and ``openvino``, and transformers.

    python benchmarks/quantization_latency.py --output benchmarks/quantization_latency_cpu_2026-11-25.md
"""

import argparse
import copy
import platform
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
import transformers
from quantization_step import MODELS
from torch import Tensor, nn

from lightning_optim import ExportReport, export_onnx, quantize_post_training
from lightning_optim.functional.masks import global_masks

BATCHES = (1, 32)
SPARSITY = 0.8
BERT = "BERT, 2 layers of 128"


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=2000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=20,
    )
    return transformers.BertForSequenceClassification(config)


def bert_inputs(rows: int) -> dict[str, Tensor]:
    pieces = torch.randint(0, 2000, (rows, 32))
    return {"input_ids": pieces, "attention_mask": torch.ones_like(pieces)}


ALL: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {**MODELS, BERT: (bert, bert_inputs)}


def quantized(model: nn.Module, draw: Callable[[int], Any], **words: Any) -> nn.Module:
    loader = [draw(32) for _ in range(4)]
    return quantize_post_training(copy.deepcopy(model).eval(), loader, progress_bar=False, **words)


def pruned(model: nn.Module) -> nn.Module:
    """Set the smallest weights of all matrices to zero."""
    model = copy.deepcopy(model)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    masks = global_masks({name: weight.abs() for name, weight in weights.items()}, SPARSITY)
    for name, mask in masks.items():
        weights[name].mul_(mask)
    return model


def latency_rows(folder: Path) -> Iterator[str]:
    for name, (make, draw) in ALL.items():
        torch.manual_seed(0)
        model = quantized(make(), draw)
        cells = []
        report: ExportReport | None = None
        for runtime in ("onnxruntime", "openvino"):
            for batch in BATCHES:
                report = export_onnx(
                    model, folder / "model.onnx", draw(2), inputs=draw(batch), runtime=runtime, least_agreement=0.0
                )
                took = report.latency
                cells.append(f"{took.against_milliseconds:.3g} -> {took.milliseconds:.3g} ({1 / took.ratio:.1f}x)")
            if runtime == "onnxruntime":
                kernels = (
                    f"{report.integer_convolutions}/{report.convolutions} convolutions, "
                    f"{report.integer_matmuls}/{report.matmuls} matmuls"
                )
        yield f"| {name} | {' | '.join(cells)} | {kernels} |"


def size_rows(folder: Path) -> Iterator[str]:
    for name, (make, draw) in ALL.items():
        torch.manual_seed(0)
        model = make().eval()
        tables = [cls for cls in (nn.Embedding, nn.EmbeddingBag) if any(type(m) is cls for m in model.modules())]
        variants = {
            "float32": model,
            "int8": quantized(model, draw),
            "80 % zeros": pruned(model),
            "int8, 80 % zeros": quantized(pruned(model), draw),
        }
        if tables:
            small = quantize_post_training(
                copy.deepcopy(model), include=tables, activation_bits=None, weight_bits=4, progress_bar=False
            )
            variants["int4 tables, int8 elsewhere"] = quantized(small, draw, exclude=tables)
        for variant, made in variants.items():
            export_onnx(made, folder / "model.onnx", draw(2), verify=False)
            data = (folder / "model.onnx").read_bytes()
            if variant == "float32":
                whole = len(data)
            packed = len(zlib.compress(data, 9))
            yield (
                f"| {name} | {variant} | {len(data) / 1e3:,.0f} | {len(data) / whole:.1%} | {packed / 1e3:,.0f} | "
                f"{packed / whole:.1%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the tables; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [
            "# Latency and size of exported models, float32 against int8\n",
            f"{platform.machine()}, one thread; torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, "
            f"OpenVINO {openvino.__version__.partition('-')[0]}.\n`python benchmarks/quantization_latency.py`\n",
            "## Milliseconds a call, float32 -> int8 in the same engine\n",
            "| | ONNX Runtime, batch 1 | batch 32 | OpenVINO, batch 1 | batch 32 | integer kernels in ONNX Runtime |",
            "| --- | --- | --- | --- | --- | --- |",
            *latency_rows(folder),
            "\n## Size of the file\n",
            "| | | kB | of float32 | zlib, kB | of float32 |",
            "| --- | --- | --- | --- | --- | --- |",
            *size_rows(folder),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
