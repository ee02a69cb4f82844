import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.fake_quantize import fake_quantize, fake_quantize_weight, symmetric_scale
from lightning_optim.functional.learned_step import (
    first_step,
    learned_fake_quantize,
    learned_fake_quantize_weight,
    learned_step,
    learned_zero_point,
)


def as_the_paper_writes_it(x, step, low, high, scale):
    """Equations 1 to 3 of Esser et al. 2020, with the round and the scale of the gradient in autograd's words."""
    step = (step - step * scale).detach() + step * scale
    v = (x / step).clamp(low, high)
    return (v + (v.round() - v).detach()) * step


@given(bits=st.integers(2, 8), seed=st.integers(0, 1000))
def test_gradients_are_those_of_the_paper(bits, seed):
    torch.manual_seed(seed)
    high = 2 ** (bits - 1) - 1
    x, upper = torch.randn(40), torch.randn(40)
    results = []
    for function in (as_the_paper_writes_it, lambda x, s, low, high, g: learned_fake_quantize(x, s, 0, low, high, g)):
        leaves = x.clone().requires_grad_(), torch.tensor([2.3 / high]).requires_grad_()
        y = function(*leaves, -high, high, 0.1)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, upper)))
    for paper, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, paper, rtol=1e-4, atol=1e-5)


def test_zero_points_learn_as_in_torchs_own_operator():
    torch.manual_seed(0)
    x = 2 * torch.randn(200)
    x = x[((x / 0.3 + 6 - 7.5).abs() - 7.75).abs() > 0.26]  # torch counts half a step beyond the ends as inside
    upper = torch.randn(len(x))
    step, zero = torch.tensor([0.3], requires_grad=True), torch.tensor([6.0], requires_grad=True)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, 0, 15, 0.25)
    ours = learned_fake_quantize(x, step, zero, 0, 15, 0.25)
    torch.testing.assert_close(ours, theirs)
    wanted = torch.autograd.grad(theirs, (step, zero), upper)
    for got, expected in zip(torch.autograd.grad(ours, (step, zero), upper), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_it_rounds_as_fixed_steps_do():
    x, step = torch.randn(50), torch.tensor([0.02])
    assert torch.equal(learned_fake_quantize(x, step, 7, 0, 255, 1.0), fake_quantize(x, step, 7, 0, 255))
    weight = torch.randn(4, 3, 2)
    for granularity in ("per_channel", "per_tensor"):
        same = symmetric_scale(weight, 8, granularity).flatten()
        rounded = learned_fake_quantize_weight(weight, same, 8, granularity)
        assert torch.equal(rounded, fake_quantize_weight(weight, 8, granularity))


def test_sgd_moves_the_step_as_if_it_was_the_parameter():
    x, first, rate = torch.randn(64), torch.tensor([0.4]), 1e-3
    step = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(learned_fake_quantize(x, step, 0, -7, 7, 0.1).square().sum(), step)
    parameter = torch.zeros(1, requires_grad=True)
    rounded = learned_fake_quantize(x, learned_step(parameter, first), 0, -7, 7, 0.1)
    rounded.square().sum().backward()
    moved = learned_step(parameter - rate * parameter.grad, first)
    torch.testing.assert_close(moved.detach(), first - rate * gradient, rtol=1e-4, atol=0)


def test_sgd_moves_the_lower_end_as_if_it_was_the_parameter():
    x, upper, step, first, rate = 3 * torch.randn(64), torch.randn(64), torch.tensor([0.25]), torch.tensor([5]), 1e-4
    low = (-step * 5).clone().requires_grad_()
    clipped = x / step + 5
    # As LSQ+ writes it: what is clipped moves with the lower end, what is inside does not.
    (low * ((clipped < 0) | (clipped > 15)) * upper).sum().backward()
    parameter = torch.zeros(1, requires_grad=True)
    zero = learned_zero_point(parameter, first, step, 4)
    (learned_fake_quantize(x, step, zero, 0, 15, 1.0) * upper).sum().backward()
    moved = -step * (first + 15 * -rate * parameter.grad)  # before it is rounded
    torch.testing.assert_close(moved, (low - rate * low.grad).detach(), rtol=1e-5, atol=0)


def test_a_zero_point_stays_in_its_range_and_comes_back():
    parameter, step = torch.tensor([-0.2], requires_grad=True), torch.tensor([1.0])
    for sign, expected in ((1.0, 0.0), (-1.0, -1 / 15)):  # outwards is lost, inwards passes
        zero = learned_zero_point(parameter, torch.tensor([1]), step, 4)
        assert float(zero.detach()) == 0.0
        (gradient,) = torch.autograd.grad(zero * sign, parameter)
        assert float(gradient) == pytest.approx(expected)


@given(value=st.floats(-60, 60))
def test_a_step_is_positive_whatever_the_parameter(value):
    assert float(learned_step(torch.tensor([value]), torch.tensor([0.1]))) > 0


def test_the_first_step_is_the_papers_unless_that_clips_nothing():
    weight = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    mean = weight.abs().mean(1)
    torch.testing.assert_close(first_step(weight, 3), 2 * mean / 3**0.5)
    torch.testing.assert_close(first_step(weight, 8), weight.abs().amax(1) / 127)
    assert first_step(weight, 3, "per_tensor").shape == (1,)
    assert first_step(torch.zeros(2, 3), 4).gt(0).all()
