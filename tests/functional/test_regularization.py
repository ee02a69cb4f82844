"""Penalties on coupled channels: their steps against autograd and by hand, and the units that they act on."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_optim.functional.regularization import (
    REGULARIZATIONS,
    GroupLasso,
    Growing,
    entries_of_units,
    scale_units,
    unit_norms,
)


def coupled(units=5, seed=0):
    """Two layers of a group: units in dimension 0 of one and in dimension 1 of the other."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(units, 3, generator=generator, dtype=torch.float64)
    second = torch.randn(4, units, generator=generator, dtype=torch.float64)
    return first, second


def norms_of(first, second):
    return (first.square().sum(1) + second.square().sum(0)).sqrt()


@pytest.mark.parametrize("name", sorted(REGULARIZATIONS))
def test_a_small_step_is_the_gradient_of_the_written_penalty(name):
    rule, leaving = REGULARIZATIONS[name](), torch.tensor([True, False, True, False, False])
    weights = [tensor.requires_grad_() for tensor in coupled()]
    gradients = torch.autograd.grad(rule.penalty(norms_of(*weights), leaving), weights)
    amount = 1e-7
    factors = rule.factors(norms_of(*weights).detach(), leaving, amount)
    first, second = (weight.detach() for weight in weights)
    moved = (first - first * factors[:, None], second - second * factors)
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step / amount, gradient, rtol=1e-5, atol=1e-6)


def test_group_lasso_solves_the_proximal_problem():
    """``argmin_v |v - w|^2 / 2 + sum t_k |v_k|``: its subgradient holds zero, for units that stay and for zeros."""
    weights, amount = coupled(), 0.95
    norms = norms_of(*weights)
    factors = GroupLasso().factors(norms, torch.zeros(5, dtype=torch.bool), amount)
    places = (norms - norms.min()) / (norms.max() - norms.min())
    threshold = amount * norms.mean() * 2 ** (-4 * places)
    assert 0 < int((factors == 0).sum()) < 5
    assert torch.equal(factors == 0, norms <= threshold)
    now = [(weights[0] * factors[:, None]).requires_grad_(), (weights[1] * factors).requires_grad_()]
    values = norms_of(*now)
    stay = factors > 0
    objective = sum(0.5 * (v - w).square().sum() for v, w in zip(now, weights, strict=True))
    objective = objective + (threshold * values)[stay].sum()
    first, second = torch.autograd.grad(objective, now)
    torch.testing.assert_close(first[stay], torch.zeros_like(first[stay]))
    torch.testing.assert_close(second[:, stay], torch.zeros_like(second[:, stay]))


def test_group_lasso_by_hand():
    """The mean norm is 3; its weights are 1 for the smallest unit, 1/4 half-way, and 1/16 for the largest."""
    rule, leaving = GroupLasso(), torch.zeros(4, dtype=torch.bool)
    factors = rule.factors(torch.tensor([1.0, 3.0, 3.0, 5.0]), leaving, 0.5)
    assert factors.tolist() == pytest.approx([0.0, 1 - 1.5 / 4 / 3, 1 - 1.5 / 4 / 3, 1 - 1.5 / 16 / 5])
    assert rule.factors(torch.full((4,), 2.0), leaving, 0.5).tolist() == [0.5] * 4


def test_growing_by_hand():
    rule = Growing()
    assert [rule.passed(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.0625, 0.25, 1.0]
    factors = rule.factors(torch.tensor([3.0, 4.0]), torch.tensor([True, False]), 0.5)
    assert factors.tolist() == pytest.approx([math.exp(-0.5), 1.0])


@pytest.mark.parametrize("name", sorted(REGULARIZATIONS))
def test_what_every_regularization_keeps(name):
    rule = REGULARIZATIONS[name]()
    norms, leaving = torch.rand(20) * 3, torch.arange(20) % 3 == 0
    passed = [rule.passed(step / 50) for step in range(51)]
    assert (passed[0], passed[-1]) == (0.0, 1.0)
    assert passed == sorted(passed)
    assert torch.equal(rule.factors(norms, leaving, 0.0), torch.ones(20))
    for amount in (0.01, 1.0, 100.0):
        factors = rule.factors(norms, leaving, amount)
        assert bool(((factors >= 0) & (factors <= 1)).all())
        assert factors.shape == norms.shape
        if rule.chooses:
            assert torch.equal(factors[~leaving], torch.ones(13))
    assert rule.strength > 0


def test_growing_adds_up_over_uneven_steps():
    """However the way is divided, the same is left at its end."""
    rule, leaving = Growing(), torch.ones(1, dtype=torch.bool)
    for steps in ([0.0, 1.0], [0.0, 0.1, 0.15, 0.8, 1.0]):
        left = torch.ones(1, dtype=torch.float64)
        for before, now in pairwise(steps):
            left *= rule.factors(left, leaving, 3.0 * (rule.passed(now) - rule.passed(before)))
        assert float(left) == pytest.approx(math.exp(-3.0))


# Units.


def test_norms_and_scales_over_flattened_channels():
    """A convolution of two channels, and a Linear that reads each channel's four pixels."""
    kernel, reader = torch.randn(2, 3, 3, 3), torch.randn(5, 8)
    units = [torch.tensor([[0], [1]]), torch.tensor([[0]] * 4 + [[1]] * 4)]
    norms = unit_norms([kernel, reader], [0, 1], [entries_of_units(each, 2) for each in units])
    wanted = [(kernel[c].square().sum() + reader[:, 4 * c : 4 * c + 4].square().sum()).sqrt() for c in (0, 1)]
    torch.testing.assert_close(norms, torch.stack(wanted))
    factors, before = torch.tensor([0.5, 1.0]), reader.clone()
    scale_units(kernel, 0, units[0], factors)
    scale_units(reader, 1, units[1], factors)
    assert torch.equal(reader[:, :4], before[:, :4] * 0.5)
    assert torch.equal(reader[:, 4:], before[:, 4:])


def test_indices_of_no_unit_and_of_several():
    """Index 2 belongs to no unit, index 1 leaves with either: it takes the smaller factor and counts in both norms."""
    weight, units = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 2], [0, 1], [2, 2]])
    entries = entries_of_units(units, 2)
    assert entries.tolist() == [[0, 1], [1, 3]]
    assert unit_norms([weight], [0], [entries]).tolist() == pytest.approx([5**0.5, 2.0])
    scale_units(weight, 0, units, torch.tensor([0.5, 0.25]))
    assert weight.tolist() == [0.5, 0.5, 3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_of_half_precision_are_summed_in_float32(dtype):
    weight = torch.full((2, 4096), 0.01, dtype=dtype)
    norms = unit_norms([weight], [0], [torch.tensor([[0], [1]])])
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms, weight.to(norms.dtype).norm(dim=1))
    scale_units(weight, 0, torch.tensor([[0], [1]]), torch.tensor([0.5, 1.0], dtype=norms.dtype))
    assert weight.dtype == dtype


def test_a_regularization_of_ones_own_is_known_by_name():
    from lightning_optim.callbacks import ChannelPruning

    with pytest.raises(ValueError, match="unknown regularization 'lasso'; known: 'group_lasso', 'growing', or None"):
        ChannelPruning(regularization="lasso")
