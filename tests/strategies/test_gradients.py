"""Clipping of ordinary gradients against torch's; of divided ones in ``test_presets_run.py``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_optim.strategies.gradients import clip_by_norm, clip_by_value


def with_gradients(scale, seed=0):
    """Two parameter groups in double precision, one parameter without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)).double()
    for parameter in (*net[0].parameters(), *net[1].parameters()):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net, torch.optim.SGD([{"params": net[:1].parameters()}, {"params": net[1:].parameters()}], 0.1)


def gradients(net):
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 1e2), seed=st.integers(0, 100))
def test_by_norm_equals_torch(scale, limit, seed):
    net, optimizer = with_gradients(scale, seed)
    expected, _ = with_gradients(scale, seed)
    clip_by_norm(optimizer, limit)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), limit)
    for ours, theirs in zip(gradients(net), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 1e2), seed=st.integers(0, 100))
def test_by_value_equals_torch(scale, limit, seed):
    net, optimizer = with_gradients(scale, seed)
    expected, _ = with_gradients(scale, seed)
    clip_by_value(optimizer, limit)
    torch.nn.utils.clip_grad_value_(expected.parameters(), limit)
    assert all(torch.equal(*pair) for pair in zip(gradients(net), gradients(expected), strict=True))


def test_by_hand():
    """3, 4 and 12 have norm 13: clipped to 6.5 each is halved."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0]), torch.tensor(12.0)
    optimizer = torch.optim.SGD(parameters, 0.1)
    clip_by_norm(optimizer, 6.5)
    assert [*parameters[0].grad.tolist(), parameters[1].grad.item()] == pytest.approx([1.5, -2.0, 6.0], rel=1e-6)
    clip_by_value(optimizer, 1.75)
    assert [*parameters[0].grad.tolist(), parameters[1].grad.item()] == pytest.approx([1.5, -1.75, 1.75], rel=1e-6)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_by_value])
def test_zero_does_not_clip(clip):
    """As Lightning's own: ``gradient_clip_val=0`` is off."""
    net, optimizer = with_gradients(10.0)
    before = [gradient.clone() for gradient in gradients(net)]
    clip(optimizer, 0)
    assert all(torch.equal(*pair) for pair in zip(before, gradients(net), strict=True))


@pytest.mark.parametrize("clip", [clip_by_norm, clip_by_value])
def test_without_gradients_nothing_happens(clip):
    clip(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 1.0)


def test_a_norm_that_is_not_finite_spreads():
    """A NaN is not hidden: every gradient becomes NaN, as with torch."""
    net, optimizer = with_gradients(1.0)
    net[0].bias.grad[0] = torch.nan
    clip_by_norm(optimizer, 1.0)
    assert all(gradient.isnan().all() for gradient in gradients(net))
