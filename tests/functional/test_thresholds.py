"""Thresholds: exactly the k smallest, against torch's own sort, in every dtype, with ties and over shards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.shards import on_ranks, sharded
from lightning_optim.functional import thresholds
from lightning_optim.functional.criteria import Statistics, magnitude, scores_of
from lightning_optim.functional.thresholds import keep_largest, smallest

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF, NAN = float("inf"), float("nan")
# Few values, so that ties are frequent; both zeros, both infinities, subnormal and extreme numbers.
AWKWARD = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -INF, INF, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0000001])


def masks_by_sorting(scores, count):
    """Remove the ``count`` smallest by a stable sort of all scores in double precision."""
    flat = torch.cat([tensor.reshape(-1).double() for tensor in scores.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, stable=True).indices[:count]] = False
    parts = torch.split(keep, [tensor.numel() for tensor in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def assert_exact(scores, count):
    cut = smallest(scores, count)
    masks = keep_largest(scores, cut)
    expected = masks_by_sorting(scores, count)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in scores)
    flat = torch.cat([tensor.reshape(-1).double() for tensor in scores.values()])
    assert cut.below + cut.ties == count
    assert cut.equal == int((flat == cut.value).sum())
    if count:
        assert cut.value == float(flat.kthvalue(count).values)
        assert cut.below == int((flat < cut.value).sum())


@pytest.fixture
def small_sample(monkeypatch):
    """Take the way through a sample, and through several pieces, with few scores already."""
    monkeypatch.setattr(thresholds, "_SAMPLE_FROM", 1000)
    monkeypatch.setattr(thresholds, "_SAMPLE_SIZE", 4096)
    monkeypatch.setattr(thresholds, "_PIECE_ON_CPU", 1 << 12)


@pytest.fixture
def without_numpy(monkeypatch):
    """Take the ways of other devices on the CPU."""
    monkeypatch.setattr(thresholds, "_in_numpy", lambda tensor: False)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(values=st.lists(st.lists(AWKWARD, max_size=12), min_size=1, max_size=4), data=st.data())
def test_exactly_k_go_whatever_the_ties(values, data):
    scores = {f"layer{i}": torch.tensor(part) for i, part in enumerate(values)}
    assert_exact(scores, data.draw(st.integers(0, sum(map(len, values)))))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    values=st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=40),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    data=st.data(),
)
def test_tensors_of_mixed_dtypes_are_compared_by_value(values, dtypes, data):
    scores = {str(i): torch.tensor(values[i::3]).to(dtype) for i, dtype in enumerate(dtypes)}
    assert_exact(scores, data.draw(st.integers(0, len(values))))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=30), st.data())
def test_doubles_that_float32_cannot_tell_apart(values, data):
    base = torch.tensor(values, dtype=torch.float64)
    scores = {"a": base, "b": torch.nextafter(base, torch.tensor(INF, dtype=torch.float64))}
    assert_exact(scores, data.draw(st.integers(0, 2 * len(values))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [0.0, 1e-4, 0.3, 0.8, 1.0])
def test_every_dtype_near_a_sample(small_sample, dtype, fraction):
    scores = {"a": torch.randn(30_011).to(dtype), "b": torch.randn(7, 501).to(dtype)}
    assert_exact(scores, round(fraction * (30_011 + 7 * 501)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2, 70_000])
def test_all_equal(dtype, number):
    assert_exact({"a": torch.full((number,), 0.25, dtype=dtype)}, number // 2)


def test_most_scores_equal_near_a_sample(small_sample):
    """A sample cannot narrow this down: everything is counted."""
    scores = {"a": torch.where(torch.rand(20_000) < 0.9, 0.0, torch.rand(20_000))}
    for count in (0, 5_000, 17_900, 18_100, 20_000):
        assert_exact(scores, count)


def test_removed_scores_near_a_sample(small_sample, monkeypatch):
    """Most are -inf and a few more go, as late in a gradual schedule: the sample still helps."""
    calls = []
    original = thresholds._Search.everywhere
    monkeypatch.setattr(thresholds._Search, "everywhere", lambda *args: calls.append(1) or original(*args))
    scores = {"a": torch.where(torch.rand(20_000) < 0.8, -INF, torch.rand(20_000))}
    removed = int((scores["a"] == -INF).sum())
    for count in (removed + 1, removed + 20, removed + 1000):
        assert_exact(scores, count)
    assert not calls
    assert_exact(scores, removed - 1)
    assert calls


def test_a_sample_that_misleads_does_not_matter(small_sample):
    """The sampled places hold other values than the rest, so the k-th smallest is not where they say."""
    length = 8192
    step = length // 4096 | 1
    scores = torch.rand(length) + 5
    scores[::step] = -torch.rand(len(scores[::step]))
    for count in (100, 3000, 6000):
        assert_exact({"a": scores}, count)


def test_too_many_scores_between_the_bins_of_a_sample(small_sample):
    """More than the buffer takes lie between; all are counted instead."""
    length = 9000
    scores = torch.full((length,), 0.5)
    scores[::3] = torch.linspace(0, 1, 3000)
    assert_exact({"a": scores}, length // 2)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_the_ways_of_other_devices(without_numpy, small_sample, fraction):
    scores = {"few": torch.randint(0, 9, (900,)).float(), "many": torch.randn(30_011)}
    assert_exact(scores, round(fraction * 30_911))
    assert_exact({"few": scores["few"]}, round(fraction * 900))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_cuda_gives_the_masks_of_the_cpu(fraction):
    scores = {"a": torch.randn(3_000_000), "b": torch.randint(0, 9, (500, 7)).half()}
    count = round(fraction * 3_003_500)
    on_cuda = {name: tensor.cuda() for name, tensor in scores.items()}
    masks = keep_largest(on_cuda, smallest(on_cuda, count))
    expected = keep_largest(scores, smallest(scores, count))
    assert all(torch.equal(masks[name].cpu(), expected[name]) for name in scores)


def test_scores_in_order_near_a_sample(small_sample):
    for scores in (torch.arange(20_000.0), torch.arange(20_000.0).flip(0)):
        assert_exact({"a": scores}, 12_345)


def test_the_cut_is_kthvalue_at_a_million():
    weight = torch.randn(1 << 20)
    lazy = {"w": scores_of(magnitude, weight, Statistics())}
    count = int(0.8 * len(weight))
    cut = smallest(lazy, count)
    assert cut.value == float(weight.abs().kthvalue(count).values)
    assert int(keep_largest(lazy, cut)["w"].sum()) == len(weight) - count


def test_memory_formats_do_not_change_the_order():
    scores = torch.randint(0, 3, (4, 5, 3, 3)).float()
    for count in range(0, 181, 20):
        plain = keep_largest({"w": scores}, smallest({"w": scores}, count))["w"]
        last = scores.to(memory_format=torch.channels_last)
        assert torch.equal(keep_largest({"w": last}, smallest({"w": last}, count))["w"], plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_nan_raises_and_names_the_tensor(dtype, count):
    scores = {"fine": torch.ones(3), "bad": torch.tensor([1.0, -NAN, INF], dtype=dtype)}
    with pytest.raises(ValueError, match="'bad' contain NaN"):
        smallest(scores, count)


@pytest.mark.parametrize("bits", [0x7F800001, -0x7FFFFF, -1, 0x7FFFFFFF])
def test_every_nan_is_found(bits):
    """Also those whose upper 16 bits are infinity's."""
    scores = torch.tensor([0, bits], dtype=torch.int32).view(torch.float32)
    assert scores.isnan()[1]
    with pytest.raises(ValueError, match="NaN"):
        smallest({"w": scores}, 1)


@pytest.mark.parametrize("count", [0, 1000, 19_999])
def test_nan_is_found_near_a_sample(small_sample, count):
    scores = torch.rand(20_000)
    scores[12_345] = NAN
    with pytest.raises(ValueError, match="'w' contain NaN"):
        smallest({"w": scores}, count)


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_that_is_not_there_raises(count):
    with pytest.raises(ValueError, match=f"between 0 and the number of scores, 3, got {count}"):
        smallest({"w": torch.ones(3)}, count)


def test_integer_scores_raise():
    with pytest.raises(TypeError, match=r"'w' must be floating point, got torch\.int64"):
        smallest({"w": torch.ones(3).long()}, 1)


def test_no_scores():
    scores = {"w": torch.empty(0, 3)}
    assert keep_largest(scores, smallest(scores, 0))["w"].shape == (0, 3)


def masks_of(part, shards, count):
    return keep_largest(part, smallest(part, count, shards=shards), shards=shards)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=2).map(sorted),
    fraction=st.floats(0, 1),
    kinds=st.integers(1, 5),
)
def test_shards_give_the_masks_of_the_whole(rows, cuts, fraction, kinds):
    generator = torch.Generator().manual_seed(len(rows))
    scores = {str(i): torch.randint(0, kinds, (n, 3), generator=generator).float() for i, n in enumerate(rows)}
    count = round(fraction * 3 * sum(rows))
    results = on_ranks(sharded(scores, cuts), lambda part, shards: masks_of(part, shards, count))
    expected = masks_by_sorting(scores, count)
    assert all(torch.equal(torch.cat([r[name] for r in results]), expected[name]) for name in scores)


@pytest.mark.parametrize("cuts", [[0.5], [0.0], [1.0], [0.1, 0.9]])
def test_shards_near_a_sample(small_sample, cuts):
    scores = {"a": torch.randn(4000, 3), "b": torch.randn(500, 8) * 3}
    results = on_ranks(sharded(scores, cuts), lambda part, shards: masks_of(part, shards, 11_111))
    expected = masks_by_sorting(scores, 11_111)
    assert all(torch.equal(torch.cat([r[name] for r in results]), expected[name]) for name in scores)


def test_nan_on_one_shard_raises_on_all():
    parts = [{"w": torch.ones(3)}, {"w": torch.tensor([NAN])}]
    first, second = on_ranks(parts, lambda part, shards: smallest(part, 2, shards=shards))
    assert "another process contain NaN" in str(first)
    assert "'w' contain NaN" in str(second)
