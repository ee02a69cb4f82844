"""Models that are made from a configuration of their own, and what their class makes of another one."""

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_optim.errors import FAILURES
from lightning_optim.modules import COMPILED_CHILD, without_compiler
from lightning_optim.sharding import own_class

__all__ = [
    "Key",
    "Number",
    "Shapes",
    "build",
    "config_failures",
    "config_models",
    "config_with",
    "is_config",
    "is_config_model",
    "kinds_of_blocks",
    "plain_name",
    "settings_of",
    "value_at",
    "without_blocks",
]

Key = tuple[str, int]
"""A parameter's name and one of its dimensions; -1 stands for their number."""

Number = int | float


def config_failures() -> tuple[type[Exception], ...]:
    """Return what a class or configuration may raise for unsuitable numbers."""
    hub = sys.modules.get("huggingface_hub.errors")  # its validated dataclasses raise a class of their own
    strict = getattr(hub, "StrictDataclassError", None)
    return FAILURES if strict is None else (*FAILURES, strict)


def is_config(value: Any) -> bool:
    """Whether an object is a configuration, that of a model or of a part of it."""
    return hasattr(value, "model_type") and callable(getattr(value, "to_dict", None))


def is_config_model(module: nn.Module) -> bool:
    """Whether a module is made from a configuration of its own and can be saved with it."""
    cls = own_class(module)
    return (
        is_config(getattr(module, "config", None))
        and callable(getattr(cls, "from_pretrained", None))
        and callable(getattr(cls, "save_pretrained", None))
    )


def config_models(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules with a configuration of their own, by name; ``""`` for the module itself."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, child in module.named_modules():
        if child not in inside and is_config_model(without_compiler(child)):
            inside.update(child.modules())
            found[plain_name(name)] = without_compiler(child)
    return found


def config_with(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a deep copy of a configuration with some values replaced.

    Args:
        config: The configuration.
        values: Dotted path -> value: ``"text_config.hidden_size"``, ``"depths.1"``.
    """
    changed = copy.deepcopy(config)
    for path, value in values.items():
        _set(changed, path.split("."), copy.deepcopy(value))
    return changed


def _set(holder: Any, path: Sequence[str], value: Any) -> Any:
    """Set a value below a configuration or a sequence in it, and return the holder (a tuple is made again)."""
    key, rest = path[0], path[1:]
    if isinstance(holder, (list, tuple)):
        items = list(holder)
        items[int(key)] = _set(items[int(key)], rest, value) if rest else value
        return type(holder)(items)
    setattr(holder, key, _set(getattr(holder, key), rest, value) if rest else value)
    return holder


def value_at(holder: Any, path: str) -> Any:
    """Return the value at a dotted path of a configuration; None if there is none."""
    for key in path.split("."):
        holder = holder[int(key)] if isinstance(holder, (list, tuple)) else getattr(holder, key, None)
    return holder


def build(model: nn.Module, config: Any) -> nn.Module:
    """Build a model's class from a configuration on the meta device: names and shapes without memory.

    Args:
        model: The live model.
        config: A configuration of the same class; it is copied.

    Raises:
        Exception: Whatever the class raises for the configuration, one of :func:`config_failures`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        built: nn.Module = own_class(model)(copy.deepcopy(config))
    return built


@dataclass(frozen=True)
class Shapes:
    """What is compared: dimensions of parameters, and numbers kept on modules."""

    dimensions: dict[Key, int]
    numbers: dict[tuple[str, str], Number]

    @classmethod
    def of(cls, model: nn.Module) -> "Shapes":
        """Read a model's."""
        dimensions: dict[Key, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = plain_name(name)
            dimensions[plain, -1] = parameter.ndim
            dimensions.update({(plain, place): size for place, size in enumerate(parameter.shape)})
        numbers = {
            (plain_name(name), key): value
            for name, module in model.named_modules(remove_duplicate=False)
            for key, value in vars(module).items()
            if type(value) in (int, float) and not key.startswith("_")
        }
        return cls(dimensions, numbers)

    def differing(self, other: "Shapes") -> set[Key]:
        """Return the dimensions that differ; those of a parameter that only one of both has, too."""
        keys = self.dimensions.keys() | other.dimensions.keys()
        return {key for key in keys if self.dimensions.get(key) != other.dimensions.get(key)}

    def differing_numbers(self, other: "Shapes") -> set[tuple[str, str]]:
        """Return the numbers on modules that differ, among those that both have."""
        return {key for key, value in self.numbers.items() if key in other.numbers and other.numbers[key] != value}

    def sizes(self) -> dict[Key, set[int]]:
        """Return the sizes of each dimension over all blocks, by the name without their numbers."""
        sizes: dict[Key, set[int]] = {}
        for (name, place), size in self.dimensions.items():
            sizes.setdefault((without_blocks(name), place), set()).add(size)
        return sizes

    def first_blocks(self, stacks: Collection[str], most: int) -> "Shapes":
        """Return the same without the blocks of some stacks after the first ones."""

        def stays(name: str) -> bool:
            inside = [stack for stack in stacks if name.startswith(f"{stack}.")]
            return all(int(name.removeprefix(f"{stack}.").partition(".")[0]) < most for stack in inside)

        dimensions = {key: size for key, size in self.dimensions.items() if stays(key[0])}
        return Shapes(dimensions, {key: value for key, value in self.numbers.items() if stays(key[0])})

    def stacks(self) -> dict[str, int]:
        """Return the number of children with parameters of each container whose children are numbered."""
        children: dict[str, set[str]] = {}
        for name in {name for name, _ in self.dimensions}:
            parts = name.split(".")
            for place, part in enumerate(parts):
                if part.isdecimal():
                    children.setdefault(".".join(parts[:place]), set()).add(part)
        return {name: len(parts) for name, parts in children.items()}


def without_blocks(name: str) -> str:
    """Return a dotted name without the numbers of its blocks.

    Examples:
        >>> without_blocks("layers.11.fc1.weight")
        'layers.*.fc1.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def plain_name(name: str) -> str:
    """Return a dotted name without the parts that torch.compile's wrappers add."""
    return ".".join(part for part in name.split(".") if part != COMPILED_CHILD)


def settings_of(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the settings that tell kinds of blocks apart: classes, strings and switches, and which numbers are set."""
    settings: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        settings[name, ""] = own_class(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in ("training", "gradient_checkpointing"):
                settings[name, key] = value if type(value) in (str, bool) else value is None
    return settings


def kinds_of_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings in which the blocks of a stack differ, for each block: their kinds.

    Returns:
        Name of a block -> dotted name of the setting -> value; only of stacks whose blocks are not all of one kind.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack) > 1:
            blocks = [settings_of(block) for block in stack]
            keys = {key for block in blocks for key in block}
            telling = sorted(key for key in keys if any(block.get(key) != blocks[0].get(key) for block in blocks))
            for place, block in enumerate(blocks if telling else ()):
                held = {".".join(filter(None, key)): block.get(key) for key in telling}
                kinds[plain_name(f"{name}.{place}".lstrip("."))] = held
    return kinds
