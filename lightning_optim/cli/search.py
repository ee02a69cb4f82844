"""``lightning-optim search``: the best recipe for the model, data and Trainer of a configuration."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_optim.checks import check_folder
from lightning_optim.cli.command import Command, UserError, command_parser, console, need_jsonargparse, said_plainly

__all__ = ["COMMAND"]

OBJECTIVES = ("accuracy", "bits")


def run(arguments: Sequence[str]) -> int:
    """Search, print the front, and write the report and the best recipe."""
    parser = command_parser(
        "search",
        "Search for the recipe with the best trade-off, by Optuna. Model, data, Trainer, seed and teacher are those of "
        "a configuration: --config FILE as `fit` takes it (its recipe is not used).",
        example="--config run.yaml --space space.yaml --trials 40 --accuracy val_acc --storage sqlite:///study.db",
        allow_abbrev=False,
    )
    parser.add_argument("--space", required=True, metavar="FILE", help="a recipe with open arguments, in YAML")
    parser.add_argument("--trials", type=int, default=20, help="trials that the study is to have; default %(default)s")
    parser.add_argument("--storage", metavar="URL", help="such as sqlite:///study.db; default in memory")
    parser.add_argument("--name", help="of the study; default search")
    parser.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), help="columns of `compare`; default accuracy bits"
    )
    parser.add_argument("--budget", type=_mapping, metavar="YAML", help="bounds: '{latency: 0.5, accuracy: \">=0.9\"}'")
    parser.add_argument("--noise", type=_mapping, metavar="YAML", help="what counts as equal: '{accuracy: 0.005}'")
    parser.add_argument(
        "--accuracy", required=True, metavar="METRIC", help="name of the logged metric that is the accuracy"
    )
    parser.add_argument("--on", choices=("validate", "test"), default="validate", help="which data it is logged on")
    parser.add_argument("--engines", nargs="+", help="any of torch, onnxruntime, openvino; the first one's times count")
    parser.add_argument("--n_startup", type=int, default=5, help="random proposals; default %(default)s")
    parser.add_argument("--no_early_stops", action="store_true", help="let hopeless trials run to their end")
    parser.add_argument("--report", metavar="DIR", help="write report.html, report.md, report.json and best.yaml there")
    given, others = parser.parse_known_args(arguments)
    need_jsonargparse()
    from lightning_optim.cli.searched import Searched

    with said_plainly():
        if given.report is not None:
            check_folder("--report", given.report)
        if not Path(given.space).is_file():
            raise UserError(f"there is no space file {given.space!r} (--space).")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    searched = Searched(others)
    with said_plainly():
        found = searched.search(
            on=given.on,
            metric=given.accuracy,
            space=given.space,
            trials=given.trials,
            storage=given.storage,
            name=given.name,
            objectives=given.objectives,
            budget=given.budget,
            noise=given.noise,
            n_startup=given.n_startup,
            stop_early=not given.no_early_stops,
            comparison={"engines": given.engines} if given.engines else None,
        )
        shown = console()
        shown.print(found)
        chosen = found.chosen()
        if chosen is not None and not chosen.dense:
            shown.print(f"The recipe of {chosen.label}:")
            sys.stdout.write(chosen.recipe.to_yaml())
        if given.report is not None:
            shown.print(f"report: {found.write(given.report)}", highlight=False, markup=False)
    return 0


def _mapping(text: str) -> Mapping[str, Any]:
    import argparse

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{accuracy: 0.9}}', got {text!r}")
    return found


COMMAND = Command("search", "find the recipe with the best trade-off for a model, by Optuna", run)
