"""``lightning-optim show``: the contents and provenance of a checkpoint."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_optim import checkpoint
from lightning_optim.cli.command import Command, command_parser, console, said_plainly
from lightning_optim.distillation.student import KEY as DISTILLATION

__all__ = ["COMMAND"]

Pairs = Iterable[tuple[str, Any]]


def run(arguments: Sequence[str]) -> int:
    """Print the plan and provenance of a file, without importing any class it names."""
    parser = command_parser(
        "show", "Print the provenance of a checkpoint and the changes of its model.", example="small.ckpt"
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint of a Lightning Trainer")
    given = parser.parse_args(arguments)
    with said_plainly():
        file = checkpoint.read_checkpoint(given.file)
        checkpoint.check_version(file.get(checkpoint.KEY, checkpoint.EMPTY))
    shown = console()
    for title, pairs in _parts(file, Path(given.file)):
        _print(shown, title, list(pairs))
    return 0


def _parts(file: Mapping[str, Any], path: Path) -> Iterable[tuple[str, Pairs]]:
    plan = file.get(checkpoint.KEY, checkpoint.EMPTY)
    about = plan.get("provenance", {})
    yield str(path), _facts(file, path, about)
    words = about.get("recipe") or file.get(DISTILLATION, {}).get("recipe") or {}
    for recipe in words if isinstance(words, list) else [words]:
        yield "recipe", recipe.items()
    for entry in plan.get("entries", {}).values():
        yield entry.get("technique", "technique"), ((key, value) for key, value in entry.items() if key != "technique")
    yield _distilled(file.get(DISTILLATION, {}))
    yield "layers", _layers(plan.get("modules", {}))
    yield "metrics when it was written", ((name, f"{value:.6g}") for name, value in about.get("metrics", {}).items())
    yield "versions", about.get("versions", {}).items()


def _distilled(state: Mapping[str, Any]) -> tuple[str, Pairs]:
    """Describe the distillation and its number of batches; files of 0.1 do not hold the number."""
    batches = state.get("batches")
    title = "distillation" if batches != 0 else "distillation: requested, but no batch was distilled"
    counted = {"batches taught": batches} if batches else {}
    return title, [*state.get("asked", {}).items(), *counted.items()]


def _facts(file: Mapping[str, Any], path: Path, about: Mapping[str, Any]) -> Pairs:
    tensors = [value for value in file["state_dict"].values() if isinstance(value, Tensor)]
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors)
    numbers = sum(tensor.numel() for tensor in tensors)
    yield "model", about.get("model", "- (the file was written without lightning_optim)")
    if "student" in about:
        yield "student", about["student"]
    if "data" in about:
        yield "data", ", ".join(_said(name, value) for name, value in about["data"].items())
    yield "epoch, step", f"{file.get('epoch', '-')}, {file.get('global_step', '-')}"
    yield "file", f"{path.stat().st_size:,} bytes"
    yield "weights and buffers", f"{numbers:,} numbers, {zeros / max(numbers, 1):.1%} of them zero"
    student = file.get(DISTILLATION, {}).get("student", {}).get("keys", {})
    yield "arguments", file.get("hyper_parameters") or student.get("hyper_parameters") or "-"
    if "run" in about:
        yield "run", ", ".join(_said(name, value) for name, value in about["run"].items() if value not in (None, -1))


def _said(name: str, value: Any) -> str:
    return str(value) if name in ("name", "strategy") else f"{value} {name.replace('_', ' ')}"


def _layers(modules: Mapping[str, Any]) -> Pairs:
    """Group the layers that differ from the user's class by their present class."""
    kinds = Counter(layer["class"].rpartition(".")[2] for layer in modules.values())
    yield from ((kind, f"{count} layers with another class, shape or buffers") for kind, count in kinds.items())


def _print(shown: Console, title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    if not pairs:
        return
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(_text(value)))
    shown.print(table, highlight=False)
    shown.print()


def _text(value: Any) -> str:
    """Format a value in one line; many layers are given as their number."""
    if isinstance(value, Mapping) and len(value) > 6:
        return f"{len(value)} layers"
    if isinstance(value, (Mapping, list, tuple)):
        return str(yaml.safe_dump(_listed(value), default_flow_style=True, sort_keys=False, width=10_000)).strip()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _listed(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


COMMAND = Command("show", "print the contents and provenance of a checkpoint, with targets and achieved values", run)
