import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.fake_quantize import affine_parameters, fake_quantize, integer_range
from lightning_optim.functional.observers import OBSERVERS, Histogram, MinMax, MovingAverage, Percentile


def observed(observer, batches, bits=8):
    """Range of a tensor after some batches."""
    statistic, count = torch.zeros(1, observer.size), torch.zeros(1, dtype=torch.int64)
    for batch in batches:
        statistic = observer.fold(statistic, observer.see(batch)[None], count)
        count += 1
    return tuple(float(end) for end in observer.range_of(statistic, bits))


def batch(seed, *, rows=64):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@given(seed=st.integers(0, 50), scale=st.floats(1e-3, 1e3))
def test_every_range_holds_most_of_what_was_seen(name, seed, scale):
    x = scale * batch(seed)
    low, high = observed(OBSERVERS[name], [x])
    assert low < 0 < high
    assert float(((x < low) | (x > high)).float().mean()) < 0.02
    assert high - low <= 1.1 * float(x.max() - x.min())


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_pooled_parts_are_the_whole(name):
    """Two ranks, or two micro-batches, give what one batch of both gives."""
    observer, parts = OBSERVERS[name], [batch(0), 3 * batch(1)]
    seen = [observer.see(part) for part in parts]
    pooled = torch.maximum(*seen) if observer.reduction == "max" else seen[0] + seen[1]
    assert torch.equal(pooled, observer.see(torch.cat(parts)))


def test_min_max_keeps_the_extremes():
    assert observed(MinMax, [torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])]) == (-3.0, 2.0)


def test_moving_average_is_a_mean_at_first_and_then_forgets():
    ones = [torch.tensor([-float(k), 2.0 * k]) for k in range(1, 5)]
    assert observed(MovingAverage, ones) == pytest.approx((-2.5, 5.0))
    statistic = MovingAverage.fold(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([10_000]))
    assert statistic[0].tolist() == pytest.approx([1.01, 1.02])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_histogram_errs_less_than_the_extremes(bits):
    x = batch(3, rows=2000)
    x[0, 0] = 60.0
    low, high = integer_range(bits, symmetric=False)

    def error(observer):
        ends = (torch.tensor(end) for end in observed(observer, [x], bits))
        return float((fake_quantize(x, *affine_parameters(*ends, bits), low, high) - x).square().mean())

    assert error(Histogram) < error(MinMax) * 1.02
    if bits < 8:
        assert error(Histogram) < 0.8 * error(MinMax)


def test_the_histogram_of_what_a_relu_gives_begins_at_zero():
    low, high = observed(Histogram, [batch(4).relu()])
    assert low == 0.0
    assert high > 1.0
    assert observed(Histogram, [torch.zeros(5)]) == (0.0, 0.0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_what_is_not_finite_stays_visible(name, value):
    x = batch(5)
    x[3, 3] = value
    seen = OBSERVERS[name].see(x)
    assert not torch.isfinite(seen).all()


def test_the_histogram_knows_zeros_and_magnitudes_far_apart():
    zeros = Histogram.see(torch.zeros(5))
    assert float(zeros.sum()) == 5
    for size in (1e-10, 1e10):
        low, high = observed(Histogram, [size * batch(6)])
        assert low == pytest.approx(size * float(batch(6).min()), rel=0.5)
        assert high == pytest.approx(size * float(batch(6).max()), rel=0.5)


def test_the_percentile_clips_what_is_rarer_than_a_ten_thousandth():
    """Of 20,000 values two may be clipped: the third largest magnitude is the end, on whichever side it is."""
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) - 0.5
    x[:3] = torch.tensor([100.0, -50.0, 8.0])
    low, high = observed(Percentile, [x[:10_000], x[10_000:]])
    assert 8.0 <= high <= 8.0 * 2 ** (1 / 16)
    assert low == -high
    x[3] = 30.0  # of four outliers two stay inside
    low, high = observed(Percentile, [x])
    assert 30.0 <= high <= 30.0 * 2 ** (1 / 16)
    assert observed(Percentile, [torch.zeros(5)]) == (0.0, 0.0)


def test_the_percentile_counts_the_zeros_behind_a_relu():
    x = torch.zeros(100_000)
    x[:20] = torch.arange(1.0, 21.0)
    low, high = observed(Percentile, [x])
    assert low == 0.0
    assert 10.0 <= high <= 10.0 * 2 ** (1 / 16)
