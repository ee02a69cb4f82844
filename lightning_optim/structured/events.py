"""One pruning event: from a live model and a ratio to what leaves, checked before anything is committed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_optim.functional.channels import (
    CHANNEL_CRITERIA,
    ChannelCriterion,
    Slices,
    channels_to_remove,
    global_ratios,
    group_scores,
    kept_channels,
)
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.structured.groups import ChannelGroup, Removal, TracedModel
from lightning_optim.structured.removal import damage, trusted
from lightning_optim.target import ForwardInputs

__all__ = ["Allocation", "ChannelReport", "check_ratio", "find_prunable", "plan_event"]

_CHANNEL_DIM = {"out": 0, "in": 1}
_SWAPPED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Allocation:
    """How channels are chosen: what both the callback and :func:`prune_channels` ask for."""

    criterion: ChannelCriterion
    reduction: Literal["mean", "sum", "max"] = "mean"
    scope: Literal["global", "layer"] = "global"
    round_to: int | None = None

    @classmethod
    def of(
        cls,
        criterion: str | ChannelCriterion,
        *,
        scope: Literal["global", "layer"],
        reduction: Literal["mean", "sum", "max"],
        round_to: int | None,
    ) -> "Allocation":
        """Read the user's words.

        Raises:
            ValueError: If one of them is unknown or out of range.
        """
        if scope not in ("global", "layer"):
            raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")
        if reduction not in ("mean", "sum", "max"):
            raise ValueError(f"`reduction` must be 'mean', 'sum' or 'max', got {reduction!r}.")
        if round_to is not None and (type(round_to) is not int or round_to < 1):
            raise ValueError(f"`round_to` must be a whole number >= 1 or None, got {round_to!r}.")
        return cls(CHANNEL_CRITERIA.resolve(criterion), reduction, scope, round_to)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the criterion asks for besides the weights."""
        needs: tuple[str, ...] = getattr(self.criterion, "needs", ())
        return needs

    def rounded(self, multiple: int) -> "Allocation":
        """Return the same with another multiple to keep."""
        return replace(self, round_to=multiple)


def check_ratio(ratio: float | dict[str, float]) -> float | dict[str, float]:
    """Return a pruning ratio, or ratios by pattern, as floats.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is not in (0, 1), or there is none.
    """
    if isinstance(ratio, dict):
        if not ratio:
            raise ValueError("`pruning_ratio` as a dict maps patterns to fractions, got an empty one.")
        return {pattern: float(check_ratio(value)) for pattern, value in ratio.items()}  # type: ignore[arg-type]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"`pruning_ratio` must be a fraction in (0, 1) or a dict of them, got {ratio!r}.")
    if not 0.0 < ratio < 1.0:
        hint = f" For {ratio:g} % of the channels pass {ratio / 100:g}." if 1 < ratio < 100 else ""
        raise ValueError(f"`pruning_ratio` must be a fraction in (0, 1), got {ratio!r}.{hint}")
    return float(ratio)


@dataclass(frozen=True)
class ChannelReport:
    """The groups that can be pruned, and why others are left alone."""

    groups: dict[str, ChannelGroup]
    left_out: dict[str, str] = field(default_factory=dict)

    def ratios(self, by_pattern: Mapping[str, float], prefix: str = "") -> dict[str, float]:
        """Return each group's ratio: of the first pattern that matches one of its outputs, else 0.

        Raises:
            ValueError: If a pattern matches no group.
        """
        found = {
            name: next((p for p in by_pattern if _matches(p, group, prefix)), None)
            for name, group in self.groups.items()
        }
        for pattern in by_pattern:
            if pattern not in found.values():
                raise ValueError(f"pruning_ratio: {pattern!r} matches no group; there are {', '.join(self.groups)}.")
        return {name: 0.0 if pattern is None else by_pattern[pattern] for name, pattern in found.items()}


def _matches(pattern: str, group: ChannelGroup, prefix: str) -> bool:
    outputs = {member.layer for member in group.members if member.side == "out"}
    return any(fnmatchcase(name, pattern) or fnmatchcase(prefix + name, pattern) for name in outputs)


def find_prunable(
    module: nn.Module, inputs: ForwardInputs, roots: Iterable[str], left_alone: Mapping[str, str], *, check: bool = True
) -> ChannelReport:
    """Find the groups that can be pruned without harm.

    A group is left out when one of its outputs belongs to a layer that is left alone, or when removing one channel
    (one of each block) breaks the forward pass, changes an output's shape, or differs from setting it to zero.

    Args:
        module: The model.
        inputs: What its forward receives.
        roots: Names of the layers whose outputs may leave.
        left_alone: Names of layers whose outputs must stay -> why.
        check: Try each group on copies of the model.
    """
    groups = {group.name: group for group in TracedModel(module, inputs).groups()}
    wanted, left_out = set(roots), {}
    for name, group in groups.items():
        outputs = {member.layer for member in group.members if member.side == "out"}
        coupled = sorted(outputs & left_alone.keys())
        if coupled:
            left_out[name] = (
                f"coupled with {coupled[0]} ({left_alone[coupled[0]]})" if coupled[0] != name else left_alone[name]
            )
        elif not outputs & wanted:
            left_out[name] = "not selected"
        elif group.channels <= group.blocks:
            left_out[name] = "one channel a block"
    candidates = {name: group for name, group in groups.items() if name not in left_out}
    if check:
        for exact in (True, False):
            names = [name for name, group in candidates.items() if group.exact is exact]
            _, bad = trusted(names, partial(_probe, module, inputs, groups, exact))
            left_out |= bad
        candidates = {name: group for name, group in candidates.items() if name not in left_out}
    return ChannelReport(candidates, left_out)


def _probe(
    module: nn.Module, inputs: ForwardInputs, groups: Mapping[str, ChannelGroup], exact: bool, names: Sequence[str]
) -> str | None:
    """Remove the first channel of each block of some groups, on copies."""
    firsts = {
        name: [b * (groups[name].channels // groups[name].blocks) for b in range(groups[name].blocks)] for name in names
    }
    try:
        removal = TracedModel(module, inputs).remove(firsts)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        return f"torch-pruning cannot remove its channels ({str(error).splitlines()[0][:100]})"
    return damage(module, inputs, removal, exact=exact)


def plan_event(
    module: nn.Module,
    inputs: ForwardInputs,
    names: Iterable[str],
    dense: Mapping[str, int],
    ratios: float | Mapping[str, float],
    allocation: Allocation,
    gradients: Mapping[str, Tensor] | None = None,
    prefix: str = "",
) -> tuple[Removal, dict[str, tuple[int, int]], bool]:
    """Choose what leaves the live model so that ``ratios`` of the dense channels are gone.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        names: The prunable groups.
        dense: Channels of each group before anything left.
        ratios: Fraction to be gone, of all groups or by group.
        allocation: How channels are chosen.
        gradients: Root-mean-square gradients by parameter name, where the criterion needs them.
        prefix: What the module's names begin with in the whole model; it seeds the random criterion.

    Returns:
        The removal, (channels now, channels after) by group, and whether removing equals setting to zero.
    """
    traced = TracedModel(module, inputs)
    wanted = set(names)
    groups = {group.name: group for group in traced.groups() if group.name in wanted}
    scores = {name: _scores(module, group, allocation, gradients or {}, prefix) for name, group in groups.items()}
    by_group = _ratios(groups, scores, dense, ratios, allocation)
    leaving, counts, exact = {}, {}, True
    for name, group in groups.items():
        keep = kept_channels(dense[name], by_group[name], blocks=group.blocks, round_to=allocation.round_to)
        counts[name] = (group.channels, min(keep, group.channels))
        if keep < group.channels:
            leaving[name] = channels_to_remove(scores[name], keep, group.blocks)
            exact = exact and group.exact
    return traced.remove(leaving), counts, exact


def _ratios(
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, Tensor],
    dense: Mapping[str, int],
    ratios: float | Mapping[str, float],
    allocation: Allocation,
) -> dict[str, float]:
    if isinstance(ratios, Mapping):
        return {name: ratios[name] for name in groups}
    if allocation.scope == "layer":
        return dict.fromkeys(groups, ratios)
    gone = {name: torch.full((dense[name] - group.channels,), -torch.inf) for name, group in groups.items()}
    return global_ratios({name: torch.cat([gone[name], scores[name]]) for name in groups}, ratios)


def _scores(
    module: nn.Module, group: ChannelGroup, allocation: Allocation, gradients: Mapping[str, Tensor], prefix: str
) -> Tensor:
    slices = list(_slices(module, group, allocation, gradients, prefix))
    try:
        return group_scores(slices, allocation.criterion, allocation.reduction)
    except ValueError as error:
        raise ValueError(f"group {prefix}{group.name}: {error}") from error


def _slices(
    module: nn.Module, group: ChannelGroup, allocation: Allocation, gradients: Mapping[str, Tensor], prefix: str
) -> Iterable[Slices]:
    generator = parameter_generator(prefix + group.name) if "generator" in allocation.needs else None
    for member in group.members:
        layer = module.get_submodule(member.layer)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        norm = weight.ndim == 1
        matrix = _by_channel(layer, weight.detach(), member.side, member.index, member.root, group.channels)
        if matrix is None:
            continue
        gradient = gradients.get(f"{member.layer}.weight")
        if gradient is not None:
            gradient = _by_channel(layer, gradient, member.side, member.index, member.root, group.channels)
        yield Slices(matrix, "norm" if norm else member.side, gradient, generator)


def _by_channel(
    layer: nn.Module, weight: Tensor, side: str, index: Sequence[int], root: Sequence[int], channels: int
) -> Tensor | None:
    """Return the weights by channel of the group, ``[channels, entries]``; None where the layer has no such one."""
    dim = 0 if weight.ndim == 1 else _CHANNEL_DIM[side] ^ isinstance(layer, _SWAPPED)
    if weight.ndim > 1 and weight.shape[dim] <= max(index):  # inputs of a grouped convolution
        return None
    rows = weight.movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    order = torch.tensor(sorted(range(len(index)), key=lambda i: (root[i], index[i])))
    picked = rows[torch.tensor(index)[order].to(rows.device)]
    return picked.reshape(channels, -1)
