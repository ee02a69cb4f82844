"""``lightning-optim compare``: checkpoints side by side, as they are deployed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_optim.checks import check_folder
from lightning_optim.cli.building import load
from lightning_optim.cli.command import Command, UserError, console, said_plainly
from lightning_optim.cli.loading import (
    PREPARE_HELP,
    Objects,
    dims,
    model_and_data,
    objects_parser,
    prepared,
    quiet_trainer,
)
from lightning_optim.report import compare

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Compare, print and write."""
    parser = objects_parser(
        "compare",
        "Compare the models of checkpoints with the first one: size, operations, latency in each engine, accuracy on "
        "the validation (or test) data, the score P.",
        example="large=large.ckpt small=small.ckpt --config small.yaml --accuracy val_acc --report report",
    )
    parser.add_argument("checkpoints", nargs="+", metavar="[NAME=]CHECKPOINT", help="the first is the reference")
    parser.add_argument(
        "--accuracy", metavar="METRIC", help="name of a logged metric in [0, 1]; without it there is no P"
    )
    parser.add_argument("--on", choices=("validate", "test"), default="validate", help="which data it is logged on")
    parser.add_argument(
        "--samples", type=int, help="samples behind the accuracy; then the report says which are not told apart"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="rows of the larger call; 0 keeps inputs as they are"
    )
    parser.add_argument(
        "--engines", nargs="+", help="any of torch, onnxruntime, openvino; default all that are installed"
    )
    parser.add_argument("--size", default="parameters", help="S in P: parameters, nonzero or bits")
    parser.add_argument("--dynamic_dims", type=dims, metavar="YAML", help="free dimensions: '{text: {1: \"length\"}}'")
    parser.add_argument("--prepare", metavar="FUNCTION", help=PREPARE_HELP)
    parser.add_argument("--report", metavar="DIR", help="write report.html, report.md and report.json there")
    given, others = parser.parse_known_args(arguments)
    objects = model_and_data("compare", others)
    with said_plainly():
        if given.report is not None:
            check_folder("--report", given.report)
        if given.samples is not None and given.accuracy is None:
            raise UserError("--samples is the number behind --accuracy, which is not given. Give both, or neither.")
        files = _named(given.checkpoints)
        models = {name: load(objects.words, path) for name, path in files.items()}
    found = [_metrics(model, objects, given.on, given.accuracy) for model in models.values()] if given.accuracy else []
    with said_plainly():
        deployed = {name: prepared(objects, model, given.prepare) for name, model in models.items()}
        in_turn = iter(found)  # `compare` asks for each model once, the first one first
        report = compare(
            {name: module for name, (module, _) in deployed.items()},
            next(iter(deployed.values()))[1],
            evaluate=(lambda module: next(in_turn)) if found else None,
            accuracy=given.accuracy or "accuracy",
            batch_size=given.batch_size or None,
            engines=given.engines,
            size=given.size,
            samples=given.samples,
            export={"dynamic_dims": given.dynamic_dims} if given.dynamic_dims else None,
        )
        shown = console()
        shown.print(report)
        if given.report is not None:
            shown.print(f"report: {report.write(given.report)}", highlight=False, markup=False)
    return 0


def _named(given: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for each in given:
        name, separator, path = each.partition("=")
        if not separator or Path(each).exists():  # Lightning's own file names have "=" in them
            name, path = Path(each).stem, each
        if not name:
            raise UserError(f"{each!r} has no name before `=`. Remove `=`, or write NAME={path}.")
        if name in files:
            raise UserError(f"two checkpoints are called {name!r}. Name them: first=a.ckpt second=b.ckpt.")
        files[name] = Path(path)
    return files


def _metrics(model: Any, objects: Objects, on: str, accuracy: str) -> Mapping[str, float]:
    """Return what the model's own validation or test step logs on the data."""
    if objects.data is None:
        raise UserError("--accuracy needs data: give --data, or a --config with `data`.")
    (logged,) = getattr(quiet_trainer(), on)(model, datamodule=objects.data, verbose=False)
    if accuracy not in logged:
        raise UserError(f"--accuracy {accuracy}: {on} logged {', '.join(sorted(logged)) or 'nothing'}.")
    return {accuracy: float(logged[accuracy])}


COMMAND = Command("compare", "measure checkpoints side by side, as they are deployed", run)
