"""``lightning-optim export``: a checkpoint's model as a verified ONNX file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_optim import checkpoint
from lightning_optim.cli.building import load
from lightning_optim.cli.command import Command, UserError, said_plainly
from lightning_optim.cli.loading import PREPARE_HELP, dims, model_and_data, objects_parser, prepared
from lightning_optim.export import export_onnx

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Export, verify and report."""
    parser = objects_parser(
        "export",
        "Write the model of a checkpoint as an ONNX file (int8 where it was quantized) once it has given the model's "
        "answers in the engine. Of a distillation's checkpoint the student is exported.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="compressed or not")
    parser.add_argument("file", metavar="FILE", help="the ONNX file to write; one that exists is replaced")
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime or openvino: where it is verified")
    parser.add_argument("--dynamic_dims", type=dims, metavar="YAML", help="free dimensions: '{text: {1: \"length\"}}'")
    parser.add_argument("--prepare", metavar="FUNCTION", help=PREPARE_HELP)
    given, others = parser.parse_known_args(arguments)
    objects = model_and_data("export", others)
    if Path(given.file).is_dir():
        raise UserError(f"{given.file!r} is a folder. Give the name of the ONNX file to write.")
    with said_plainly():
        model = load(objects.words, given.checkpoint)
        deployed, inputs = prepared(objects, model, given.prepare)
        plan = checkpoint.read_checkpoint(given.checkpoint).get(checkpoint.KEY, checkpoint.EMPTY)
        report = export_onnx(
            deployed,
            given.file,
            inputs,
            runtime=given.runtime,
            dynamic_dims=given.dynamic_dims,
            metric=plan.get("provenance", {}).get("metrics"),
        )
    sys.stdout.write(f"{report}\n")
    return 0


COMMAND = Command("export", "write a checkpoint's model as a verified ONNX file, int8 where it was quantized", run)
