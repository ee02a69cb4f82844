"""Which weights are pruned, and why the others are not."""

from collections.abc import Collection, Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_optim.functional.granularity import Granularity
from lightning_optim.modules import TRANSPOSED, Conv1D, Experts
from lightning_optim.patterns import Pattern, first_match
from lightning_optim.target import Selection, Weight, select_weights

__all__ = ["check_weights", "problem_of", "select", "without_misfits"]


def select(
    target: nn.Module,
    prefix: str,
    *,
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
    patterns: Mapping[Pattern, float] | None,
) -> Selection:
    """Select the weights to prune.

    Args:
        target: The module to prune.
        prefix: Name prefix of the target.
        include: Exactly what is selected, instead of the default.
        exclude: What is left out.
        patterns: A sparsity dict. A pattern that is a layer's own name selects that layer, and weights that
            no pattern matches stay dense. None without a dict.
    """
    selection = select_weights(target, prefix, include=include, exclude=exclude)
    if patterns is None:
        return selection
    chosen, left_out = dict(selection.chosen), dict(selection.left_out)
    if include is None:
        layers = {name.rpartition(".")[0] for name in left_out if name.endswith(".weight")}
        named = [p for p in patterns if isinstance(p, str) and (p in layers or prefix + p in layers)]
        if named:
            chosen |= select_weights(target, prefix, include=named, exclude=exclude).chosen
    unmatched = {name for name, weight in chosen.items() if first_match(patterns, name, weight.layer, prefix) is None}
    left_out = {name: reason for name, reason in left_out.items() if name not in chosen}
    return Selection(
        {name: weight for name, weight in chosen.items() if name not in unmatched},
        {**{name: "no pattern of sparsity" for name in chosen if name in unmatched}, **left_out},
    )


def without_misfits(
    selection: Selection, granularity: Granularity, selected_before: Collection[str], *, by_default: bool = True
) -> Selection:
    """Leave out weights that do not fit the granularity.

    Args:
        selection: The selected weights.
        granularity: What is removed together.
        selected_before: Names that an earlier part of the run selected, which stay.
        by_default: Whether no ``include`` was given. 0.1 did not select Conv1D layers and experts then, and its runs
            are resumed without them.
    """
    new = {name: weight for name, weight in selection.chosen.items() if name not in selected_before}
    misfits = {name: reason for name, weight in new.items() if (reason := _misfit(weight, granularity)) is not None}
    if selected_before and by_default:
        unselected = (name for name, weight in new.items() if isinstance(weight.layer, (Conv1D, Experts)))
        misfits |= dict.fromkeys(unselected, "not selected by the run that is resumed")
    chosen = {name: weight for name, weight in selection.chosen.items() if name not in misfits}
    return Selection(chosen, {**misfits, **selection.left_out})


def _misfit(weight: Weight, granularity: Granularity) -> str | None:
    if str(granularity) == "weight" or isinstance(weight.parameter, UninitializedTensorMixin):
        return None
    if weight.parameter.ndim < 2:
        return f"a vector, which has no {granularity}"
    if isinstance(weight.layer, TRANSPOSED):
        return f"{type(weight.layer).__name__}, stored as [in, out, ...]: no {granularity}"
    return granularity.misfit(weight.shapes[0])


def check_weights(selection: Selection) -> None:
    """Refuse an empty selection, and weights that cannot be pruned.

    Raises:
        MisconfigurationException: With the reason.
    """
    if not selection.chosen:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in list(selection.left_out.items())[:6])
        raise MisconfigurationException(
            f"WeightPruning selects no layer: left out are {reasons or 'none, the module has no parameters'}. "
            "Name what to prune with include=[...]."
        )
    for name, weight in selection.chosen.items():
        problem = problem_of(weight.parameter)
        if problem:
            layer = name.rpartition(".")[0]
            raise MisconfigurationException(
                f"WeightPruning cannot prune {name}: it is {problem}. Pass exclude=[{layer!r}]."
            )


def problem_of(parameter: Tensor) -> str | None:
    """Return what a parameter is that cannot be pruned; None if it can."""
    if isinstance(parameter, UninitializedTensorMixin):
        return "lazy (not initialised); run one forward pass before fit"
    if parameter.layout != torch.strided:
        return f"a sparse tensor ({parameter.layout})"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}, not floating point"
    return None
