"""Against optimal brain surgery by hand: one weight after the other, with an inverse made anew for each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_optim.functional.criteria import Statistics
from lightning_optim.functional.fake_quantize import fake_quantize_weight, grouped, integer_range, weight_scale
from lightning_optim.functional.group_scales import least_squares_scale
from lightning_optim.functional.rounding import ROUNDINGS, is_settled
from lightning_optim.functional.second_order import (
    inverse_factor,
    output_error,
    prune_columns,
    round_columns,
    settle_columns,
)

ROWS, INPUTS = 5, 12
GRANULARITIES = ("per_channel", "per_tensor", "per_group:4", "per_group:5")


def correlated(inputs: int = INPUTS, seed: int = 0, rows: int = 200) -> Tensor:
    """Vectors of inputs that share few causes, so that one can make up for another."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, 3, generator=generator) @ torch.randn(3, inputs, generator=generator)
    return causes + 0.3 * torch.randn(rows, inputs, generator=generator)


def weights(seed: int = 1, rows: int = ROWS, inputs: int = INPUTS) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def surgery(row: Tensor, hessian: Tensor, settle) -> Tensor:
    """Settle the weights of a row from left to right, each by the update of optimal brain surgery."""
    row = row.double().clone()
    for place in range(len(row)):
        inverse = torch.linalg.inv(hessian[place:, place:])
        value = settle(place, row[place:], inverse)
        row[place:] -= (row[place] - value) / inverse[0, 0] * inverse[0]
        row[place] = value
    return row


def hessian_of(x: Tensor, damping: float = 0.01) -> Tensor:
    hessian = 2.0 * x.double().T @ x.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_is_optimal_brain_surgery_with_one_scale_a_row(bits):
    x, weight = correlated(), weights()
    hessian, top = hessian_of(x), integer_range(bits, symmetric=True)[1]
    by_hand = []
    for row in weight:
        largest = int(row.abs().argmax())
        step = float(row.abs().max()) / top

        def settle(place, rest, inverse, step=step, largest=largest):
            if place == largest:
                return rest[0].sign() * top * step
            return (rest[0] / step).round().clamp(-top, top) * step

        by_hand.append(surgery(row, hessian, settle))
    found = round_columns(weight, x.T @ x, bits, "per_channel")
    torch.testing.assert_close(found.double(), torch.stack(by_hand), rtol=1e-6, atol=1e-6)


def test_rounding_of_groups_takes_each_scale_when_its_group_is_reached():
    x, weight, bits, size = correlated(), weights(), 3, 4
    hessian, top = hessian_of(x), 3
    by_hand = []
    for row in weight:
        state = {}

        def settle(place, rest, inverse, state=state):
            if place % size == 0:
                step = float(least_squares_scale(rest[:size].float(), bits))
                state.update(step=step, largest=place + int(rest[:size].abs().argmax()))
            if place == state["largest"]:
                return rest[0].sign() * top * state["step"]
            return (rest[0] / state["step"]).round().clamp(-top, top) * state["step"]

        by_hand.append(surgery(row, hessian, settle))
    found = round_columns(weight, x.T @ x, bits, f"per_group:{size}")
    torch.testing.assert_close(found.double(), torch.stack(by_hand), rtol=1e-6, atol=1e-6)


def test_activation_order_settles_the_inputs_of_most_energy_first():
    x, weight = correlated() * torch.linspace(0.2, 3.0, INPUTS), weights()
    order = (x.T @ x).diagonal().argsort(descending=True)
    straight = round_columns(weight[:, order], (x.T @ x)[order][:, order], 3, "per_channel")
    found = round_columns(weight, x.T @ x, 3, "per_channel", activation_order=True)
    torch.testing.assert_close(found[:, order], straight)
    grouped_found = round_columns(weight, x.T @ x, 3, "per_group:4", activation_order=True)
    assert torch.equal(weight_scale(grouped_found, 3, "per_group:4"), weight_scale(weight, 3, "per_group:4"))


@pytest.mark.parametrize("keep", [None, (2, 4), (1, 4)])
def test_pruning_is_optimal_brain_surgery_with_the_masks_it_chose(keep):
    """The masks by hand: the least cost w²/[H⁻¹] of a block (here the matrix), or of each group of a row."""
    x, weight = correlated(), weights()
    hessian = hessian_of(x)
    found = prune_columns(weight, x.T @ x, 0.5, keep=keep)
    # diag(U)² of the whole inverse: the first diagonal entry of the inverse of what is left at that column
    costs = torch.stack([torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(INPUTS)])
    if keep is None:
        scores = (weight.double().square() / costs).flatten()
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[scores.argsort()[: weight.numel() // 2]] = False
        mask = mask.view_as(weight)
        by_hand = torch.stack(
            [surgery(w, hessian, lambda i, rest, _, m=m: rest[0] * m[i]) for w, m in zip(weight, mask, strict=True)]
        )
    else:
        n, m = keep
        by_hand = []
        for row in weight:
            mask = torch.ones(INPUTS, dtype=torch.bool)

            def settle(place, rest, inverse, mask=mask):
                if place % m == 0:
                    cost = rest[:m].square() / costs[place : place + m]
                    mask[place : place + m][cost.argsort()[: m - n]] = False
                return rest[0] * mask[place]

            by_hand.append(surgery(row, hessian, settle))
        by_hand = torch.stack(by_hand)
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, by_hand == 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(
    method=st.sampled_from(["gptq", {"gptq": {"activation_order": True}}, {"gptq": {"damping": 0.5}}]),
    seed=st.integers(0, 30),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_rounded_is_found_again(granularity, method, seed, bits, dtype):
    """Scales and integers of what comes back are those that were chosen: rounding it again changes no integer."""
    x, weight = correlated(seed=seed), weights(seed).to(dtype)
    weight[0, 2:5] = 0.0
    weight[1] = 0.0
    found = ROUNDINGS.resolve(method)(weight, Statistics(input_second_moment=x.T @ x), bits, granularity)
    assert found.dtype == dtype
    assert (found[weight == 0] == 0).all()  # a mask's zeros stay
    assert is_settled(found, bits, granularity)
    scale = weight_scale(found, bits, granularity)
    quotients = grouped(found.float(), granularity) / scale
    top = integer_range(bits, symmetric=True)[1]
    assert float(quotients.abs().max()) == pytest.approx(top, rel=0.01)
    assert float((quotients - quotients.round()).abs().max()) < (1e-3 if dtype == torch.float32 else 0.45)
    again = fake_quantize_weight(found.float(), bits, granularity)
    assert torch.equal((grouped(again, granularity) / scale).round(), quotients.round())
    if not isinstance(method, dict) and not granularity.startswith("per_group"):
        assert torch.equal(scale, weight_scale(weight, bits, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_correlated_inputs_lose_less_than_by_rounding_to_the_nearest(granularity):
    x, weight = correlated(64), weights(rows=32, inputs=64)
    moment = x.T @ x
    error = output_error(weight, round_columns(weight, moment, 3, granularity), moment)
    assert error < 0.5 * output_error(weight, fake_quantize_weight(weight, 3, granularity), moment)
    outputs, ours = x @ weight.T, x @ round_columns(weight, moment, 3, granularity).T
    assert error == pytest.approx(float((ours - outputs).square().sum() / outputs.square().sum()), rel=1e-3)


def test_blocks_do_not_change_the_result():
    """300 columns are three blocks: the lazy updates between them must be those of one column after the other."""
    x, weight = correlated(300, rows=900), weights(rows=3, inputs=300)
    hessian = hessian_of(x)

    def to_nearest(place, rest, inverse):
        return (rest[0] * 4).round() / 4

    by_hand = torch.stack([surgery(row, hessian, to_nearest) for row in weight])
    factor = inverse_factor(x.T @ x)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian / 2), rtol=1e-3, atol=1e-6)
    found = settle_columns(weight.double(), factor, lambda column, block: (block[:, 0] * 4).round() / 4)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)


@given(sparsity=st.floats(0.0, 0.99), seed=st.integers(0, 20), rows=st.integers(1, 7))
def test_the_sparsity_that_is_asked_is_reached_within_one_weight(sparsity, seed, rows):
    x, weight = correlated(150, seed), weights(seed, rows, 150)
    weight[:, ::7] = 0.0
    zeros = int((prune_columns(weight, x.T @ x, sparsity) == 0).sum())
    asked = sparsity * weight.numel()
    assert zeros >= int((weight == 0).sum())
    if asked > 0.2 * weight.numel():
        assert abs(zeros - asked) <= 1


def test_pruning_makes_up_for_what_leaves():
    x, weight = correlated(64), weights(rows=32, inputs=64)
    moment = x.T @ x
    smallest = weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values
    magnitude = weight.masked_fill(smallest, 0.0)
    error = output_error(weight, prune_columns(weight, moment, 0.5), moment)
    assert error < 0.2 * output_error(weight, magnitude, moment)
    pairs = prune_columns(weight, moment, 0.5, keep=(2, 4))
    assert ((pairs.view(32, 16, 4) != 0).sum(2) <= 2).all()
    assert error < output_error(weight, pairs, moment) < output_error(weight, magnitude, moment)


def test_inputs_that_are_always_zero_and_inputs_that_depend_on_each_other():
    x, weight = correlated(), weights()
    x[:, 3] = 0.0
    x[:, 4] = x[:, 5]
    moment = x.T @ x
    found = round_columns(weight, moment, 4, "per_channel")
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 3], fake_quantize_weight(weight, 4)[:, 3])  # nothing speaks for another value
    pruned = prune_columns(weight, moment, 0.5)
    assert torch.isfinite(pruned).all()
    with pytest.raises(ValueError, match=r"linearly dependent and damping=0\.0"):
        prune_columns(weight, moment, 0.5, damping=0.0)
    with pytest.raises(ValueError, match="not all finite"):
        prune_columns(weight, moment * torch.nan, 0.5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptqq", "unknown rounding 'gptqq'; known: gptq, round"),
        ({"gptq": {"damp": 1}}, "no argument 'damp'; known: damping, activation_order"),
        ({"gptq": {"damping": -1.0}}, "`damping` must be a number >= 0"),
    ],
)
def test_roundings_are_checked_when_they_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        ROUNDINGS.resolve(method)
