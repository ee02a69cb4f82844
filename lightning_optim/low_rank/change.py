"""The change of a model: some of its layers become two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_optim.change import Kept
from lightning_optim.checkpoint import plan_of
from lightning_optim.functional.criteria import Statistics, parameter_generator
from lightning_optim.functional.low_rank import LowRankCriterion, energy_kept, largest_useful_rank
from lightning_optim.functional.statistics import needs_of
from lightning_optim.low_rank.layers import LowRank, make_low_rank, matrix_of
from lightning_optim.low_rank.selection import RankGoal
from lightning_optim.tables import Listing, by_reason, by_stack
from lightning_optim.target import Weight

__all__ = ["NOT_SEEN", "Decided", "Factorization", "Factors", "LayerRank", "decide", "rank_listing"]


@dataclass(frozen=True)
class LayerRank:
    """What a layer became.

    Attributes:
        rank: Number of features between its factors.
        full: The largest rank it could have: the smaller of its inputs and outputs.
        energy: Fraction of the energy that is kept, as the criterion weights it.
        parameters: Numbers in its weight before, and in both factors after.
    """

    rank: int
    full: int
    energy: float
    parameters: tuple[int, int]

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain types."""
        return {"rank": self.rank, "full": self.full, "energy": self.energy, "parameters": list(self.parameters)}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "LayerRank":
        """Read what :meth:`as_plain` wrote."""
        before, after = plain["parameters"]
        return cls(plain["rank"], plain["full"], plain["energy"], (before, after))


@dataclass(frozen=True)
class Factors:
    """How a layer's weight is factorized: ``reduce`` ``[rank, in]``, and ``expand = weight @ back``, ``[in, rank]``."""

    reduce: Tensor
    back: Tensor

    def to(self, device: Any) -> "Factors":
        """Return them on another device."""
        return Factors(self.reduce.to(device), self.back.to(device))


NOT_SEEN = "stays whole: no batch reached it"


@dataclass(frozen=True)
class Decided:
    """What is to be done to one layer: its factors and what it will be, or why it stays whole."""

    factors: Factors | None
    becomes: LayerRank | None
    stays: str = ""

    def to(self, device: Any) -> "Decided":
        """Return it with the factors on another device."""
        return self if self.factors is None else replace(self, factors=self.factors.to(device))


def decide(
    name: str,
    weight: Weight,
    goal: RankGoal,
    prefix: str,
    criterion: LowRankCriterion,
    collected: Mapping[str, Tensor],
) -> Decided:
    """Choose the factors of one layer.

    Args:
        name: The layer's name.
        weight: Its weight.
        goal: What is asked.
        prefix: Prefix of the target's names.
        criterion: Chooses the directions.
        collected: The statistics that it needs, by name.
    """
    matrix = matrix_of(weight.layer)
    generator = parameter_generator(f"{name}.weight") if "generator" in needs_of(criterion) else None
    if matrix.device.type == "mps":  # which has no float64
        matrix, collected = matrix.cpu(), {key: tensor.cpu() for key, tensor in collected.items()}
    try:
        directions = criterion(matrix, Statistics(generator=generator, **collected))
    except ValueError as error:
        return Decided(None, None, f"stays whole: {error}".rstrip("."))
    if not len(directions.energies):
        return Decided(None, None, "stays whole: its weight is zero")
    value = goal.of_layer(name, weight.layer, prefix)
    if value is None:
        return Decided(None, None, f"stays whole: no pattern of `{goal.argument}` matches it")
    rank = goal.rank_in(value, directions, matrix)
    useful = largest_useful_rank(*matrix.shape)
    kept = energy_kept(directions, rank)
    full = min(matrix.shape)
    if rank > useful:
        return Decided(
            None,
            None,
            f"stays whole: rank {rank} of {full} keeps {kept:.1%} of the energy; two factors are smaller up to rank "
            f"{useful}",
        )
    factors = Factors(directions.reduce[:rank], directions.back[:, :rank]).to(weight.parameter.device)
    outputs, inputs = matrix.shape
    return Decided(factors, LayerRank(rank, full, kept, (outputs * inputs, rank * (outputs + inputs))))


@dataclass(frozen=True)
class Factorization:
    """A change of a whole model; called on an averaged copy too.

    A copy gets the model's ``reduce``, and its own weights on those directions as ``expand``: factors that were chosen
    for each by itself would have other signs and bases, and averages of them would mean nothing.

    Attributes:
        factors: By the layer's name.
    """

    factors: Mapping[str, Factors]

    @classmethod
    def of(cls, decided: Mapping[str, Decided]) -> "Factorization":
        """Return the change of those layers that become two."""
        return cls({name: each.factors for name, each in decided.items() if each.factors is not None})

    def __call__(self, root: nn.Module) -> Kept | None:
        """Make the layers of a model two of low rank."""
        plan = plan_of(root)
        for name, factors in self.factors.items():
            plan.track(name)
            layer = root.get_submodule(name)
            if isinstance(layer, LowRank):  # under another name of the same layer
                continue
            weight = matrix_of(layer).to(factors.back.dtype)
            make_low_rank(layer, factors.reduce.to(weight.device), weight @ factors.back.to(weight.device))
        return None


def rank_listing(
    ranks: Mapping[str, LayerRank], left_out: Mapping[str, str], *, title: str = "", before: Sequence[str] = ()
) -> Listing:
    """Return a table of the layers that became two, and of those that did not."""
    rows = by_stack(
        (name, f"{each.rank} of {each.full}", f"{each.energy:.1%}", f"{each.parameters[0]:,} -> {each.parameters[1]:,}")
        for name, each in ranks.items()
    )
    rows += [(names, "", "", reason) for names, reason in by_reason(left_out)]
    columns = ("layer", "rank", "energy kept", "parameters, or why not")
    return Listing(columns, rows, title=title, before=before)
