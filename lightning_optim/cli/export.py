"""``lightning-optim export``: a checkpoint's model as a verified ONNX file, a Hugging Face folder, or its weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim import checkpoint
from lightning_optim.cli.building import load
from lightning_optim.cli.command import Command, UserError, said_plainly
from lightning_optim.cli.loading import PREPARE_HELP, Objects, dims, model_and_data, objects_parser, prepared
from lightning_optim.export import (
    ExportReport,
    PretrainedReport,
    SafetensorsReport,
    export_onnx,
    export_pretrained,
    export_safetensors,
)
from lightning_optim.export.mixed import KEEP_FLOAT
from lightning_optim.export.targets import TARGETS

__all__ = ["COMMAND"]

FORMATS: dict[str, tuple[str, ...]] = {
    "onnx": ("target", "runtime", "dynamic_dims", "prepare", "keep_float", "batch_sizes"),
    "pretrained": ("tokenizer", "quantization", "module"),
    "safetensors": (),
}
"""Format -> the options that it alone has."""


def run(arguments: Sequence[str]) -> int:
    """Export, verify and report."""
    parser = objects_parser(
        "export",
        "Write the model of a checkpoint as an ONNX file (int8 where it was quantized) after verifying its outputs in "
        "the engine, as a Hugging Face folder, or its weights as a safetensors file. From a checkpoint with "
        "distillation, the student is exported.",
        example="small.ckpt small.onnx --config small.yaml",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="compressed or not")
    parser.add_argument("file", metavar="FILE", help="the file or the folder to write; an existing one is replaced")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="onnx (default); pretrained: a folder that from_pretrained reads, of a model of transformers; or "
        "safetensors (default for a FILE of that ending): the weights alone",
    )
    parser.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="the engine that the ONNX file is for: onnxruntime (default), openvino or tensorrt (of a model quantized "
        "with symmetric activations)",
    )
    parser.add_argument(
        "--runtime",
        help="onnxruntime or openvino: the engine that verifies the ONNX file (default: the target, or onnxruntime)",
    )
    parser.add_argument("--dynamic_dims", type=dims, metavar="YAML", help="free dimensions: '{text: {1: \"length\"}}'")
    parser.add_argument(
        "--keep_float",
        choices=KEEP_FLOAT,
        help="quantized layers that the ONNX file computes in float: small ones (default), none, or auto: the fastest "
        "mix measured in the engine",
    )
    parser.add_argument(
        "--batch_sizes", type=_sizes, metavar="N,N", help="rows of the calls that --keep_float auto measures"
    )
    parser.add_argument("--prepare", metavar="FUNCTION", help=PREPARE_HELP)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="pretrained: folder whose tokenizer files come along")
    parser.add_argument("--quantization", choices=("gptq",), help="pretrained: 4-bit groups packed in the GPTQ layout")
    parser.add_argument(
        "--module", metavar="NAME", help="pretrained: dotted name of the model, where there are several"
    )
    given, others = parser.parse_known_args(arguments)
    if given.format is None:
        given.format = "safetensors" if given.file.endswith(".safetensors") else "onnx"
    _check(given)
    objects = model_and_data("export", others)
    with said_plainly():
        write = {"onnx": _write_file, "pretrained": _write_folder, "safetensors": _write_weights}[given.format]
        report = write(objects, given)
    sys.stdout.write(f"{report}\n")
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,32, got {text!r}")
    return sizes


def _check(given: argparse.Namespace) -> None:
    others = [name for kind, names in FORMATS.items() if kind != given.format for name in names]
    wrong = [f"--{name}" for name in others if getattr(given, name) is not None]
    if wrong:
        raise UserError(f"{', '.join(wrong)} has no meaning with --format {given.format}.")
    if given.format != "pretrained" and Path(given.file).is_dir():
        raise UserError(
            f"{given.file!r} is a folder. Give the name of the {given.format} file to write, or --format pretrained."
        )


def _write_folder(objects: Objects, given: argparse.Namespace) -> PretrainedReport:
    model = load(objects.words, given.checkpoint)
    return export_pretrained(
        model, given.file, tokenizer=given.tokenizer, quantization=given.quantization, module=given.module
    )


def _write_weights(objects: Objects, given: argparse.Namespace) -> SafetensorsReport:
    told = _plan(given).get("provenance")  # a file of Lightning alone holds none
    metadata = None if told is None else {"lightning_optim": json.dumps(told)}
    return export_safetensors(load(objects.words, given.checkpoint), given.file, metadata=metadata)


def _plan(given: argparse.Namespace) -> dict[str, Any]:
    """Return the plan that the checkpoint holds."""
    plan: dict[str, Any] = checkpoint.read_checkpoint(given.checkpoint).get(checkpoint.KEY, checkpoint.EMPTY)
    return plan


def _write_file(objects: Objects, given: argparse.Namespace) -> ExportReport:
    model = load(objects.words, given.checkpoint)
    deployed, inputs = prepared(objects, model, given.prepare)
    return export_onnx(
        deployed,
        given.file,
        inputs,
        target=given.target or "onnxruntime",
        runtime=given.runtime,
        dynamic_dims=given.dynamic_dims,
        keep_float=given.keep_float or "small",
        batch_sizes=given.batch_sizes,
        metric=_plan(given).get("provenance", {}).get("metrics"),
    )


COMMAND = Command("export", "write a checkpoint's model: a verified ONNX file, a Hugging Face folder, safetensors", run)
