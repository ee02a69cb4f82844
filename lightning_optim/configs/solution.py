"""The numbers with which a model's class makes what the model is, or the layers that no number states."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_optim.configs.models import build, config_with, is_config, plain_name, without_blocks
from lightning_optim.configs.search import Count, Search, tiers_of
from lightning_optim.sharding import own_class

__all__ = ["Solution", "counts", "solve"]

PINNED = ("head_dim",)
"""Numbers that a class computes from others unless the configuration holds them."""


@dataclass(frozen=True)
class Solution:
    """The numbers with which a model's class makes what the model is.

    Attributes:
        values: Dotted path in the configuration -> new value; only those that change.
        unstated: Name of a layer -> why no configuration can state it. Empty if ``values`` are the whole answer.

    Examples:
        >>> Solution({"intermediate_size": 32}).unstated  # the values are the whole answer
        {}
    """

    values: dict[str, Any]
    unstated: dict[str, str] = field(default_factory=dict)


def counts(model: nn.Module) -> dict[str, Count]:
    """Return what each integer of a model's configuration counts, by dotted path; those without an effect are left out.

    Args:
        model: A model with a configuration of its own (see :func:`config_models`). Its class is built once or twice for
            each number.

    Raises:
        ValueError: If its class cannot be built from its configuration.

    Examples:
        >>> counts(model)["intermediate_size"]  # of a model of transformers  # doctest: +SKIP
    """
    search = Search(model, model.config)
    if search.shapes({}) is None:
        raise ValueError(_not_built(search))
    found = {}
    for tier in tiers_of(model.config)[:2]:
        for path in tier:
            effect = search.effect(path, {})
            if effect is not None and (effect.count.dimensions or effect.count.stacks or effect.count.attributes):
                found[path] = effect.count
    return found


def _not_built(search: Search) -> str:
    cls, config = own_class(search.model).__name__, type(search.config).__name__
    return (
        f"{cls} cannot be made from its {config} alone, as from_pretrained makes it ({search.reason}). Give the class "
        f"a constructor that takes the configuration and nothing else."
    )


def solve(model: nn.Module, *, kept: Mapping[str, Sequence[int]] | None = None) -> Solution:
    """Find the numbers with which a model's class makes exactly the parameters that the live model has.

    Where several answers make the same parameters (half of the heads, or heads of half the width), numbers that the
    model's modules hold decide: ``head_dim``, ``num_heads``, ``num_key_value_groups``.

    Args:
        model: A model with a configuration of its own; nothing of it is changed. One that is as its configuration says
            costs one build on the meta device, another one some dozens.
        kept: Name of a stack of blocks -> indices of the blocks that are left, counted among those that the
            configuration lists now. Needed only to shorten lists such as ``layer_types``; by default from the plan
            that watches the stack, or from the blocks' settings.

    Returns:
        The values, and the layers that no number states. The values make as much as possible of the model then.

    Examples:
        >>> from lightning_optim import prune_channels
        >>> report = prune_channels(model, example_inputs, pruning_ratio=0.5, scope="layer")  # doctest: +SKIP
        >>> solve(model).values  # doctest: +SKIP
        {'intermediate_size': 32}
    """
    search = Search(model, model.config, kept)
    if search.shapes({}) is None:
        return Solution({}, {"": _not_built(search)})
    if not search.remaining({}) and not search.numbers_differing({}):
        return Solution(_tied(search, {}))
    blocks = search.explore(search.counting_blocks(), {}, [])
    shallow = search.shallow(blocks)
    found = None if shallow is None else _searched(shallow, {})
    values = {**blocks, **(found or {})}
    if found is None or search.remaining(values):
        full = _searched(search, blocks)
        if full is None:
            best = min(blocks, values, search.best, key=search.remaining)
            return Solution({**best, **_tied(search, best)}, _unstated(search, best))
        values = full
    return Solution({**values, **_tied(search, values)})


def _searched(search: Search, start: dict[str, Any]) -> dict[str, Any] | None:
    """Return the values that make what the live model is; of several the one whose modules hold its numbers."""
    tiers = tiers_of(search.config)
    solved: list[dict[str, Any]] = []
    paths: list[str] = []
    best = start
    for tier in tiers[1:] if search.uneven() else tiers:  # only a list has a number for each block
        paths += tier
        best = min(best, search.explore(paths, best, solved), key=search.remaining)
        if solved:
            break
    pinned = _pinned(search)
    if pinned and not any(_holds(search, values, pinned) for values in solved):
        search.explore(paths, {**start, **pinned}, solved)
    if not solved:
        return None
    chosen = min(
        (search.with_shown([*tiers[0], *tiers[1]], values) for values in solved),
        key=lambda values: (search.numbers_differing(values), len(values)),
    )
    without = {path: value for path, value in chosen.items() if path not in pinned}
    return without if search.shapes(without) == search.shapes(chosen) else chosen


def _pinned(search: Search) -> dict[str, Any]:
    """Return numbers that the class computes from others, as the live modules hold them, to be stated explicitly."""
    pinned = {}
    for key in PINNED:
        held = {value for (_, name), value in search.live.numbers.items() if name == key}
        if len(held) == 1 and getattr(search.config, key, None) is None:
            pinned[key] = held.pop()
    return pinned


def _holds(search: Search, values: Mapping[str, Any], pinned: Mapping[str, Any]) -> bool:
    """Whether the modules that are built from some values hold the pinned numbers anyway."""
    shapes = search.shapes(values)
    numbers = {} if shapes is None else shapes.numbers
    return all(number == pinned[key] for (_, key), number in numbers.items() if key in pinned)


def _tied(search: Search, values: Mapping[str, Any]) -> dict[str, bool]:
    """Return the switch of tied weights where the class would tie what the model does not, or the other way round."""
    live = _sharing(search.model)
    for path, switch in _switches(search.config):
        if _sharing(build(search.model, config_with(search.config, values))) == live:
            break
        turned = {path: not switch}
        if _sharing(build(search.model, config_with(search.config, {**values, **turned}))) == live:
            return turned
    return {}


def _switches(config: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    for key, value in vars(config).items():
        if key.startswith("tie_") and type(value) is bool:
            yield f"{prefix}{key}", value
        elif is_config(value):
            yield from _switches(value, f"{prefix}{key}.")


def _sharing(model: nn.Module) -> set[frozenset[str]]:
    """Return the sets of names under which a model holds one parameter several times."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(plain_name(name))
    return {frozenset(same) for same in names.values() if len(same) > 1}


def _unstated(search: Search, values: Mapping[str, Any]) -> dict[str, str]:
    """Return why no number states a layer, for each layer that differs with the best values."""
    shapes = search.shapes(values)
    if shapes is None:
        return {"": _not_built(search)}
    cls, config = own_class(search.model).__name__, type(search.config).__name__
    live = search.live.dimensions
    reasons: dict[str, str] = {}
    widths, uneven = search.live.sizes(), search.uneven()
    for name, place in sorted(search.live.differing(shapes)):
        layer, _, leaf = name.rpartition(".")
        if (name, 0) not in live and (name, -1) not in live:
            reason = f"{cls} makes {leaf} from its configuration, and the model has none"
        elif (name, -1) not in shapes.dimensions:
            reason = f"{cls} makes no {leaf} here from its configuration"
        elif place < 0:
            reason = f"{leaf} has another number of dimensions than {cls} gives it"
        elif (without_blocks(name), place) in uneven:
            sizes = ", ".join(map(str, sorted(widths[without_blocks(name), place])))
            reason = (
                f"its width differs between blocks ({sizes}), and {config} has one number for all of them; prune with "
                "scope='layer', which keeps them equal"
            )
        else:
            reason = (
                f"no number of {config} states dimension {place} of {leaf}, {live[name, place]} instead of "
                f"{shapes.dimensions[name, place]}"
            )
        reasons.setdefault(layer, reason)
    return reasons
