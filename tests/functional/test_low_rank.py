"""Low rank without a Trainer: what is lost is what the singular values say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.criteria import Statistics, parameter_generator
from lightning_optim.functional.low_rank import (
    LOW_RANK_CRITERIA,
    energy_kept,
    largest_useful_rank,
    rank_for_energy,
    second_moment,
    svd,
)


def example(outputs=7, inputs=10, rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(1, -1, inputs)
    return weight, torch.randn(rows, inputs, generator=generator) @ mixing


def statistics(x, name="net.0.weight"):
    norms = x.square().sum(0, keepdim=True).sqrt()
    return Statistics(input_second_moment=x.T @ x, input_norm=norms, generator=parameter_generator(name))


def of_rank(weight, found, rank):
    return weight.double() @ found.back[:, :rank] @ found.reduce[:rank]


def loss(weight, found, rank, x):
    return float(((weight.double() - of_rank(weight, found, rank)) @ x.double().T).square().sum())


@pytest.mark.parametrize("name", LOW_RANK_CRITERIA)
@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (1, 5), (5, 1)])
def test_every_criterion_gives_dual_bases_and_the_whole_weight_at_full_rank(name, shape):
    weight, x = example(*shape)
    found = LOW_RANK_CRITERIA[name](weight, statistics(x))
    number = len(found.energies)
    assert number == min(shape)
    torch.testing.assert_close(found.reduce @ found.back, torch.eye(number).double())
    if number == shape[1] or name != "random":
        torch.testing.assert_close(of_rank(weight, found, number), weight.double())
    assert float(found.energies.sum()) <= found.total * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_loss_of_the_outputs_is_the_squared_singular_values_left_out(rank):
    """Theorem of Wang et al. 2024 (SVD-LLM)."""
    weight, x = example()
    found = second_moment(weight, statistics(x), damping=0.0)
    assert loss(weight, found, rank, x) == pytest.approx(float(found.energies[rank:].sum()), rel=1e-4)
    kept = 1 - loss(weight, found, rank, x) / float((weight @ x.T).square().sum())
    assert energy_kept(found, rank) == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_criterion_loses_less(rank):
    weight, x = example()
    lost = {
        name: loss(weight, criterion(weight, statistics(x)), rank, x) for name, criterion in LOW_RANK_CRITERIA.items()
    }
    best = loss(weight, second_moment(weight, statistics(x), damping=0.0), rank, x)
    assert all(best <= other * (1 + 1e-6) for other in lost.values())
    assert lost["second_moment"] < lost["svd"] < lost["random"]


def test_the_scale_of_the_statistics_does_not_matter():
    weight, x = example()
    found, scaled = (second_moment(weight, statistics(factor * x)) for factor in (1.0, 30.0))
    torch.testing.assert_close(of_rank(weight, found, 3), of_rank(weight, scaled, 3), rtol=1e-3, atol=1e-4)


def test_inputs_that_were_never_seen_keep_their_weights_at_full_rank():
    weight, x = example()
    x[:, :4] = 0
    found = second_moment(weight, statistics(x))
    torch.testing.assert_close(of_rank(weight, found, 7).float(), weight, rtol=1e-3, atol=1e-3)


@given(energy=st.floats(0.01, 1.0), seed=st.integers(0, 20))
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy, seed):
    weight, _ = example(seed=seed)
    found = svd(weight, Statistics())
    rank = rank_for_energy(found, energy)
    assert energy_kept(found, rank) >= energy - 1e-6
    assert rank == 1 or energy_kept(found, rank - 1) < energy


@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40))
def test_the_largest_useful_rank_is_the_last_at_which_two_are_smaller(outputs, inputs):
    rank = largest_useful_rank(outputs, inputs)
    assert rank * (outputs + inputs) < outputs * inputs or rank == 0
    assert (rank + 1) * (outputs + inputs) >= outputs * inputs


def test_directions_of_no_weight_are_left_out():
    weight = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
    assert len(svd(weight, Statistics()).energies) == 1
    assert len(svd(torch.zeros(3, 4), Statistics()).energies) == 0


def test_the_control_is_the_same_for_the_same_name():
    weight, x = example()
    ones = [LOW_RANK_CRITERIA["random"](weight, statistics(x, name)) for name in ("a", "a", "b")]
    assert torch.equal(ones[0].reduce, ones[1].reduce)
    assert not torch.equal(ones[0].reduce, ones[2].reduce)


@pytest.mark.parametrize("name", ["second_moment", "input_norm"])
@pytest.mark.parametrize(
    ("x", "error"),
    [(torch.zeros(3, 10), "all zero"), (torch.full((3, 10), torch.nan), "not finite"), (None, "which is missing")],
    ids=["zero", "nan", "missing"],
)
def test_inputs_that_say_nothing_are_refused(name, x, error):
    weight, _ = example()
    with pytest.raises(ValueError, match=error):
        LOW_RANK_CRITERIA[name](weight, Statistics() if x is None else statistics(x))


def test_arguments_are_checked_when_they_are_given():
    with pytest.raises(ValueError, match="`damping` must be >= 0, got -1"):
        LOW_RANK_CRITERIA.resolve({"second_moment": {"damping": -1}})
    with pytest.raises(ValueError, match="unknown low-rank criterion 'pca'; known: input_norm"):
        LOW_RANK_CRITERIA.resolve("pca")
