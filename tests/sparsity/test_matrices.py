"""Weights that are stored as [in, out] or as experts are pruned as the matrices that they are."""

import pytest
import torch
from torch import nn

from helpers.mixtures import Conv1D, Experts, as_linear
from lightning_optim.change import Changed
from lightning_optim.functional.criteria import CRITERIA, Statistics, parameter_generator
from lightning_optim.functional.granularity import parse_granularity
from lightning_optim.functional.masks import global_masks
from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.modules import expert_weights, matrices_of
from lightning_optim.sparsity.matrices import masks_by_matrix, ranks_matrices, scores_by_matrix
from lightning_optim.sparsity.selection import select, without_misfits

GRANULARITIES = ("weight", "row", "column", "4x4", "2:4", "2:4@unfold")


def selected(layer: nn.Module):
    net = nn.Sequential(layer, nn.Linear(8, 2))
    return select(net, "", include=None, exclude=None, patterns=None).chosen


def masks_of(weights, granularity, sparsity=0.5, each=False, previous=None):
    scores = {name: weight.parameter.detach().abs() for name, weight in weights.items()}
    return masks_by_matrix(
        scores, weights, sparsity, parse_granularity(granularity), previous=previous or {}, each=each
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_conv1d_is_pruned_as_the_linear_that_it_is(granularity):
    layer = Conv1D(12, 8)
    weights = selected(layer)
    assert list(weights) == ["0.weight"]
    linear = as_linear(layer).weight.detach().abs()
    expected = global_masks({"w": linear}, 0.5, granularity)["w"].t()
    assert torch.equal(masks_of(weights, granularity)["0.weight"], expected)
    assert without_misfits(
        select(nn.Sequential(layer, nn.Linear(8, 2)), "", include=None, exclude=None, patterns=None),
        parse_granularity(granularity),
        (),
    ).chosen


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_expert_is_pruned_as_a_matrix(granularity, transposed):
    layer = Experts(transposed=transposed)
    weights = selected(layer)
    assert list(weights) == ["0.up_proj", "0.down_proj"]
    masks = masks_of(weights, granularity, each=True)
    for name, weight in weights.items():
        for mask, matrix in zip(weight.matrices(masks[name]), weight.matrices(weight.parameter.detach()), strict=True):
            assert torch.equal(mask, global_masks({"w": matrix.abs()}, 0.5, granularity)["w"])


def test_experts_compete_with_each_other_under_the_global_scope():
    weights = selected(Experts())
    with torch.no_grad():
        weights["0.up_proj"].parameter[0] *= 1e-3
    masks = masks_of(weights, "row")
    assert not masks["0.up_proj"][0].any()
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert kept == pytest.approx(0.5, abs=0.02)


def test_what_was_removed_stays_removed():
    weights = selected(Experts())
    before = masks_of(weights, "2:4", 0.25)
    after = masks_of(weights, "2:4", 0.5, previous=before)
    assert all(bool((before[name] >= after[name]).all()) for name in before)


def test_single_weights_need_no_matrices_but_where_each_expert_is_ranked_by_itself():
    conv, experts = selected(Conv1D(12, 8)), selected(Experts())
    free, rows = parse_granularity("weight"), parse_granularity("row")
    assert [ranks_matrices(conv, free, scope) for scope in ("global", "layer")] == [False, False]
    assert [ranks_matrices(experts, free, scope) for scope in ("global", "layer")] == [False, True]
    assert ranks_matrices(conv, rows, "global")
    assert not ranks_matrices(selected(nn.Linear(12, 8)), rows, "global")


@pytest.mark.parametrize("criterion", ["wanda", "lamp", "random"])
def test_a_criterion_sees_conv1d_as_the_linear_that_it_is(criterion):
    layer, x = Conv1D(12, 8), torch.randn(5, 8)
    linear, (weight,) = as_linear(layer), selected(layer).values()

    def scores(layer, of):
        needs, statistics = CRITERIA[criterion].needs, {}
        for need in [need for need in needs if need in STATISTICS]:
            collector = STATISTICS[need]()
            handle = collector.attach("0.weight", layer)
            layer(x)
            handle.remove()
            statistics[need] = collector.value("0.weight", lambda sums: sums)
        return of(statistics, parameter_generator("0.weight") if "generator" in needs else None)

    found = scores(layer, lambda s, g: scores_by_matrix(CRITERIA[criterion], weight, layer.weight.detach(), s, g))
    expected = scores(linear, lambda s, g: CRITERIA[criterion](linear.weight.detach(), Statistics(generator=g, **s)))
    torch.testing.assert_close(found, expected.t())


@pytest.mark.parametrize("criterion", ["lamp", "random"])
def test_a_criterion_sees_one_expert_after_the_other(criterion):
    weight = selected(Experts(transposed=True))["0.up_proj"]
    generator = parameter_generator("w") if criterion == "random" else None
    scores = scores_by_matrix(CRITERIA[criterion], weight, weight.parameter.detach(), {}, generator)
    generator = parameter_generator("w") if criterion == "random" else None
    for found, matrix in zip(weight.matrices(scores), weight.matrices(weight.parameter.detach()), strict=True):
        assert torch.equal(found, CRITERIA[criterion](matrix, Statistics(generator=generator)))


def test_statistics_of_conv1d_follow_removed_inputs():
    layer, x = Conv1D(4, 4), torch.randn(6, 4)
    kept = torch.arange(16).view(4, 4)[[0, 2, 3]][:, [1, 2]]
    new = nn.Parameter(torch.zeros(3, 2))
    changed = Changed({layer.weight: (new, kept.flatten())}, {"weight": layer.weight}, {"weight": new})
    linear = as_linear(layer)
    for name in ("input_norm", "input_second_moment"):
        collector, plain = STATISTICS[name](), STATISTICS[name]()
        for one, of in ((collector, layer), (plain, linear)):
            handle = one.attach("weight", of)
            of(x)
            handle.remove()
        collector.follow(changed)
        found, whole = collector.sums["weight"], plain.sums["weight"]
        if name == "input_norm":
            torch.testing.assert_close(found, whole[0, [0, 2, 3], None].expand(3, 2))
        else:
            torch.testing.assert_close(found, whole[[0, 2, 3]][:, [0, 2, 3]])


class Odd(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.num_experts = 3
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("attributes", "shapes", "expected"),
    [
        ({"hidden_dim": 8}, {"gate_up_proj": (3, 24, 8), "down_proj": (3, 8, 12)}, False),
        ({"hidden_size": 8}, {"gate_up_proj": (3, 8, 24), "down_proj": (3, 12, 8)}, True),
        ({"hidden_size": 8}, {"gate_up_proj": (3, 8, 16), "down_proj": (3, 8, 8)}, True),
        ({"input_size": 6}, {"weight": (3, 8, 6)}, False),
        ({"hidden_size": 8}, {"up_proj": (3, 8, 8), "down_proj": (3, 8, 8)}, None),
        ({"is_transposed": True}, {"up_proj": (3, 8, 8)}, True),
        ({"hidden_size": 8}, {"up_proj": (2, 8, 24)}, None),
        ({"hidden_size": 8, "num_experts": 3.0}, {"up_proj": (3, 8, 24)}, None),
    ],
)
def test_the_order_of_experts_follows_from_their_sizes(attributes, shapes, expected):
    layer = Odd(**attributes)
    for name, shape in shapes.items():
        setattr(layer, name, nn.Parameter(torch.zeros(shape)))
    assert expert_weights(layer) == ({} if expected is None else dict.fromkeys(shapes, expected))
    first = next(iter(shapes))
    found = {tuple(matrix.shape) for matrix in matrices_of(layer, first, getattr(layer, first).detach())}
    shape = shapes[first]
    assert found == {shape if expected is None else shape[:0:-1] if expected else shape[1:]}
