"""A live model's configuration and the numbers on its modules, after its shapes changed."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_optim.configs.models import Shapes, build, config_models, config_with, is_config, plain_name
from lightning_optim.configs.search import LISTED
from lightning_optim.configs.solution import Solution, solve
from lightning_optim.structure import PLACE, change_configs

__all__ = ["apply", "changes", "follow"]


def changes(model: nn.Module, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what modules hold otherwise with new values of the configuration, where the live ones differ.

    They are the numbers that the class computes otherwise from the new configuration than from the present one, such as
    ``num_heads``, ``split_size`` or ``intermediate_size`` of a block, and the values of every configuration that a
    module holds; a configuration that several modules share is named once.

    Args:
        model: The live model, which has the shapes already; nothing is changed.
        values: Dotted path -> value, of :func:`solve`.

    Returns:
        Module name -> attribute -> value; ``config.num_layers`` is an attribute of the module's ``config``.
    """
    before, after = build(model, model.config), build(model, config_with(model.config, values))
    found: dict[str, dict[str, Any]] = {}
    old, new, live = (Shapes.of(each).numbers for each in (before, after, model))
    for (name, key), value in new.items():
        if live.get((name, key), value) != value and old.get((name, key), value) != value:
            found.setdefault(name, {})[key] = value
    modules = {plain_name(name): module for name, module in model.named_modules()}
    earlier = dict(before.named_modules())
    seen: set[int] = set()
    for name, module in after.named_modules():
        for key, config in vars(module).items():
            ours, theirs = (vars(each[name]).get(key) if name in each else None for each in (modules, earlier))
            if not (is_config(config) and is_config(ours) and is_config(theirs)) or id(ours) in seen:
                continue
            seen.add(id(ours))
            for leaf, value in vars(config).items():
                changed = vars(theirs).get(leaf) != value and vars(ours).get(leaf) != value
                if changed and not leaf.startswith("_") and not is_config(value):
                    found.setdefault(name, {})[f"{key}.{leaf}"] = value
    return found


def apply(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Write new values into every configuration that a model's modules hold, and into the numbers of its modules.

    The modules get copies of their configurations, which they share as before: a teacher or hyperparameters may hold
    the present ones too.

    Args:
        model: The live model, which has the shapes already. Weights are not touched. Where a plan is kept, call
            ``Plan.track`` with the names of :func:`changes` first.
        values: Dotted path -> value, of :func:`solve`.
    """
    live = {plain_name(name): module for name, module in model.named_modules()}
    dotted: dict[nn.Module, dict[str, Any]] = {}
    for name, attributes in changes(model, values).items():
        for key, value in attributes.items():
            if "." in key:
                dotted.setdefault(live[name], {})[key] = value
            else:
                setattr(live[name], key, value)
    change_configs(model, dotted)
    for module in live.values():
        blocks = [vars(block).get(PLACE) for block in module.children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and blocks and None not in blocks:
            vars(module)[LISTED] = tuple(blocks)


def follow(module: nn.Module) -> dict[str, Solution]:
    """Let the configurations in a module follow its shapes, each as far as its numbers can state them all.

    Args:
        module: Any module; one without such models is left alone.

    Returns:
        What was found for each model, by its name; one with ``unstated`` layers keeps its configuration.

    Examples:
        >>> follow(nn.Linear(2, 2))  # nothing in it has a configuration
        {}
    """
    solutions = {}
    for name, model in config_models(module).items():
        solutions[name] = solve(model)
        if solutions[name].values and not solutions[name].unstated:
            apply(model, solutions[name].values)
    return solutions
