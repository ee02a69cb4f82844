"""Which layers become two, and at which rank."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_optim.functional.low_rank import Directions, largest_useful_rank, rank_for_energy
from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.low_rank.layers import LowRank, float_class, matrix_of
from lightning_optim.modules import CONVOLUTIONS
from lightning_optim.patterns import Pattern, check_pattern, first_match, matches, shown
from lightning_optim.sharding import own_class
from lightning_optim.target import Selection, Weight, named_layers, select_weights

__all__ = ["DEFAULT_ENERGY", "IS_FACTOR", "RankGoal", "reasons", "select_layers"]

DEFAULT_ENERGY = 0.9
IS_FACTOR = "a factor of low rank already"


@dataclass(frozen=True)
class RankGoal:
    """How much of each layer is kept.

    Attributes:
        values: By pattern, the first that matches counts; None stands for every layer.
        is_rank: Whether the values are ranks (an int, or a fraction of the full one), else fractions of the energy.
    """

    values: Mapping[Pattern | None, int | float]
    is_rank: bool

    @classmethod
    def of(cls, energy: Any, rank: Any) -> "RankGoal":
        """Check the arguments ``energy`` and ``rank``; the default energy gives way to a rank.

        Raises:
            TypeError: If a value is no number, or a pattern is none.
            ValueError: If both are given, or a value is out of range.
        """
        if rank is None:
            return cls(_by_pattern("energy", energy, _checked_energy), False)
        if energy != DEFAULT_ENERGY:
            raise ValueError(f"`rank` takes the place of `energy`; got rank={rank!r} and energy={energy!r}.")
        return cls(_by_pattern("rank", rank, _checked_rank), True)

    @property
    def argument(self) -> str:
        """Name of the argument that was given."""
        return "rank" if self.is_rank else "energy"

    @property
    def asked(self) -> Any:
        """The argument as it was given."""
        return self.values[None] if None in self.values else dict(self.values)

    def of_layer(self, name: str, layer: nn.Module, prefix: str) -> int | float | None:
        """Return the value for a layer, None where no pattern matches it."""
        if None in self.values:
            return self.values[None]
        patterns = {pattern: value for pattern, value in self.values.items() if pattern is not None}
        pattern = first_match(patterns, f"{name}.weight", layer, prefix)
        return None if pattern is None else patterns[pattern]

    def rank_in(self, value: int | float, directions: Directions, weight: Tensor) -> int:
        """Return the rank that a value asks of a weight ``[out, in]``, at most the weight's own."""
        if not self.is_rank:
            return rank_for_energy(directions, value)
        wanted = value if isinstance(value, int) else max(1, round(value * min(weight.shape)))
        return min(wanted, len(directions.energies))


def _by_pattern(argument: str, value: Any, check: Any) -> dict[Pattern | None, int | float]:
    if not isinstance(value, Mapping):
        return {None: check(argument, value)}
    if not value:
        raise ValueError(f"`{argument}` as a dict maps patterns to numbers, got an empty one.")
    for pattern in value:
        check_pattern(argument, pattern)
    return {pattern: check(f"{argument}[{shown(pattern)}]", each) for pattern, each in value.items()}


def _checked_energy(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{argument}` must be a fraction in (0, 1], got {value!r}.")
    if not 0.0 < value <= 1.0:
        hint = f" For {value:g} % pass {value / 100:g}." if 1 < value <= 100 else ""
        raise ValueError(f"`{argument}` must be a fraction in (0, 1], got {value!r}.{hint}")
    return float(value)


def _checked_rank(argument: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{argument}` must be an int (the rank) or a float in (0, 1) (a fraction of the full rank), got {value!r}."
        )
    if value <= 0 or (isinstance(value, float) and value >= 1.0):
        raise ValueError(
            f"`{argument}` must be an int >= 1 (the rank) or a float in (0, 1) (a fraction of the full rank), got "
            f"{value!r}."
        )
    return value


def select_layers(
    target: nn.Module,
    prefix: str = "",
    *,
    goal: RankGoal,
    needs: Collection[str] = (),
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    root: nn.Module | None = None,
) -> Selection:
    """Select the layers that can become two.

    By default these are all Linear layers and 1x1 convolutions without groups, except the last Linear/Conv in
    registration order.

    Args:
        target: The module whose layers are selected.
        prefix: Prefix of its names in the LightningModule's ``state_dict()``.
        goal: What is asked; a layer that no pattern of it matches is left out.
        needs: Statistics that will be collected; layers for which one cannot be are left out.
        include: Exactly the layers to factorize: names, glob patterns, layer classes.
        exclude: Layers that stay; it takes precedence.
        root: The whole module, in which other layers may share the target's weights; default the target.

    Returns:
        The weights by the **layer's** name; layers with matrices that were left out with the reason.

    Raises:
        ValueError: If a pattern matches nothing, or one of ``include`` or of the goal only layers that cannot become
            two.
    """
    selection = select_weights(target, prefix, include=include, exclude=exclude)
    layers = dict(named_layers(target, prefix))
    factors = {id(factor) for layer in layers.values() if isinstance(layer, LowRank) for factor in layer.children()}
    holders = _holders(target if root is None else root)
    chosen: dict[str, Weight] = {}
    left_out: dict[str, str] = {}
    for parameter, reason in selection.left_out.items():
        name, _, leaf = parameter.rpartition(".")
        layer = layers[name]
        if leaf.startswith(("weight", "in_proj")) and _has_matrix(layer):
            left_out[name] = IS_FACTOR if id(layer) in factors else reason
    for parameter, weight in selection.chosen.items():
        name = parameter.rpartition(".")[0]
        why_not = IS_FACTOR if id(weight.layer) in factors else _why_whole(parameter, weight, holders, needs)
        if why_not is None and goal.of_layer(name, weight.layer, prefix) is None:
            why_not = f"no pattern of `{goal.argument}` matches it"
        if why_not is None:
            chosen[name] = weight
        else:
            left_out[name] = why_not
    found = Selection(chosen, left_out)
    patterns = [pattern for pattern in goal.values if pattern is not None]
    _check_served("include", include or (), found, layers, prefix)
    _check_served(goal.argument, patterns, found, layers, prefix)
    return found


def reasons(selection: Selection) -> str:
    """Return why layers were left out, for the error of a selection that is empty."""
    named = [f"{name} ({reason})" for name, reason in list(selection.left_out.items())[:6]]
    return ", ".join(named) or "the module has no layers with matrices"


def _holders(root: nn.Module) -> dict[int, list[str]]:
    """Return the names under which layers hold each parameter, by its identity; a layer with two names counts once."""
    holders: dict[int, list[str]] = {}
    for name, layer in root.named_modules():
        for leaf, parameter in layer._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{name}.{leaf}" if name else leaf)
    return holders


def _has_matrix(layer: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))


def _why_whole(name: str, weight: Weight, holders: Mapping[int, Sequence[str]], needs: Collection[str]) -> str | None:
    """Return why a layer stays one; None if it can become two."""
    layer: Any = weight.layer
    kind = float_class(layer)
    if kind is None or name.rpartition(".")[2] != "weight":
        return _of_another_kind(layer)
    if getattr(layer, "quantization_phase", "off") in ("fake_quantize", "frozen"):
        return "quantized already"
    if isinstance(weight.parameter, UninitializedTensorMixin):
        return "lazy (not initialized); run one forward pass before fit"
    if kind in CONVOLUTIONS and (set(layer.kernel_size) != {1} or layer.groups != 1):
        size = "x".join(map(str, layer.kernel_size))
        return f"a {size} convolution{f' of {layer.groups} groups' if layer.groups > 1 else ''}; only 1x1 of one group"
    others = [other for other in holders.get(id(weight.parameter), ()) if other != name]
    if others:
        return f"shares its weight with {others[0]}, which would be torn from it"
    if not weight.parameter.is_floating_point():
        return f"of type {weight.parameter.dtype}, not floating point"
    if largest_useful_rank(*matrix_of(layer).shape) < 1:
        return f"{'x'.join(map(str, matrix_of(layer).shape))}: two factors would never be smaller"
    problems = (STATISTICS[statistic]().problem(name, layer) for statistic in needs if statistic in STATISTICS)
    return next((f"its inputs' statistics are {problem}" for problem in problems if problem is not None), None)


def _of_another_kind(layer: nn.Module) -> str:
    own = own_class(layer)
    if issubclass(own, NonDynamicallyQuantizableLinear) or isinstance(layer, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its projections as one tensor"
    known = next((cls for cls in (nn.Linear, *CONVOLUTIONS) if isinstance(layer, cls)), None)
    return f"a subclass of {known.__name__}, whose own forward is unknown" if known else f"{own.__name__} stays whole"


def _check_served(
    argument: str, patterns: Sequence[Pattern], found: Selection, layers: Mapping[str, nn.Module], prefix: str
) -> None:
    """Raise where a pattern matches only layers that cannot become two."""
    for pattern in patterns:
        if any(matches(pattern, weight.name, weight.layer, prefix) for weight in found.chosen.values()):
            continue
        refused = {
            name: reason
            for name, reason in found.left_out.items()
            if matches(pattern, f"{name}.weight", layers[name], prefix)
        }
        settled = (IS_FACTOR, "excluded by", "no pattern of", "last layer")
        if not any(reason.startswith(settled) for reason in refused.values()):
            reasons = ", ".join(f"{name} ({reason})" for name, reason in list(refused.items())[:5]) or "none"
            raise ValueError(
                f"{argument}: {shown(pattern)} matches only layers that cannot become two of low rank: {reasons}. "
                f"Remove it from `{argument}`."
            )
