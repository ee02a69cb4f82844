"""A fine-tuned language model's files with rounded weights, ours and ONNX Runtime's own: bytes, perplexity, time.

The model is a Hugging Face folder (`--model`); the messages are Banking77's (`--data`, no labels used). All files are
made of one float32 file's model: ours by ``quantize_post_training`` and ``export_onnx``, and after 100 steps of
quantization-aware training; ONNX Runtime's by ``MatMulNBitsQuantizer`` and ``quantize_dynamic`` from the float32 file.
Perplexity is that of the file, in ONNX Runtime; times are those of calls in turns with the float32 file, one thread: a
text of 32 tokens, and one token (the files have no key/value cache).

    python benchmarks/language_model_files.py --model FOLDER --data ../shared/data/banking77 --output FILE
"""

import copy
import logging
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import torch
import torch.nn.functional as F
from language_model import Texts, loss_of, parser_of, read, versions
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

from lightning_optim import QuantizationAwareTraining, export_onnx, quantize_post_training
from lightning_optim.export.runtimes import Runtime, load_runtime
from lightning_optim.measure.latency import time_in_turns

EIGHT = {"weight_bits": 8, "activation_bits": None, "include": [nn.Embedding, nn.Linear]}
GROUPS = {**EIGHT, "weight_bits": 4, "weight_granularity": "per_group:32"}
WIDE_ENDS = {"bits": {"*embed_tokens": 8, "*lm_head": 8}}
TOKENS = (32, 1)
ENGINES = ("onnxruntime", "openvino")
STEPS, RATE = 100, 1e-4


class Trained(pl.LightningModule):
    """The language model with the loss of its messages."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.01)


def trained(model: nn.Module, training: Texts, size: int, callbacks: list[pl.Callback]) -> nn.Module:
    """Return a copy that was trained on."""
    module = Trained(copy.deepcopy(model).train())
    stream = training.batches(size)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        callbacks=callbacks,
    )
    trainer.fit(module, [next(stream) for _ in range(STEPS)])
    return module.net.eval()


def export(model: nn.Module, path: Path, example: dict[str, Tensor]) -> None:
    dims = {name: {1: "tokens"} for name in example}
    export_onnx(model, path, example, dynamic_dims=dims, least_agreement=0.0)


def packed(plain: Path, path: Path) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(plain), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)


def dynamic(plain: Path, path: Path) -> None:
    quantize_dynamic(str(plain), str(path), per_channel=True, weight_type=QuantType.QInt8)


def perplexity(runtime: Runtime, texts: Texts) -> float:
    total, tokens = 0.0, 0
    for ids in texts.ids:
        logits = runtime.run(feed(ids))[0][0]
        total += float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def feed(ids: list[int]) -> list[Tensor]:
    row = torch.tensor([ids])
    return [row, torch.ones_like(row)]


def measured(path: Path, plain: Path, held_out: Texts) -> list[str]:
    """Return the cells of a file."""
    text = [token for ids in held_out.ids for token in ids]
    cells = [f"{sum(each.stat().st_size for each in path.parent.glob(path.name + '*')) / 1e6:.1f}"]
    for engine in ENGINES:
        runtimes = [load_runtime(each, engine) for each in (path, plain)]
        if engine == "onnxruntime":
            cells.append(f"{perplexity(runtimes[0], held_out):.2f}")
        for tokens in TOKENS:
            calls = [partial(each.run, feed(text[:tokens])) for each in runtimes]
            found = time_in_turns(calls, runtimes[0].clock, seconds=6.0, least=30, most=100)
            cells.append(f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]")
    return cells


def main() -> None:
    """Make every file, measure it and write the result file."""
    parser = parser_of(__doc__, batch=16)
    parser.add_argument("--batches", type=int, default=4, help="batches of training that are read after training")
    arguments = parser.parse_args()
    model, training, held_out = read(arguments)
    logging.disable(logging.WARNING)
    model.eval()
    stream = training.batches(arguments.batch)
    calibration = [{k: v for k, v in next(stream).items() if k != "labels"} for _ in range(arguments.batches)]
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    lines = [
        "# Files of a language model with rounded weights",
        "",
        f"{versions()} onnxruntime, openvino: as in constraints.txt.",
        f"`python benchmarks/language_model_files.py --model FOLDER --data DATA --batch {arguments.batch} --batches "
        f"{arguments.batches} --test {arguments.test} --output FILE`",
        "",
        f"{arguments.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters, fine-tuned before. gptq "
        f"reads {arguments.batch * arguments.batches} messages of training. Perplexity of {arguments.test} held-out "
        "messages of Banking77, of the file. Time of a call relative to the float32 file, in turns, one thread [lowest "
        f"and highest of the rounds]. Training: {STEPS} steps of {arguments.batch} messages, AdamW, {RATE:g}.",
        "",
        "| file | MB | perplexity | ONNX Runtime, 32 tokens | 1 token | OpenVINO, 32 tokens | 1 token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def write(name: str, make: Callable[[Path], object], folder: Path, plain: Path) -> None:
        path = folder / "measured.onnx"
        for old in folder.glob(f"{path.name}*"):
            old.unlink()
        try:
            make(path)
            cells = measured(path, plain, held_out)
        except Exception as error:  # noqa: BLE001 - what cannot be made or run is a result
            cells = [f"cannot: `{' '.join(str(error).split())[:150]}`"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def rounded(options: dict[str, Any]) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            net = quantize_post_training(copy.deepcopy(model), calibration, progress_bar=False, **options)
            export(net, path, example)

        return make

    def aware(options: dict[str, Any] | None) -> Callable[[Path], object]:
        callbacks = [] if options is None else [QuantizationAwareTraining(start=0.0, **options)]
        return lambda path: export(trained(model, training, arguments.batch, callbacks), path, example)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / "float.onnx"
        export(model, plain, example)
        rows: dict[str, Callable[[Path], object]] = {
            "float32": partial(export, model, example=example),
            "ours, 8-bit weights": rounded(EIGHT),
            "ours, 4-bit groups of 32": rounded(GROUPS),
            "ours, the same with table and head in 8 bits": rounded({**GROUPS, **WIDE_ENDS}),
            "ours, the same, gptq": rounded({**GROUPS, **WIDE_ENDS, "method": "gptq"}),
            "MatMulNBitsQuantizer, 4 bits, blocks of 32": partial(packed, plain),
            "quantize_dynamic, int8 per channel": partial(dynamic, plain),
            f"float32, {STEPS} steps more": aware(None),
            f"ours, 4-bit groups of 32, {STEPS} steps of QAT": aware(GROUPS),
            f"ours, table and head in 8 bits, {STEPS} steps of QAT": aware({**GROUPS, **WIDE_ENDS}),
        }
        for row, make in rows.items():
            write(row, make, folder, plain)


if __name__ == "__main__":
    main()
