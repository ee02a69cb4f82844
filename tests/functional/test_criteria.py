"""Criteria: shapes, orders, the papers' examples, and one sentence for what is missing."""

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.functional.criteria import CRITERIA, LazyScores, Statistics, parameter_generator, scores_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def statistics(weight, needs):
    """Return just the statistics that a criterion asks for."""
    inputs = weight.shape[1] if weight.dim() > 1 else 1
    everything = {
        "gradient": torch.linspace(0.1, 2.0, weight.numel()).view(weight.shape),
        "input_norm": torch.linspace(0.5, 1.5, inputs).view(-1, *[1] * (weight.dim() - 2)),
        "generator": parameter_generator("layer.weight"),
    }
    return Statistics(**{name: everything[name] for name in needs})


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2), (6,)])
def test_every_criterion_scores_every_weight_and_changes_none(name, dtype, shape):
    weight = torch.randn(shape).to(dtype).requires_grad_()
    before = weight.detach().clone()
    scores = CRITERIA[name](weight.detach(), statistics(weight, CRITERIA[name].needs))
    assert scores.shape == weight.shape
    assert scores.is_floating_point()
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_gives_the_same_scores_twice(name):
    weight = torch.randn(4, 6)
    first, second = (CRITERIA[name](weight, statistics(weight, CRITERIA[name].needs)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_a_tensor_of_zeros(name):
    weight = torch.zeros(3, 4)
    assert not CRITERIA[name](weight, statistics(weight, CRITERIA[name].needs)).isnan().any()


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_refuses_integer_weights(name):
    weight = torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"floating-point weights, got torch\.int8"):
        CRITERIA[name](weight, statistics(weight, CRITERIA[name].needs))
    with pytest.raises(TypeError, match=r"floating-point weights, got torch\.int8"):
        scores_of(CRITERIA[name], weight, statistics(weight, CRITERIA[name].needs))


@pytest.mark.parametrize("name", sorted(n for n in CRITERIA if CRITERIA[n].needs))
def test_a_missing_statistic_is_named(name):
    with pytest.raises(ValueError, match=CRITERIA[name].needs[0]):
        CRITERIA[name](torch.ones(3, 4), Statistics())
    with pytest.raises(ValueError, match=CRITERIA[name].needs[0]):
        scores_of(CRITERIA[name], torch.ones(3, 4), Statistics())


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lazy_scores_are_the_scores(name, memory_format):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=memory_format).requires_grad_()
    needs = CRITERIA[name].needs
    expected = CRITERIA[name](weight.detach(), statistics(weight, needs))
    scores = scores_of(CRITERIA[name], weight, statistics(weight, needs))
    if isinstance(scores, LazyScores):
        assert scores.shape == expected.shape
        assert scores.dtype == expected.dtype
        assert torch.equal(scores.read(5, 40, 3), expected.reshape(-1)[5:40:3])
        scores = scores.read(0, expected.numel()).view(scores.shape)
    assert not scores.requires_grad
    assert torch.equal(scores, expected)


def test_magnitude_and_taylor_are_read_piece_by_piece():
    weight = torch.randn(2, 3)
    assert isinstance(scores_of(CRITERIA["magnitude"], weight, Statistics()), LazyScores)
    assert isinstance(scores_of(CRITERIA["taylor"], weight, Statistics(gradient=weight)), LazyScores)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(2,\)"):
        scores_of(lambda weight, stats: weight.sum(1), torch.ones(2, 3), Statistics())


def test_magnitude_by_hand():
    weight = torch.tensor([[-3.0, 0.5], [-0.0, 2.0]])
    assert CRITERIA["magnitude"](weight, Statistics()).tolist() == [[3.0, 0.5], [0.0, 2.0]]


def test_taylor_by_hand():
    """Molchanov et al. 2019, equation 8: (g w)^2 has the order of |g w|."""
    stats = Statistics(gradient=torch.tensor([[0.5, 4.0], [2.0, 0.0]]))
    scores = CRITERIA["taylor"](torch.tensor([[-3.0, 0.5], [1.0, 2.0]]), stats)
    assert scores.tolist() == [[1.5, 2.0], [2.0, 0.0]]


def test_taylor_refuses_a_gradient_of_another_shape():
    for call in (CRITERIA["taylor"], lambda *args: scores_of(CRITERIA["taylor"], *args)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3, 2\)"):
            call(torch.ones(2, 3), Statistics(gradient=torch.ones(3, 2)))


def test_wanda_is_the_papers_example():
    """Sun et al. 2023, figure 1: weights 4 0 1 -1 / 3 -2 -1 -3 / -3 1 0 2, input norms 1 2 8 3."""
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    scores = CRITERIA["wanda"](weight, Statistics(input_norm=torch.tensor([1.0, 2, 8, 3])))
    assert scores.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]


def test_wanda_of_a_convolution_multiplies_by_input_channel():
    weight = torch.ones(2, 3, 2, 2)
    scores = CRITERIA["wanda"](weight, Statistics(input_norm=torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)))
    assert scores.sum((0, 2, 3)).tolist() == [8.0, 16.0, 24.0]


@pytest.mark.parametrize("norm", [torch.ones(5), torch.ones(1, 2, 3), torch.ones(3, 1)])
def test_wanda_refuses_norms_that_do_not_fit(norm):
    with pytest.raises(ValueError, match=r"`stats\.input_norm` of a shape that broadcasts"):
        CRITERIA["wanda"](torch.ones(2, 3), Statistics(input_norm=norm))


def test_half_precision_products_do_not_overflow():
    weight = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert CRITERIA["taylor"](weight, Statistics(gradient=weight)).tolist() == [[90000.0, 90000.0]]
    assert CRITERIA["wanda"](weight, Statistics(input_norm=weight[0])).tolist() == [[90000.0, 90000.0]]


def lamp_by_definition(weight):
    """Lee et al. 2021, equation 4, in double precision and with equal weights counted in the denominator."""
    flat = weight.double().flatten()
    return torch.stack([w**2 / flat[flat.abs() >= w.abs()].square().sum() for w in flat]).view(weight.shape)


def test_lamp_by_hand():
    """Squares 1, 4, 9, 16: 1/30, 4/29, 9/25, 16/16."""
    scores = CRITERIA["lamp"](torch.tensor([[-1.0, 2.0], [3.0, -4.0]]), Statistics())
    torch.testing.assert_close(scores, torch.tensor([[1 / 30, 4 / 29], [9 / 25, 1.0]]))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30).filter(any))
def test_lamp_with_ties_is_its_definition(values):
    weight = torch.tensor(values)
    torch.testing.assert_close(CRITERIA["lamp"](weight, Statistics()).double(), lamp_by_definition(weight))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lamp_does_not_depend_on_the_scale(scale):
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0])
    torch.testing.assert_close(CRITERIA["lamp"](weight * scale, Statistics()), CRITERIA["lamp"](weight, Statistics()))


def test_lamp_ranks_a_layer_as_magnitude_does():
    weight = torch.randn(1000)
    order = torch.sort(CRITERIA["lamp"](weight, Statistics()), stable=True).indices
    assert torch.equal(order, torch.sort(weight.abs(), stable=True).indices)


def test_lamp_of_a_diverged_weight_is_nan_so_that_the_threshold_raises():
    for value in (float("nan"), float("inf")):
        assert CRITERIA["lamp"](torch.tensor([1.0, value]), Statistics()).isnan().any()


def test_lamp_of_no_weights():
    assert CRITERIA["lamp"](torch.empty(0, 3), Statistics()).shape == (0, 3)


def test_random_depends_on_the_generator_alone():
    first = CRITERIA["random"](torch.zeros(50), Statistics(generator=parameter_generator("a")))
    torch.manual_seed(1)
    weight = torch.ones(50, dtype=torch.bfloat16)
    assert torch.equal(CRITERIA["random"](weight, Statistics(generator=parameter_generator("a"))), first)
    assert not torch.equal(CRITERIA["random"](weight, Statistics(generator=parameter_generator("b"))), first)
    assert not torch.equal(CRITERIA["random"](weight, Statistics(generator=parameter_generator("a", 1))), first)


def test_random_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    CRITERIA["random"](torch.zeros(50), Statistics(generator=parameter_generator("a")))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_parameter_generator_is_seeded_by_checksums_that_are_the_same_in_every_process():
    text = b"3:encoder.0.weight"
    seed = parameter_generator("encoder.0.weight", 3).initial_seed()
    assert seed == zlib.crc32(text) * 2**32 + zlib.adler32(text)
