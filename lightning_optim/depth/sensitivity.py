"""Sensitivity of blocks: the metric of the model without each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_optim.calls import try_forward
from lightning_optim.depth.removal import without
from lightning_optim.depth.stacks import find_stacks
from lightning_optim.modules import copy_module
from lightning_optim.progress import progress_bar
from lightning_optim.structure import children_of
from lightning_optim.tables import Listed, Listing, Plotted, by_reason, new_figure
from lightning_optim.target import Pattern, as_forward_calls, find_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BlockSensitivityReport", "block_sensitivity"]


@dataclass(frozen=True)
class BlockSensitivityReport(Listed, Plotted):
    """The metric of the model without one block at a time; its plot shows the drops as bars.

    Attributes:
        baseline: The metric of the model as it is.
        scores: Name of a block -> the metric without it, in the order of the model.
        left_out: Stacks and blocks that cannot be removed, and why.
    """

    baseline: float
    scores: dict[str, float]
    left_out: dict[str, str]

    def drop(self, name: str) -> float:
        """Return what a block's removal costs: baseline minus score, negative where the model gains."""
        return self.baseline - self.scores[name]

    def least(self, number: int) -> list[str]:
        """Return the blocks whose removal costs least, each tried alone; together they may cost far more."""
        return sorted(self.scores, key=self.drop)[:number]

    def listing(self) -> Listing:
        """Return the drops, in the order of the model."""
        rows = [(name, f"{score:.4f}", f"{self.drop(name):.4f}") for name, score in self.scores.items()]
        rows += [(names, "", reason) for names, reason in by_reason(self.left_out)]
        return Listing(("without", "metric", "lost, or why not"), rows, title=f"metric {self.baseline:.4f}")

    def table(self) -> str:
        """Return the drops as a text table."""
        return str(self)

    def _figure(self) -> "Figure":
        names = list(self.scores)
        figure = new_figure(5, 1.2 + 0.25 * len(names))
        axes = figure.subplots()
        axes.barh(range(len(names)), [self.drop(name) for name in names])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"metric lost without the block, of {self.baseline:.4g}")
        return figure


def block_sensitivity(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    example_inputs: Any,
    *,
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    progress: bool = True,
) -> BlockSensitivityReport:
    """Measure the model without each block that may be removed; see :func:`lightning_optim.sensitivity`.

    Args:
        model: Any module; it is not touched.
        metric: Returns the metric of a copy of ``model`` that shares its weights.
        example_inputs: What the forward of ``module`` receives.
        module: Dotted name of the module whose stacks are tried; default the whole model.
        include: Exactly the stacks or blocks that may be removed.
        exclude: Those that stay.
        progress: Show a progress bar on rank zero where it takes longer than two seconds.

    Raises:
        ValueError: If forward fails with ``example_inputs``, or no block can be removed.
    """
    prefix, _ = find_target(model, module)
    inputs = as_forward_calls(example_inputs)
    copied = copy_module(model, share_weights=True)

    def call(root: nn.Module) -> list[Any]:
        called = root.get_submodule(prefix.rstrip("."))
        calls = (inputs, *inputs.further)
        return [try_forward(called, each, argument="`example_inputs`", advice=_ADVICE) for each in calls]

    found = find_stacks(copied, call, module, include, exclude)
    if not found.stacks:
        raise ValueError(f"sensitivity can remove nothing: {found.reasons()}.")
    baseline = metric(copied)
    places = [(stack.name, place) for stack in found.stacks.values() for place in stack.removable]
    scores: dict[str, float] = {}
    with progress_bar("sensitivity", len(places), shown=progress) as advance:
        for stack, place in places:
            key = list(children_of(copied.get_submodule(stack)))[place]
            with without(copied, {stack: [place]}):
                scores[f"{stack}.{key}"] = metric(copied)
            advance()
    return BlockSensitivityReport(baseline, scores, found.left_out)


_ADVICE = "they must be what the forward receives: a tensor, a tuple of arguments or a dict of keyword arguments."
