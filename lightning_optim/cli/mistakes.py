"""Turns error messages of jsonargparse and Lightning about a command's arguments into one sentence."""

import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lightning_optim.cli.command import UserError
from lightning_optim.strategies.presets import PRESETS

__all__ = ["check_strategy", "parse_mistake"]


def parse_mistake(message: str, command: str) -> str:
    """Return one sentence for an error of jsonargparse about arguments or a configuration file.

    Args:
        message: Its message, up to a dozen lines.
        command: The command, for the hint.
    """
    key, given = _first(r'Parser key "([^"]+)"', message), _first(r"Given value: (.*)", message)
    missing = _first(r"File does not exist: '?([^'\n]+)'?", message) or _first(
        r"Path is not a file: '?([^'\n]+)'?", message
    )
    if missing and key == "config":
        return f"there is no configuration file {missing!r} (--config)."
    if missing and key:
        return f"`{key}`: there is no file {missing!r}."
    required = _first(r"the following arguments are required: (.*)", message)
    if required:
        names = [name.strip().removeprefix(f"{command}.") for name in required.split(",")]
        takes = f"`{command}` takes --config FILE, or {_options(names)} (see `lightning-optim {command} --help`)"
        return f"{_listed(names)} missing: {takes}."
    if "Problems parsing config" in message or message.startswith("Unexpected config"):
        return f"a configuration is not a YAML mapping: {_one_line(message.partition(':')[2])}."
    if key:
        reason = _class_mistake(key, message) or _choice_mistake(key, message, given)
        if reason:
            return reason
    return f"{_one_line(message)}. `lightning-optim {command} --help` lists its arguments."


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1).strip() if found else None


def _one_line(text: str) -> str:
    return " ".join(re.sub(r"<class '([^']+)'>", r"\1", text).split()).rstrip(".")


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names) + " is"


def _options(names: Iterable[str]) -> str:
    return " ".join(f"--{name} CLASS" if name in ("model", "data") else f"--{name} VALUE" for name in names)


def _class_mistake(key: str, message: str) -> str | None:
    """Explain an error in a class path or an argument of the class."""
    problem = re.search(r"Problem with given class_path '([^']+)':\s*\n\s*(.*)(?:\n\s*(.*))?", message)
    if problem:
        path, reason, more = problem.group(1), problem.group(2).strip(), (problem.group(3) or "").strip()
        option = _first(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", reason)
        if option:
            return f"`{key}`: {path} has no argument {option!r}.{_suggested(option, _arguments(path))}"
        inner = _first(r'Parser key "([^"]+)":', reason)
        if inner:
            return f"`{key}.{inner}`: {_one_line(more)}."
        module, _, name = path.rpartition(".")
        return f"`{key}`: there is no class {path!r} ({reason}).{_suggested(name, _classes(module), module)}"
    base = _first(r"Import path does not correspond to a subclass of (\S+)", message)
    given = _first(r"Given value: (.*)", message)
    if base:
        return f"`{key}`: {given} is no {base}."
    if "Expected a dot import path string" in message:
        return f"`{key}`: there is no class {given!r}. Pass its import path, package.module.Class."
    return None


def _choice_mistake(key: str, message: str, given: str | None) -> str | None:
    choices: list[str] = []
    for literal in re.findall(r"- Expected a typing\.Literal\[(.*)\]", message):
        choices += [choice for choice in re.findall(r"'([^']*)'", literal) if choice not in choices]
    if not choices:
        return None
    return f"`{key}` must be one of {', '.join(choices)}, got {given!r}."


def _classes(module: str) -> list[str]:
    try:
        return [name for name, value in vars(importlib.import_module(module)).items() if inspect.isclass(value)]
    except (ImportError, ValueError):
        return []


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _suggested(name: str, known: Iterable[str], module: str = "") -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {'.'.join(filter(None, (module, close[0])))!r}?" if close else ""


def check_strategy(name: Any) -> None:
    """Reject a strategy name that is not registered.

    Args:
        name: The argument of ``Trainer(strategy=...)``; objects pass.

    Raises:
        UserError: With the nearest name, and those of this package.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    if not isinstance(name, str) or name.lower() in ("auto", *StrategyRegistry.available_strategies()):
        return
    if "." in name:
        raise UserError(
            f"there is no strategy called {name!r}. Pass a class as a mapping: {{class_path: "
            "lightning_optim.strategies.OptimFSDP2, init_args: {units: [Block]}}."
        )
    plain = {preset.removeprefix("optim_"): preset for preset in PRESETS}
    close = get_close_matches(name.lower().removeprefix("optim_"), plain, n=1, cutoff=0.5)
    meant = f" Did you mean {plain[close[0]]!r}?" if close else ""
    raise UserError(
        f"there is no strategy {name!r}.{meant} Presets of lightning_optim: {', '.join(PRESETS)}. Lightning's own "
        "names (auto, ddp, fsdp, ...) work too."
    )
