"""Bits chosen for each layer: what rounding it costs the model's outputs, against the weights that it has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.bit_allocation import allocate_bits
from lightning_optim.functional.fake_quantize import FEWEST_BITS, fake_quantize_weight
from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.outputs import output_fields, output_tensors
from lightning_optim.progress import progress_bar
from lightning_optim.quantization.rows import rounded_names, rows_of
from lightning_optim.tables import Plotted, new_figure
from lightning_optim.target import ForwardInputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ChosenBits", "check_effective_bits", "choose_bits", "chosen_bits", "note_bits"]

_SEED = 0


@dataclass(frozen=True)
class ChosenBits(Plotted):
    """The bits of the layers; its plot shows what each layer costs at these and at all other bits.

    Attributes:
        bits: Layer -> bits of its weights.
        cost: Expected squared error of the model's outputs as a fraction of their squares, to first order.
        uniform_cost: The same if all layers had the largest whole number of bits that the budget allows.
        effective_bits: Mean bits of a weight, without scales.
        asked: The budget.
        costs: Layer -> bits -> its part of ``cost`` with as many bits. Layers that share a weight have the same.
    """

    bits: dict[str, int]
    cost: float
    uniform_cost: float
    effective_bits: float
    asked: float
    costs: dict[str, dict[int, float]] = field(default_factory=dict)

    def _figure(self) -> "Figure":
        names = list(self.bits)
        places = range(len(names))
        figure = new_figure(9.0, 1.2 + 0.26 * len(names))
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(places, [self.bits[name] for name in names], height=0.66)
        left.axvline(self.asked, color="0.4", linestyle="--", linewidth=1)
        left.set_yticks(places, names, parse_math=False)
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_xlabel(f"bits of a weight: {self.effective_bits:.2f} of at most {self.asked:g} (dashed)")
        for place, name in enumerate(names):
            of_bits = self.costs.get(name, {})
            drawn = {bits: cost for bits, cost in of_bits.items() if cost > 0}  # the axis is logarithmic
            if drawn:
                right.plot(list(drawn.values()), [place] * len(drawn), "|-", color="0.7", linewidth=1)
            if self.bits[name] in drawn:
                right.plot([drawn[self.bits[name]]], [place], "o", color="C0")
        if any(cost > 0 for each in self.costs.values() for cost in each.values()):
            right.set_xscale("log")
        right.set_xlabel("expected squared error of the outputs, of their squares\n(right to left: 2 bits and more)")
        return figure

    def renamed(self, names: Mapping[str, str | None]) -> "ChosenBits":
        """Return it with the names that layers have now, without those that were removed."""
        now = {old: names.get(old, old) for old in self.bits}
        bits = {new: self.bits[old] for old, new in now.items() if new is not None}
        costs = {new: self.costs[old] for old, new in now.items() if new is not None and old in self.costs}
        return replace(self, bits=bits, costs=costs)

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain types."""
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "ChosenBits":
        """Read what :meth:`as_plain` wrote."""
        return cls(**plain)

    def __str__(self) -> str:
        return (
            f"bits='auto': asked at most {self.asked:g} bits a weight, {self.effective_bits:.2f} used; expected "
            f"squared error of the outputs {self.cost:.2e} of their squares ({self.uniform_cost:.2e} with "
            f"{int(self.asked)} bits for all)."
        )


def check_effective_bits(bits: Any, effective_bits: Any, weight_bits: int) -> None:
    """Check the arguments ``bits`` and ``effective_bits`` together.

    Raises:
        TypeError: If ``effective_bits`` is no number.
        ValueError: If one is given without the other, or the budget is out of range.
    """
    if bits == "auto" and find_spec("scipy") is None:
        raise ModuleNotFoundError("bits='auto' needs scipy: pip install 'lightning-optim[bits]'.")
    if isinstance(bits, str) and bits != "auto":
        raise ValueError(f"`bits` must map patterns to bits, or be 'auto', got {bits!r}.")
    if bits != "auto":
        if effective_bits is not None:
            raise ValueError("`effective_bits` is the budget of bits='auto'; pass both, or weight_bits=... alone.")
        return
    if effective_bits is None:
        raise ValueError("bits='auto' needs a budget: pass effective_bits=5.0, the mean bits of a weight.")
    if isinstance(effective_bits, bool) or not isinstance(effective_bits, (int, float)):
        raise TypeError(f"`effective_bits` must be a number, got {effective_bits!r}.")
    if not FEWEST_BITS <= effective_bits <= weight_bits:
        raise ValueError(
            f"`effective_bits` must be from {FEWEST_BITS} to `weight_bits` ({weight_bits}), the most bits that a layer "
            f"gets; got {effective_bits!r}."
        )


def choose_bits(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: Sequence[ForwardInputs],
    granularity: str,
    effective_bits: float,
    most_bits: int,
    *,
    shown: bool,
) -> ChosenBits:
    """Choose the bits of each layer's weights.

    Rounding errors of weights are as good as independent of each other, so to first order a layer's rounding changes
    the outputs by ``Σ E[g²] Δw²``: Δw is the error of a weight, and g the gradient of the outputs, weighted by random
    numbers and relative to their root mean square, with respect to it. One forward and backward pass a batch gives that
    for all layers and all bits.

    Args:
        model: Called in eval mode; its mode is restored.
        layers: The layers by name. Those that share a weight get the same bits.
        calls: What forward receives, a batch each.
        granularity: What shares a scale.
        effective_bits: Mean bits of a weight.
        most_bits: The most bits of a layer.
        shown: Whether a progress bar is shown.

    Raises:
        ValueError: If the outputs do not depend on a weight by gradients, or sensitivities are not finite.
    """
    weights = {name: _weights_of(layer) for name, layer in layers.items()}
    squares = _squared_gradients(model, [p for each in weights.values() for p in each.values()], calls, shown)
    candidates = range(FEWEST_BITS, most_bits + 1)
    costs: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    for name, layer in layers.items():
        shared = [first[id(p)] for p in weights[name].values() if id(p) in first]
        same[name] = shared[0] if shared else name
        if shared:
            continue
        first |= {id(p): name for p in weights[name].values()}
        sizes[name] = sum(p.numel() for p in weights[name].values())
        costs[name] = {bits: _cost(layer, weights[name], squares, bits, granularity) for bits in candidates}
        if not all(cost < float("inf") for cost in costs[name].values()):
            raise ValueError(f"the sensitivity of {name} is not finite: do the batches give finite outputs?")
    chosen = allocate_bits(costs, sizes, effective_bits)
    return ChosenBits(
        {name: chosen[same[name]] for name in layers},
        sum(costs[name][bits] for name, bits in chosen.items()),
        sum(each[int(effective_bits)] for each in costs.values()),
        sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes.values()),
        float(effective_bits),
        {name: costs[same[name]] for name in layers},
    )


_CHOSEN = "_lightning_optim_bits"
"""Attribute of a model that holds what was chosen for it."""


def note_bits(model: nn.Module, chosen: ChosenBits) -> None:
    """Let :func:`chosen_bits` find what was chosen for a model."""
    vars(model)[_CHOSEN] = chosen


def chosen_bits(model: nn.Module) -> ChosenBits:
    """Return what ``bits="auto"`` chose for a model in this process: bits and expected errors, a table and a plot.

    Args:
        model: What :func:`lightning_optim.quantize_post_training` returned, or a LightningModule that
            :class:`lightning_optim.QuantizationAwareTraining` quantizes, once rounding has begun.

    Raises:
        ValueError: If nothing was chosen for it.
    """
    chosen = vars(model).get(_CHOSEN)
    if not isinstance(chosen, ChosenBits):
        raise ValueError(
            f"no bits were chosen for this {type(model).__name__} here. Quantize it with bits='auto' and "
            "effective_bits=...; a model that was loaded has its bits, and not what they were chosen by."
        )
    return chosen


def _weights_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: layer._parameters[name] for name in rounded_names(layer)}  # type: ignore[misc]


def _cost(
    layer: nn.Module, weights: Mapping[str, nn.Parameter], squares: Mapping[int, Tensor], bits: int, granularity: str
) -> float:
    total = 0.0
    for name, weight in weights.items():
        pairs = zip(rows_of(layer, name, weight.detach()), rows_of(layer, name, squares[id(weight)]), strict=True)
        for matrix, square in pairs:
            error = fake_quantize_weight(matrix.float(), bits, granularity) - matrix.float()
            total += float((error.square_() * square).sum())
    return total


def _squared_gradients(
    model: nn.Module, weights: Sequence[nn.Parameter], calls: Sequence[ForwardInputs], shown: bool
) -> dict[int, Tensor]:
    """Return the mean over batches and outputs of each weight's squared gradient, by the weight's identity."""
    unique = list({id(weight): weight for weight in weights}.values())
    squares = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in unique}
    generator = torch.Generator().manual_seed(_SEED)
    number = 0
    with (
        evaluating(model),
        without_fast_path(),
        _differentiable(unique),
        torch.enable_grad(),
        progress_bar("reading gradients", len(calls), shown=shown) as advance,
    ):
        for call in calls:
            outputs = [each for each in _outputs(call.call(model)) if each.requires_grad]
            if not outputs:
                raise ValueError(
                    "bits='auto' reads how the outputs depend on the weights, and forward returns no tensor with a "
                    "gradient (is it decorated with no_grad?). Pass bits={pattern: bits}."
                )
            total = torch.stack([_weighted(each, generator) for each in outputs]).sum()
            gradients = torch.autograd.grad(total, unique, allow_unused=True)
            for weight, gradient in zip(unique, gradients, strict=True):
                if gradient is not None:
                    dense = gradient.to_dense() if gradient.is_sparse else gradient
                    squares[id(weight)].add_(dense.detach().float().square())
            number += len(outputs)
            advance()
    return {key: each.div_(max(number, 1)) for key, each in squares.items()}


def _outputs(output: Any) -> list[Tensor]:
    """Return the tensors that an output holds itself, rather than in a cache or a list of hidden states."""
    if isinstance(output, (tuple, list)):
        direct = [each for each in output if isinstance(each, Tensor)]
    else:
        direct = [each for each in (output_fields(output) or {"": output}).values() if isinstance(each, Tensor)]
    return [each for each in direct or output_tensors(output) if each.is_floating_point()]


def _weighted(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random sum of an output whose squared changes are, on average, the output's relative squared change."""
    draws = torch.randn(output.shape, generator=generator).to(output.device)
    norm = output.detach().float().norm().clamp_min(1e-12)
    weighted: Tensor = (output.float() * draws).sum() / norm
    return weighted


@contextmanager
def _differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let weights have gradients, frozen ones too; cuDNN's recurrent layers have none in eval mode."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
