"""Ranges of each call in OpenVINO: inputs rounded in the file, and left float as ``target="openvino"`` does.

Both files are of one model with int8 weights and ``activation_ranges="dynamic"``, and take turns with its float32 file
in OpenVINO, one thread. Weights are random, since they do not change the time. Needs the extras ``onnx`` and
``openvino``, and transformers.

    python benchmarks/openvino_dynamic.py --output benchmarks/openvino_dynamic_cpu_2026-12-01.md
"""

import argparse
import copy
import platform
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import openvino
import torch
import transformers
from quiet import prepare, vnni
from torch import Tensor, nn

from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.export.runtimes import load_runtime
from lightning_optim.measure.latency import time_in_turns

ROWS, TOKENS = (1, 32), 32


class Encoder(nn.Module):
    """A BERT of 4 blocks of 256."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=3000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        )
        self.bert = transformers.BertModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).pooler_output


def chain(width: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())))


MODELS: dict[str, tuple[Any, Any]] = {
    "4 matrices of 256": (partial(chain, 256), lambda rows: torch.randn(rows, 256)),
    "4 matrices of 1024": (partial(chain, 1024), lambda rows: torch.randn(rows, 1024)),
    "BERT, 4 x 256, 32 tokens": (Encoder, lambda rows: torch.randint(0, 3000, (rows, TOKENS))),
}


def measured(make: Any, inputs: Any, folder: Path) -> list[str]:
    """Return the times of both files over that of the float32 file, at each number of rows."""
    torch.manual_seed(0)
    model = make().eval()
    plain = folder / "float.onnx"
    export_onnx(model, plain, inputs(2), verify=False)
    rounded = quantize_post_training(copy.deepcopy(model), [inputs(8)], activation_ranges="dynamic", progress_bar=False)
    cells = []
    for target in ("onnxruntime", "openvino"):
        path = folder / f"{target}.onnx"
        export_onnx(rounded, path, inputs(2), target=target, keep_float="none", verify=False)
        engines = [load_runtime(each, "openvino") for each in (path, plain)]
        for rows in ROWS:
            calls = [partial(engine.run, [inputs(rows)]) for engine in engines]
            found = time_in_turns(calls, engines[0].clock, seconds=2.0, least=50, most=2000)
            cells.append(f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    prepare(threads=1)
    lines = [
        "# Ranges of each call in OpenVINO",
        "",
        f"{date.today()}, {platform.machine()}, one thread; torch {torch.__version__}, openvino "
        f"{openvino.__version__.split('-')[0]}; the processor has {vnni()}.",
        f"`python benchmarks/openvino_dynamic.py --output {output}`",
        "",
        "Time of a call over that of the float32 file, in turns [lowest and highest of the rounds]; 8-bit weights.",
        "",
        "| | inputs rounded, 1 row | 32 rows | inputs float, 1 row | 32 rows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (make, inputs) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| {name} | {' | '.join(measured(make, inputs, Path(folder)))} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
