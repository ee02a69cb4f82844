import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.fake_quantize import (
    affine_parameters,
    fake_quantize,
    fake_quantize_weight,
    integer_range,
    parse_weight_granularity,
    symmetric_scale,
    weight_scale,
)

BITS = st.integers(2, 8)
GRANULARITIES = ("per_tensor", "per_channel", "per_group:5")


def tensor(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(bits=BITS, seed=st.integers(0, 99), low=st.floats(-5, 0.5), width=st.floats(0.01, 10))
def test_inside_its_range_it_errs_by_half_a_step_at_most(bits, seed, low, width):
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(low + width), bits)
    quant_min, quant_max = integer_range(bits, symmetric=False)
    bottom, top = (float((q - zero_point) * scale) for q in (quant_min, quant_max))
    x = bottom + (top - bottom) * torch.rand(50, generator=torch.Generator().manual_seed(seed))
    rounded = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    assert float((rounded - x).abs().max()) <= float(scale) * 0.5 * (1 + 1e-3)
    again = fake_quantize(rounded, scale, zero_point, quant_min, quant_max)
    assert torch.equal(again, rounded)
    assert float(fake_quantize(torch.zeros(1), scale, zero_point, quant_min, quant_max)) == 0.0


@given(bits=BITS, seed=st.integers(0, 99), granularity=st.sampled_from(GRANULARITIES))
def test_weights_keep_their_zeros_and_are_not_clipped(bits, seed, granularity):
    weight = tensor(seed, 4, 3, 4)
    weight[:, 1] = 0.0
    rounded = fake_quantize_weight(weight, bits, granularity)
    assert rounded.shape == weight.shape
    assert not rounded[:, 1].any()
    if bits > 4 or not granularity.startswith("per_group"):  # narrow groups clip where that errs less
        step = float(symmetric_scale(weight, bits, granularity).max())
        assert float((rounded - weight).abs().max()) <= 0.5 * step * (1 + 1e-3)


@given(bits=BITS, seed=st.integers(0, 99), size=st.sampled_from([5, 16, 32]), magnitude=st.sampled_from([1e-3, 1, 1e3]))
def test_scales_of_groups_are_float16_and_rounding_again_changes_nothing(bits, seed, size, magnitude):
    weight = magnitude * tensor(seed, 6, 3 * size)
    weight[0, :size] = 0.0
    weight[1] *= (torch.arange(3 * size) % 4 == 0) / 50  # few weights, and small beside those of other rows
    granularity = f"per_group:{size}"
    scale = weight_scale(weight, bits, granularity)
    assert torch.equal(scale, scale.half().float())
    rounded = fake_quantize_weight(weight, bits, granularity)
    integers = rounded.view(6, 3, size) / scale
    top = 2 ** (bits - 1) - 1
    assert torch.equal(integers, integers.round())
    assert float(integers.abs().max()) == top
    if bits <= 4:
        assert torch.equal(fake_quantize_weight(rounded, bits, granularity), rounded)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.92), (3, 0.78), (2, 0.45)])
def test_searched_scales_err_less_than_those_of_the_largest_weight(bits, most):
    weight = tensor(0, 64, 32 * 16)
    groups = weight.view(64, 16, 32)
    largest = symmetric_scale(weight, bits, "per_group:32")
    plain = ((groups / largest).round() * largest - groups).square().sum()
    searched = (fake_quantize_weight(weight, bits, "per_group:32") - weight).square().sum()
    assert float(searched / plain) < most


def test_the_searched_scale_is_near_the_best_of_many():
    groups = tensor(3, 200, 32)
    largest = groups.abs().amax(1)
    errors = []
    for part in torch.linspace(0.4, 1.4, 400):  # every scale that may be good
        scale = (part * largest / 7)[:, None]
        errors.append(((groups / scale).round().clamp(-7, 7) * scale - groups).square().sum(1))
    best = torch.stack(errors).amin(0)
    ours = (fake_quantize_weight(groups, 4, "per_group:32") - groups).square().sum(1)
    assert float(ours.sum() / best.sum()) < 1.04


def test_gradients_of_a_clipped_weight_pass_unchanged():
    weight = tensor(0, 4, 32).requires_grad_()
    fake_quantize_weight(weight, 2, "per_group:32").mul(2).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_per_channel_agrees_with_torch(bits):
    weight = tensor(0, 6, 5)
    quant_min, quant_max = integer_range(bits, symmetric=True)
    scale = weight.abs().amax(1) / quant_max
    expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(6), 0, quant_min, quant_max)
    torch.testing.assert_close(fake_quantize_weight(weight, bits), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_and_gradients_agree_with_torch(bits):
    x = (3 * tensor(1, 200)).requires_grad_()
    scale, zero_point = affine_parameters(torch.tensor(-2.0), torch.tensor(3.0), bits)
    quant_min, quant_max = integer_range(bits, symmetric=False)
    ours = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), quant_min, quant_max)
    torch.testing.assert_close(ours, theirs)
    (mine,) = torch.autograd.grad(ours.sum(), x)
    (reference,) = torch.autograd.grad(theirs.sum(), x)
    assert torch.equal(mine, reference)
    assert 0 < float(mine.mean()) < 1  # some were clipped


def test_integers_by_hand():
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(1.55))
    x = torch.tensor([-2.0, -1.0, 0.0, 0.015, 1.55, 9.0])
    expected = torch.tensor(
        [-1.0, -1.0, 0.0, 0.02, 1.55, 1.55]
    )  # integers 0, 0, 100, 102 (1.5 rounds to even), 255, 255
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, 0, 255), expected)


def test_a_group_is_so_many_inputs_of_a_row_and_the_last_may_be_short():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]])
    scale = symmetric_scale(weight, 8, "per_group:2") * 127
    assert scale.squeeze(-1).tolist() == [[2, 4, 5], [20, 40, 50]]
    assert (symmetric_scale(weight, 8, "per_tensor") * 127).item() == 50


def test_half_precision_keeps_its_dtype_and_an_all_zero_weight_stays_zero():
    assert fake_quantize_weight(tensor(0, 3, 4).bfloat16()).dtype == torch.bfloat16
    assert not fake_quantize_weight(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("bits", [0, 1, 9, 8.5, True, "8"])
def test_bits_out_of_range_raise(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        integer_range(bits, symmetric=True)


@pytest.mark.parametrize("text", ["per_row", "per_group", "per_group:0", "per_group:x", "32"])
def test_an_unknown_granularity_raises(text):
    with pytest.raises(ValueError, match="weight granularity must be"):
        parse_weight_granularity(text)
