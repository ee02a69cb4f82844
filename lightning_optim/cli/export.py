"""``lightning-optim export``: a checkpoint's model as a verified ONNX file, or as a Hugging Face folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_optim import checkpoint
from lightning_optim.cli.building import load
from lightning_optim.cli.command import Command, UserError, said_plainly
from lightning_optim.cli.loading import PREPARE_HELP, Objects, dims, model_and_data, objects_parser, prepared
from lightning_optim.export import ExportReport, PretrainedReport, export_onnx, export_pretrained

__all__ = ["COMMAND"]

ONNX_ONLY = ("runtime", "dynamic_dims", "prepare")
PRETRAINED_ONLY = ("tokenizer", "quantization", "module")


def run(arguments: Sequence[str]) -> int:
    """Export, verify and report."""
    parser = objects_parser(
        "export",
        "Write the model of a checkpoint as an ONNX file (int8 where it was quantized) after verifying its outputs in "
        "the engine, or as a Hugging Face folder. From a checkpoint with distillation, the student is exported.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="compressed or not")
    parser.add_argument(
        "file", metavar="FILE", help="the ONNX file or the folder to write; an existing one is replaced"
    )
    parser.add_argument(
        "--format",
        default="onnx",
        choices=("onnx", "pretrained"),
        help="onnx, or pretrained: a folder that from_pretrained reads, of a model of transformers",
    )
    parser.add_argument("--runtime", help="onnxruntime (default) or openvino: the engine that verifies the ONNX file")
    parser.add_argument("--dynamic_dims", type=dims, metavar="YAML", help="free dimensions: '{text: {1: \"length\"}}'")
    parser.add_argument("--prepare", metavar="FUNCTION", help=PREPARE_HELP)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="pretrained: folder whose tokenizer files come along")
    parser.add_argument("--quantization", choices=("gptq",), help="pretrained: 4-bit groups packed in the GPTQ layout")
    parser.add_argument(
        "--module", metavar="NAME", help="pretrained: dotted name of the model, where there are several"
    )
    given, others = parser.parse_known_args(arguments)
    _check(given)
    objects = model_and_data("export", others)
    with said_plainly():
        write = _write_folder if given.format == "pretrained" else _write_file
        report = write(objects, given)
    sys.stdout.write(f"{report}\n")
    return 0


def _check(given: argparse.Namespace) -> None:
    others = ONNX_ONLY if given.format == "pretrained" else PRETRAINED_ONLY
    wrong = [f"--{name}" for name in others if getattr(given, name) is not None]
    if wrong:
        raise UserError(f"{', '.join(wrong)} has no meaning with --format {given.format}.")
    if given.format == "onnx" and Path(given.file).is_dir():
        raise UserError(f"{given.file!r} is a folder. Give the name of the ONNX file to write, or --format pretrained.")


def _write_folder(objects: Objects, given: argparse.Namespace) -> PretrainedReport:
    model = load(objects.words, given.checkpoint)
    return export_pretrained(
        model, given.file, tokenizer=given.tokenizer, quantization=given.quantization, module=given.module
    )


def _write_file(objects: Objects, given: argparse.Namespace) -> ExportReport:
    model = load(objects.words, given.checkpoint)
    deployed, inputs = prepared(objects, model, given.prepare)
    plan = checkpoint.read_checkpoint(given.checkpoint).get(checkpoint.KEY, checkpoint.EMPTY)
    return export_onnx(
        deployed,
        given.file,
        inputs,
        runtime=given.runtime or "onnxruntime",
        dynamic_dims=given.dynamic_dims,
        metric=plan.get("provenance", {}).get("metrics"),
    )


COMMAND = Command("export", "write a checkpoint's model as a verified ONNX file or as a Hugging Face folder", run)
