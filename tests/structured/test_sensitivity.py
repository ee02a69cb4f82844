"""What each group costs."""

import copy
import sys

import pytest
import torch
from torch import nn

from helpers.nets import PRUNABLE, Attention, Block, images, sequences
from lightning_optim.structured.prune import prune_channels
from lightning_optim.structured.sensitivity import SensitivityReport, sensitivity

REPORT = SensitivityReport(
    0.9, (0.25, 0.5), {"strong": (0.9, 0.88), "weak": (0.4, 0.2), "odd": (0.5, 0.9)}, {"out": "last layer"}
)


def net():
    """Half of the first layer's outputs are not read; the second's are all needed."""
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        for layer in module:
            layer.weight.fill_(1)
        module[0].weight[2:] = 0.0
        module[1].weight[:, 2:] = 0.0
    return module


def output_of_ones(model):
    """8 for the dense net: 2 inputs x 2 read channels x 4 x 1 = 16 halved."""
    assert not model.training
    assert not torch.is_grad_enabled()
    return float(model(torch.ones(1, 2)))


def test_each_group_is_tried_alone_and_nothing_is_changed():
    module = net().train()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    report = sensitivity(module, output_of_ones, torch.ones(1, 2), ratios=(0.5, 0.25), progress=False)
    assert report.baseline == 16.0
    assert report.ratios == (0.25, 0.5)
    assert report.scores == {"1": (12.0, 8.0), "0": (16.0, 16.0)}
    assert report.drops("1") == (4.0, 8.0)
    assert report.left_out == {"2": "last layer"}
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_coupled_layers_and_attention_heads_are_one_row():
    make, inputs, expected = PRUNABLE["residual"]
    report = sensitivity(make(), lambda model: 0.5, inputs(), ratios=[0.5], progress=False)
    assert set(report.scores) == set(expected)
    widths = []
    report = sensitivity(
        Block(Attention()),
        lambda model: float(widths.append(model.attention.num_heads) or 0),
        sequences(),
        ratios=[0.5],
        include=["attention.q", "attention.k", "attention.v"],
        progress=False,
    )
    assert set(report.scores) == {"attention.v"}
    assert widths == [4, 2]


def test_names_are_those_of_the_whole_model():
    outer = nn.Sequential(net(), nn.Identity())
    report = sensitivity(outer, output_of_ones, torch.ones(1, 2), module="0", ratios=[0.5], progress=False)
    assert set(report.scores) == {"0.0", "0.1"}


def test_targets_stop_at_the_first_ratio_that_costs_too_much():
    assert REPORT.targets(max_drop=0.05) == {"strong": 0.5}
    assert REPORT.targets(max_drop=0.45) == {"strong": 0.5, "odd": 0.5}
    assert REPORT.targets(max_drop=0.0) == {"strong": 0.25}
    with pytest.raises(ValueError, match=r"no group loses at most max_drop=-1 at the ratio 0.25; the least is 0"):
        REPORT.targets(max_drop=-1)


def test_targets_are_what_pruning_takes():
    module = net()
    report = sensitivity(module, output_of_ones, torch.ones(1, 2), progress=False)
    targets = report.targets(max_drop=4.0)
    assert targets == {"0": 0.7, "1": 0.3}  # of 4 channels 0.3 takes 1, 0.5 and 0.7 take 2
    pruned = prune_channels(module, torch.ones(1, 2), pruning_ratio=targets)
    assert pruned.channels == {"1": (4, 3), "0": (4, 2)}


def test_the_table_has_the_most_sensitive_group_first():
    lines = REPORT.table().splitlines()
    assert "0.9000" in lines[0]
    assert [next(n for n in REPORT.scores if n in line) for line in lines if any(n in line for n in REPORT.scores)] == [
        "weak",
        "odd",
        "strong",
    ]
    assert "0.7000" in str(REPORT)


def test_the_heat_map_is_written(tmp_path):
    REPORT.plot(tmp_path / "drops.png")
    assert (tmp_path / "drops.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-optim\[report\]"):
        REPORT.plot(tmp_path / "drops.png")


def test_a_progress_bar_is_shown_unless_switched_off(capsys):
    sensitivity(net(), output_of_ones, torch.ones(1, 2), ratios=[0.5])
    assert "sensitivity" in capsys.readouterr().out
    sensitivity(net(), output_of_ones, torch.ones(1, 2), ratios=[0.5], progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ratios": []}, "at least one fraction"),
        ({"ratios": [0.5, 50]}, "pass 0.5"),
        ({"exclude": ["*"]}, "sensitivity can remove nothing"),
        ({"evaluate": lambda model: float("nan")}, "must return a finite metric, got nan"),
        ({"criterion": "taylor"}, "needs the gradient"),
    ],
)
def test_bad_arguments_raise_with_the_expected_values(words, message):
    evaluate = words.pop("evaluate", output_of_ones)
    with pytest.raises(ValueError, match=message):
        sensitivity(net(), evaluate, torch.ones(1, 2), progress=False, **words)


def test_a_net_with_images():
    make, inputs, _ = PRUNABLE["grouped"]
    example = inputs()
    report = sensitivity(make(), lambda model: float(model(example).mean()), images(), ratios=[0.5], progress=False)
    assert set(report.scores) == {"0", "2", "4"}


def test_a_batch_that_forward_does_not_take_is_named_by_its_argument():
    batch = [torch.ones(3, 2), torch.zeros(3, dtype=torch.long)]  # what a loader gives; a list is several calls
    with pytest.raises(ValueError, match=r"fails with `example_inputs` .*They pass int64 \(3,\);.*=images"):
        sensitivity(net(), lambda model: 0.5, batch, progress=False)
