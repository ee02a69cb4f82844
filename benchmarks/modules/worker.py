"""Runs in the environment of a package: every module of it through every technique."""

import argparse
import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from case import outcomes
from zoo import quiet

COMMON = ("torch", "lightning", "pytorch-lightning", "torch-pruning", "onnx", "onnxruntime", "numpy", "pandas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", required=True, help="the script that holds CASES")
    parser.add_argument("--distribution", required=True, help="whose version is told")
    parser.add_argument("--models", help="some of its models, with commas; default all")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="take what was found earlier in that folder")
    args = parser.parse_args()
    cases = importlib.import_module(args.cases).CASES
    quiet()
    found = {}
    for name in args.models.split(",") if args.models else cases:
        place = args.folder / name
        place.mkdir(parents=True, exist_ok=True)
        found[name] = outcomes(cases[name], place, keep=args.keep)
        print(name, json.dumps(found[name], indent=1), flush=True)
    versions = {name: version(name) for name in (args.distribution, *COMMON)}
    (args.folder / "found.json").write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    main()
