"""Weight pruning in one call, without a Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.calls import batch_calls, try_batch
from lightning_optim.checks import check_flags
from lightning_optim.functional.criteria import CRITERIA, Criterion, Statistics, parameter_generator
from lightning_optim.functional.granularity import Granularity, parse_granularity
from lightning_optim.functional.second_order import output_error
from lightning_optim.functional.sparsify import SPARSIFIERS, Sparsifier
from lightning_optim.functional.statistics import STATISTICS, needs_of
from lightning_optim.layerwise import change_layer_by_layer
from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.patterns import Pattern
from lightning_optim.sparsity.goals import checked_sparsity, make_goals
from lightning_optim.sparsity.matrices import masks_by_matrix, scores_by_matrix
from lightning_optim.sparsity.selection import problem_of, select, without_misfits
from lightning_optim.tables import Listed, Listing, by_reason, by_stack
from lightning_optim.target import ForwardInputs, Selection, Weight, find_target

__all__ = ["SparsityReport", "prune_weights"]


@dataclass(frozen=True)
class SparsityReport(Listed):
    """What :func:`prune_weights` set to zero.

    Attributes:
        masks: Which weights stay, bool in the shape of the weight, by its name in ``state_dict()``.
        asked: The fraction of zeros that was asked of each.
        errors: For methods that read second moments: the squared error of a layer's outputs as a fraction of their
            squares, over the batches, with the layer's inputs as they were when it was pruned.
        left_out: Other parameters, and why they were left alone.
        granularity: What was removed together.

    Examples:
        >>> from torch import nn
        >>> from lightning_optim import prune_weights
        >>> report = prune_weights(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), method="magnitude", sparsity=0.5)
        >>> report.sparsity
        0.5
    """

    masks: dict[str, Tensor]
    asked: dict[str, float]
    errors: dict[str, float]
    left_out: dict[str, str]
    granularity: str

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the pruned weights."""
        number = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / number

    def listing(self) -> Listing:
        """Return the zeros of each parameter, and why others were left alone."""
        number = sum(mask.numel() for mask in self.masks.values())
        asked = sum(self.asked[name] * mask.numel() for name, mask in self.masks.items()) / number
        sentence = f"asked {asked:.2%} zeros, achieved {self.sparsity:.2%} of {number:,} weights"
        if self.errors:
            mean = sum(self.errors.values()) / len(self.errors)
            sentence += f"; mean squared error of the layers' outputs {mean:.2e} of their squares"
        rows = by_stack(
            (name, "x".join(map(str, mask.shape)), f"{1 - int(mask.sum()) / mask.numel():.2%}", self.granularity)
            for name, mask in self.masks.items()
        )
        rows += [(names, "", "-", reason) for names, reason in by_reason(self.left_out)]
        return Listing(("parameter", "shape", "zeros", "how, or why not"), rows, before=[sentence])


def prune_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    sparsity: float | dict[Pattern, float] | None = None,
    method: str | Mapping[str, Any] | Sparsifier | Criterion = "sparsegpt",
    granularity: str = "weight",
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
    progress_bar: bool = True,
) -> SparsityReport:
    """Set weights of a trained model to zero, in place, once; each weight (each expert) loses the same fraction.

    Layers are pruned in the order in which they are called, each for the inputs that the pruned layers before it give.
    Zeros that are there stay, and count. Train on with ``WeightPruning("hold")``, which keeps the zeros; quantizing
    keeps them too. Checkpoints hold the zeros like any weights, and load everywhere.

    Args:
        model: A LightningModule or any module; its mode is kept. It is unchanged when an error is raised.
        dataloader: Batches for its forward: a tensor, a dict of keyword arguments, or a tuple, of which forward gets as
            many leading items as it requires. They are held in memory and gone through several times. Methods that
            look at the weights alone ("magnitude", "random") need none.
        sparsity: Fraction of zeros, in [0, 1); by layer ``{pattern: sparsity}``, what matches none stays dense; None:
            0.5, or ``1 - n/m`` for ``n:m``.
        method: "sparsegpt": the weights that stay make up for those that leave. Or a criterion that only says what
            leaves: a name in ``functional.criteria.CRITERIA`` ("magnitude", "wanda") or a callable
            ``(weight, stats) -> scores``. Or ``{name: arguments}``.
        granularity: What is removed together, as for :class:`~lightning_optim.WeightPruning`; "sparsegpt" knows
            "weight" and "n:m".
        module: Dotted name of the part to prune; default the whole model.
        include: Exactly what is pruned, instead of the default: matrices and kernels of all layers but norms,
            embeddings and the last Linear/Conv. Layers whose inputs cannot be read where the method needs them
            (experts, recurrent layers, attention in one call) are then left out too.
        exclude: What is left alone.
        inputs: Returns the arguments of forward for a batch, if the rule above does not fit.
        batches: Number of batches to use; default all.
        progress_bar: Whether a progress bar is shown.

    Returns:
        Masks, what was asked and reached, and why other parameters were left alone.

    Raises:
        ValueError: If nothing is selected, ``include`` names a layer that the method cannot prune, the method needs
            inputs and there are none, forward fails with the arguments taken from a batch, or an argument is out of
            range.

    References:
        Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = prune_weights(net, [torch.randn(64, 8)], granularity="2:4", progress_bar=False)
        >>> report.sparsity, int((net[0].weight == 0).sum())
        (0.5, 64)
    """
    check_flags(progress_bar=progress_bar)
    kind = parse_granularity(granularity)
    asked = checked_sparsity(0.5 if sparsity is None and kind.final_sparsity is None else sparsity, kind.final_sparsity)
    if asked == "hold":
        raise ValueError("`sparsity` must be a fraction in [0, 1) or a dict of them; 'hold' is for WeightPruning.")
    rule = _Rule.of(method, kind)
    prefix, target = find_target(model, module)
    selection = _select(model, target, prefix, rule, asked, include, exclude)
    try:
        goals = make_goals(selection.chosen, asked, scope="layer", initial={}, prefix=prefix)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    fractions = {name: goal.final for goal in goals for name in goal.names}
    calls = _calls(model, dataloader, inputs, batches) if rule.needs else []
    before = {name: weight.parameter.detach().to("cpu", copy=True) for name, weight in selection.chosen.items()}
    errors: dict[str, float] = {}
    try:
        missed = _prune(model, selection.chosen, fractions, rule, calls, errors, shown=progress_bar)
    except BaseException:
        for name, weight in selection.chosen.items():
            weight.parameter.data.copy_(before[name])
        raise
    masks = {name: each.parameter.detach() != 0 for name, each in selection.chosen.items() if name not in missed}
    if not masks:
        raise ValueError(f"prune_weights changed nothing: no batch reaches {', '.join(missed[:5])}.")
    left_out = {**dict.fromkeys(missed, "no batch reaches it"), **selection.left_out}
    return SparsityReport(masks, {name: fractions[name] for name in masks}, errors, left_out, granularity)


@dataclass(frozen=True)
class _Rule:
    """How weights are pruned.

    Attributes:
        sparsify: Returns the pruned weight; or
        criterion: scores the weights.
        granularity: What is removed together.
        needs: Statistics of inputs.
        draws: Whether the criterion draws random numbers.
    """

    sparsify: Sparsifier | None
    criterion: Criterion | None
    granularity: Granularity
    needs: tuple[str, ...]
    draws: bool

    @classmethod
    def of(cls, method: Any, granularity: Granularity) -> "_Rule":
        """Check a method.

        Raises:
            TypeError: If it is no method.
            ValueError: If it is unknown, needs what is not collected, or does not know the granularity.
        """
        name = next(iter(method), None) if isinstance(method, Mapping) else method
        makes_up = (isinstance(name, str) and name in SPARSIFIERS) or method in SPARSIFIERS.values()
        if isinstance(name, str) and name not in SPARSIFIERS and name not in CRITERIA:
            raise ValueError(
                f"unknown method {name!r}; known: {', '.join((*sorted(SPARSIFIERS), *sorted(CRITERIA)))}. A criterion "
                "(weight, stats) -> scores is accepted too."
            )
        rule: Any = (SPARSIFIERS if makes_up else CRITERIA).resolve(method)
        needs = needs_of(rule)
        inputs = tuple(need for need in needs if need in STATISTICS)
        for need in inputs:
            if not STATISTICS[need].reads_inputs:
                raise ValueError(
                    f"method={method!r} needs the {STATISTICS[need].title} of a training run: use "
                    "WeightPruning(criterion=...), or one that looks at weights and inputs ('sparsegpt', 'wanda')."
                )
        if makes_up:
            rule(torch.ones(1, 2), Statistics(input_second_moment=torch.eye(2)), 0.5, granularity)
            return cls(rule, None, granularity, inputs, False)
        return cls(None, rule, granularity, inputs, "generator" in needs)

    def apply(self, weight: Weight, sparsity: float, statistics: Mapping[str, Tensor]) -> float | None:
        """Prune a weight in place; returns the error of the outputs where second moments are known."""
        stored = weight.parameter.detach()
        moment = statistics.get("input_second_moment")
        if self.sparsify is not None:
            matrix = weight.matrices(stored)[0]
            pruned = self.sparsify(matrix, Statistics(generator=None, **statistics), sparsity, self.granularity)
            error = None if moment is None else output_error(matrix, pruned, moment)
            matrix.copy_(pruned)
            return error
        assert self.criterion is not None  # noqa: S101 - a rule has one of the two
        generator = parameter_generator(weight.name) if self.draws else None
        scores = scores_by_matrix(self.criterion, weight, stored, statistics, generator)
        name, before = weight.name, stored != 0
        previous = {} if bool(before.all()) else {name: before}
        mask = masks_by_matrix(
            {name: scores}, {name: weight}, sparsity, self.granularity, previous=previous, each=True
        )[name]
        pruned = stored.masked_fill(~mask, 0.0)
        error = None
        if moment is not None:
            error = output_error(weight.matrices(stored)[0], weight.matrices(pruned)[0], moment)
        stored.copy_(pruned)
        return error


def _select(
    model: nn.Module,
    target: nn.Module,
    prefix: str,
    rule: _Rule,
    sparsity: Any,
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
) -> Selection:
    """Select the weights that the method can prune.

    Raises:
        ValueError: If there is none, or ``include`` names one that it cannot prune.
    """
    patterns = sparsity if isinstance(sparsity, dict) else None
    selection = select(target, prefix, include=include, exclude=exclude, patterns=patterns)
    selection = without_misfits(selection, rule.granularity, ())
    holders: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        for parameter in layer._parameters.values():
            holders.setdefault(id(parameter), []).append(name)
    chosen, left_out = dict(selection.chosen), {}
    for name, weight in selection.chosen.items():
        layer_name = name.rpartition(".")[0]
        problem = problem_of(weight.parameter)
        if problem is not None:
            raise ValueError(f"prune_weights cannot prune {name}: it is {problem}. Pass exclude=[{layer_name!r}].")
        problems = (STATISTICS[need]().problem(name, weight.layer) for need in rule.needs)
        reason = next((f"its inputs are {problem}" for problem in problems if problem is not None), None)
        if rule.needs and len(holders[id(weight.parameter)]) > 1:
            reason = "other layers share it, and receive other inputs"
        if reason is None:
            continue
        if include is not None:
            raise ValueError(
                f"this method cannot prune {name}: {reason}. Pass exclude=[{layer_name!r}], or method='magnitude'."
            )
        left_out[name] = reason
        del chosen[name]
    left_out |= selection.left_out
    if not chosen:
        reasons = ", ".join(f"{names} ({reason})" for names, reason in by_reason(left_out)[:6])
        raise ValueError(
            f"prune_weights selects no layer: left out are {reasons or 'none, the module has no parameters'}. Name "
            "what to prune with include=[...]."
        )
    return Selection(chosen, left_out)


def _calls(
    model: nn.Module, dataloader: Iterable[Any] | None, inputs: Callable[[Any], Any] | None, batches: int | None
) -> list[ForwardInputs]:
    if dataloader is None:
        raise ValueError(
            "this method reads the inputs of the layers: pass a dataloader, or method='magnitude', which looks at the "
            "weights alone."
        )
    calls = list(batch_calls(model, dataloader, inputs, batches))
    if not calls:
        raise ValueError("the dataloader has no batch to take inputs from.")
    with evaluating(model), without_fast_path():
        try_batch(model, calls[0], inputs)
    return calls


def _prune(
    model: nn.Module,
    weights: Mapping[str, Weight],
    fractions: Mapping[str, float],
    rule: _Rule,
    calls: Sequence[ForwardInputs],
    errors: dict[str, float],
    *,
    shown: bool,
) -> list[str]:
    """Prune the weights in place; returns the names of those that no batch reaches."""
    of_layer = {name.rpartition(".")[0]: name for name in weights}

    def change(name: str, statistics: dict[str, Tensor]) -> None:
        try:
            error = rule.apply(weights[name], fractions[name], statistics)
        except ValueError as problem:
            raise ValueError(f"{name} cannot be pruned: {problem}") from problem
        if error is not None:
            errors[name] = error

    if not rule.needs:
        for name in weights:
            change(name, {})
        return []
    layers = {layer_name: weights[name].layer for layer_name, name in of_layer.items()}
    missed = change_layer_by_layer(
        model,
        layers,
        calls,
        rule.needs,
        lambda layer_name, statistics: change(of_layer[layer_name], statistics),
        title="pruning",
        shown=shown,
    )
    return [of_layer[layer_name] for layer_name in missed]
