"""LightningModules that others wrote, unmodified, through every technique: each package in an environment of its own.

Makes the environments, runs a worker in each, one after the other, and writes the result file and the table of
docs/support.md. A cell says what ``tests/integration/zoo.py`` says of ours: train, resume bit for bit, reload, export.
Packages whose modules need torchvision are left out: its wheel on PyPI needs a torch with CUDA.

    python benchmarks/modules/run.py --output benchmarks/modules/modules_cpu_2026-11-30.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "peers"))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "integration"))

from environments import Environment, NotInstalled, default_folder
from zoo import put_on_page, table

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"
COLUMNS = ("alone", "zeros", "channels", "8 bits", "a teacher", "all of it")


@dataclass(frozen=True)
class Package:
    """A package, and the script that makes its modules.

    Attributes:
        requirement: One version, so that pip takes no older one to please a constraint.
        script: Beside this file.
    """

    requirement: str
    script: str

    @property
    def distribution(self) -> str:
        return self.requirement.partition("==")[0]

    @property
    def environment(self) -> Environment:
        # A dependency's source distribution does not build everywhere.
        return Environment(self.distribution, (self.requirement,), options=("--only-binary", ":all:"))


PACKAGES = {
    "pytorch-forecasting": Package("pytorch-forecasting==1.8.0", "of_pytorch_forecasting"),
    "neuralforecast": Package("neuralforecast==3.3.0", "of_neuralforecast"),
    "darts": Package("u8darts==0.41.0", "of_darts"),
    "chemprop": Package("chemprop==2.3.1", "of_chemprop"),
}
Found = dict[str, dict[str, Any]]


def collect(args: argparse.Namespace, names: list[str]) -> Found:
    """Run the workers, and return by package what they found, or why they did not."""
    found: Found = {}
    for name in names:
        package = PACKAGES[name]
        print(f"{name}: environment {package.distribution}", flush=True)
        try:
            python = package.environment.make(args.environments)
        except NotInstalled as reason:
            found[name] = {"failed": f"not installed: {reason}"}
            continue
        place = args.folder / name
        place.mkdir(parents=True, exist_ok=True)
        command = [str(python), str(HERE / "worker.py"), "--cases", package.script]
        command += ["--distribution", package.distribution, "--folder", str(place)]
        command += ["--keep"] if args.keep else []
        log_file = place / "worker.log"
        with log_file.open("w") as log:
            surroundings = package.environment.surroundings(args.environments)
            done = subprocess.run(command, env=surroundings, stdout=log, stderr=log, check=False)
        if done.returncode:
            found[name] = {"failed": f"the worker stopped: {log_file.read_text().splitlines()[-1][:200]}"}
            continue
        found[name] = json.loads((place / "found.json").read_text())
        found[name]["refused"] = package.environment.refused(args.environments)
    return found


def cells(found: Found) -> dict[tuple[str, str], str]:
    """Return every cell by row and column."""
    return {
        (f"{model} ({package})", column): outcome
        for package, each in found.items()
        for model, outcomes in each.get("models", {}).items()
        for column, outcome in outcomes.items()
    }


def modules_table(found: Found) -> str:
    every = cells(found)
    return table(every, dict.fromkeys(row for row, _ in every), COLUMNS)


def versions(found: Found) -> str:
    """Return what was installed; a version that differs between environments names its package."""
    by_name: dict[str, dict[str, str]] = {}
    for package, each in found.items():
        for name, version in each.get("versions", {}).items():
            by_name.setdefault(name, {})[package] = version
    texts = []
    for name, known in by_name.items():
        different = set(known.values())
        if len(different) == 1:
            texts.append(f"{name} {different.pop()}")
        else:
            texts.append(f"{name} {', '.join(f'{version} ({package})' for package, version in known.items())}")
    return "; ".join(texts)


def document(args: argparse.Namespace, found: Found) -> str:
    every = cells(found)
    counted = {column: sum(every[row, column] == "yes" for row, of in every if of == column) for column in COLUMNS}
    rows = len({row for row, _ in every})
    lines = [
        "# Modules that others wrote\n",
        f"2026-11-30, {platform.machine()}, {count(os.cpu_count())}, one thread; {versions(found)}; each package in an "
        "environment of its own.\n"
        f"`python benchmarks/modules/run.py --output benchmarks/modules/{args.output.name}`\n",
        "Each module is unmodified, small, and made, fed and trained as the documentation of its package does, three "
        "epochs of four steps. A row takes each technique with the recipe of the architectures in docs/support.md, "
        'distillation by the mean squared error. "Yes": the run resumes from its first epoch\'s file bit for bit, its '
        "file loads into a fresh module (and by its class, where the class loads its own files), and the ONNX file "
        'gives the module\'s numbers. "Alone" is the module without a technique, resumed and exported: what it cannot '
        "do so is not asked of it with one. Files are read with `weights_only=False`: these modules write objects of "
        "their packages into them.\n",
        f"Of {rows} modules: {', '.join(f'{column} {counted[column]}' for column in COLUMNS)}.\n",
        modules_table(found),
    ]
    for package, each in found.items():
        if "failed" in each:
            lines.append(f"\n{package} has no rows: {each['failed']}.")
        if each.get("refused"):
            lines.append(f"\npip took not all constraints for {package}: `{each['refused'][0]}`.")
    return "\n".join(lines) + "\n"


def count(cores: int | None) -> str:
    return {1: "one CPU core", 2: "two CPU cores"}.get(cores or 0, f"{cores} CPU cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="all", help=f"'all', or some of {', '.join(PACKAGES)} with commas")
    parser.add_argument("--environments", type=Path, default=default_folder(), metavar="DIR")
    parser.add_argument("--folder", type=Path, help="for files, logs and tracebacks; default beside the environments")
    parser.add_argument("--keep", action="store_true", help="take what was found earlier in that folder")
    parser.add_argument("--output", type=Path, help="the Markdown file to write; without it the page stays too")
    args = parser.parse_args()
    names = list(PACKAGES) if args.packages == "all" else args.packages.split(",")
    unknown = set(names) - set(PACKAGES)
    if unknown:
        parser.error(f"unknown packages {', '.join(sorted(unknown))}; known: {', '.join(PACKAGES)}")
    args.environments = args.environments.absolute()
    args.folder = (args.folder or args.environments / "modules").absolute()
    found = collect(args, names)
    print(modules_table(found))
    if args.output:
        args.output.write_text(document(args, found), encoding="utf-8")
        put_on_page(modules_table(found), BEGIN, END)


if __name__ == "__main__":
    main()
