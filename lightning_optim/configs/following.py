"""A live model's configuration and the numbers on its modules, after its shapes changed."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_optim.configs.models import Number, Shapes, build, config_models, config_with, is_config, plain_name
from lightning_optim.configs.search import LISTED
from lightning_optim.configs.solution import Solution, solve
from lightning_optim.structure import PLACE

__all__ = ["apply", "changes", "follow"]


def changes(model: nn.Module, values: Mapping[str, Any]) -> dict[str, dict[str, Number]]:
    """Return the numbers on modules that follow from new values of the configuration, where the live ones differ.

    They are those that the class computes otherwise from the new configuration than from the present one, such as
    ``num_heads``, ``split_size`` or ``intermediate_size`` of a block.

    Args:
        model: The live model, which has the shapes already; nothing is changed.
        values: Dotted path -> value, of :func:`solve`.

    Returns:
        Module name -> attribute -> value.
    """
    before = Shapes.of(build(model, model.config)).numbers
    after = Shapes.of(build(model, config_with(model.config, values))).numbers
    live = Shapes.of(model).numbers
    found: dict[str, dict[str, Number]] = {}
    for (name, key), value in after.items():
        if live.get((name, key), value) != value and before.get((name, key), value) != value:
            found.setdefault(name, {})[key] = value
    return found


def holder_of(model: nn.Module, path: str, value: Any) -> tuple[str, str, Any]:
    """Return where a number of a configuration can be set as an attribute.

    Args:
        model: A model with a configuration of its own.
        path: Dotted path in the configuration: ``"text_config.hidden_size"``, ``"depths.1"``.
        value: The number.

    Returns:
        Name of the module that holds the innermost configuration, the attribute's name there, and its value: of an item
        of a list the whole list.
    """
    holder, *rest = [model.config, *path.split(".")]
    inner, place = holder, list(rest)
    while len(place) > 1 and is_config(getattr(inner, place[0], None)):
        inner = getattr(inner, place.pop(0))
    name = next(name for name, module in model.named_modules() if vars(module).get("config") is inner)
    if len(place) == 1:
        return name, place[0], value
    return name, place[0], getattr(config_with(inner, {".".join(place): value}), place[0])


def apply(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Write new values into every configuration that a model's modules hold, and into the numbers of its modules.

    The modules get copies of their configurations, which they share as before: a teacher or hyperparameters may hold
    the present ones too.

    Args:
        model: The live model, which has the shapes already. Weights are not touched. Where a plan is kept, call
            ``Plan.track`` with the names of :func:`changes` first.
        values: Dotted path -> value, of :func:`solve`.
    """
    numbers = changes(model, values)
    twin = build(model, config_with(model.config, values))
    live = {plain_name(name): module for name, module in model.named_modules()}
    copied: dict[int, Any] = {}
    held: list[tuple[dict[str, Any], str, Any]] = []
    for module in live.values():
        held += [(vars(module), key, value) for key, value in vars(module).items() if is_config(value)]
    copies = {id(config): copy.deepcopy(config, copied) for _, _, config in held}
    for name, module in twin.named_modules():
        for key, theirs in vars(module).items():
            ours = vars(live[name]).get(key) if name in live else None
            if is_config(ours) and is_config(theirs):
                _follow_config(copies[id(ours)], theirs)
    for holder, key, config in held:
        holder[key] = copies[id(config)]
    for name, attributes in numbers.items():
        vars(live[name]).update(attributes)
    for module in live.values():
        blocks = [vars(block).get(PLACE) for block in module.children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and blocks and None not in blocks:
            vars(module)[LISTED] = tuple(blocks)


def _follow_config(ours: Any, theirs: Any) -> None:
    """Give a configuration the numbers and lists of another one."""
    for key, value in vars(theirs).items():
        own = vars(ours).get(key)
        if is_config(own) and is_config(value):
            _follow_config(own, value)
        elif type(value) in (int, float, list, tuple, bool) and not key.startswith("_") and own != value:
            setattr(ours, key, copy.deepcopy(value))


def follow(module: nn.Module) -> dict[str, Solution]:
    """Let the configurations in a module follow its shapes, each as far as its numbers can state them all.

    Args:
        module: Any module; one without such models is left alone.

    Returns:
        What was found for each model, by its name; one with ``unstated`` layers keeps its configuration.
    """
    solutions = {}
    for name, model in config_models(module).items():
        solutions[name] = solve(model)
        if solutions[name].values and not solutions[name].unstated:
            apply(model, solutions[name].values)
    return solutions
