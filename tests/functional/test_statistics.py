"""Collectors: what is added, what a criterion gets, and how they follow a change of the model."""

import pytest
import torch
from torch import nn

from lightning_optim.change import Changed, apply_change
from lightning_optim.functional.criteria import CRITERIA, STATISTICS, Statistics
from lightning_optim.functional.statistics import Collector, needs_of
from lightning_optim.structured.groups import Removal
from lightning_optim.structured.removal import ChannelRemoval


def seen(statistic: str, layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    collector = STATISTICS[statistic]()
    assert collector.problem("weight", layer) is None
    handle = collector.attach("weight", layer)
    for x in inputs:
        layer(x)
    handle.remove()
    layer(inputs[0])
    layer.eval()
    return collector.value("weight", lambda sums: sums)


def test_the_second_moment_of_a_linear_by_hand():
    """x = (1, 2) and (3, 0): 1 + 9, 2 + 0, 4 + 0."""
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert seen("input_second_moment", nn.Linear(2, 3), x).tolist() == [[10, 2], [2, 4]]
    assert seen("input_second_moment", nn.Linear(2, 3), x[None], x[0]).tolist() == [[11, 4], [4, 8]]


def test_the_second_moment_of_a_convolution_by_hand():
    """A kernel of 2 over 1, 2, 3 reads (1, 2) and (2, 3)."""
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert seen("input_second_moment", nn.Conv1d(1, 4, 2), x).tolist() == [[5, 8], [8, 13]]
    assert seen("input_second_moment", nn.Conv1d(1, 4, 2), x[0]).tolist() == [[5, 8], [8, 13]]
    assert seen("input_second_moment", nn.Conv2d(1, 4, (1, 2)), x[None]).tolist() == [[5, 8], [8, 13]]


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": (2, 0)}])
def test_the_second_moment_gives_the_size_of_outputs(options):
    """The sum of the squared outputs is the sum over rows w of w S wᵀ, whatever the convolution."""
    layer, x = nn.Conv2d(2, 3, (3, 2), bias=False, **options), torch.randn(2, 2, 7, 8)
    moment = seen("input_second_moment", layer, x)
    rows = layer.weight.flatten(1)
    torch.testing.assert_close((rows @ moment * rows).sum(), layer(x).square().sum())


def test_the_diagonal_of_the_second_moment_is_the_squared_norm():
    layer, x = nn.Linear(5, 2), torch.randn(3, 4, 5)
    norm = seen("input_norm", layer, x)
    layer.train()
    torch.testing.assert_close(seen("input_second_moment", layer, x).diagonal(), norm.square()[0])


def test_the_second_moment_is_float32_under_autocast():
    layer, x = nn.Linear(64, 2), torch.randn(100, 64)
    with torch.autocast("cpu", torch.bfloat16):
        moment = seen("input_second_moment", layer, x)
    torch.testing.assert_close(moment, x.T @ x)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv3d(1, 1, 1), nn.Conv1d(1, 1, 3, padding="same"), nn.Embedding(3, 2)],
)
def test_layers_without_a_second_moment_are_named(layer):
    problem = STATISTICS["input_second_moment"]().problem("net.0.weight", layer)
    assert "net.0.weight belongs to" in problem


def without_input(root: nn.Module) -> Changed:
    """Remove the second of three inputs of ``a``, and the first of its two outputs."""
    kept = torch.tensor([3, 5])
    removal = Removal({"a.weight": kept}, {"a.weight": (1, 2)}, {"a": {"in_features": 2, "out_features": 1}})
    return apply_change(root, ChannelRemoval("", removal))


@pytest.mark.parametrize(
    ("statistic", "values", "expected"),
    [
        ("gradient", [[1.0, 2, 3], [4, 5, 6]], [[2, 6**0.5]]),
        ("input_norm", [[1.0, 4, 9]], [[1, 3]]),
        ("input_second_moment", [[1.0, 2, 3], [2, 5, 6], [3, 6, 9]], [[1, 3], [3, 9]]),
    ],
)
def test_sums_follow_removed_channels(statistic, values, expected):
    collector = STATISTICS[statistic]()
    root = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False)})
    collector.add("a.weight", torch.tensor(values))
    collector.follow(without_input(root))
    torch.testing.assert_close(collector.value("a.weight", lambda sums: sums), torch.tensor(expected).float())


def test_sums_of_a_removed_layer_are_dropped_and_moved_ones_renamed():
    root = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    collector = STATISTICS["gradient"]()
    for name in ("0.weight", "1.weight"):
        collector.add(name, torch.full((2, 2), float(name[0])))

    def change(root):
        root["net"] = nn.Sequential(*root["net"][1:])

    collector.follow(apply_change(root, change), "net.")
    assert collector.sums.keys() == {"0.weight"}
    assert float(collector.sums["0.weight"][0, 0]) == 1.0


@pytest.mark.parametrize("statistic", STATISTICS)
def test_state_comes_back(statistic):
    first, second = STATISTICS[statistic](), STATISTICS[statistic]()
    first.add("a", torch.ones(2, 2))
    first.add("a", torch.ones(2, 2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.value("a", lambda sums: sums), first.value("a", lambda sums: sums))
    assert second.counts == {"a": 2}


def test_a_criterion_asks_for_any_registered_statistic():
    @STATISTICS.register("a statistic of a test")
    class Ones(Collector):
        """One."""

    try:
        criterion = CRITERIA["magnitude"]
        assert needs_of(criterion) == ()
        stats = Statistics(**{"a statistic of a test": torch.ones(1)})
        assert getattr(stats, "a statistic of a test") is not None
        assert stats.gradient is None
    finally:
        del STATISTICS._functions["a statistic of a test"]
    with pytest.raises(AttributeError, match="no statistic 'hessian'; known: gradient, input_norm"):
        _ = Statistics().hessian
    with pytest.raises(TypeError, match="unknown statistic 'hessian'"):
        Statistics(hessian=torch.ones(1))


@pytest.mark.parametrize("statistic", ["input_norm", "input_magnitude", "input_second_moment"])
def test_a_layer_that_trains_in_eval_mode_is_seen_and_validation_is_not(statistic):
    """A model of `from_pretrained` is in eval mode, and a Trainer leaves it there."""
    layer, x = nn.Linear(2, 3).eval(), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    collector = STATISTICS[statistic]()
    collector.attach("weight", layer)
    with torch.no_grad():
        layer(x)
    assert "weight" not in collector
    layer(x)
    assert torch.equal(collector.value("weight", lambda sums: sums), seen(statistic, nn.Linear(2, 3), x))
