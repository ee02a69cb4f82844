import torch
from torch import nn

from lightning_optim.measure import SIZES


def test_sizes_by_hand():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        net[0].weight[0].zero_()
    assert SIZES["parameters"](net) == 15 + 6 + 12
    assert SIZES["nonzero"](net) == 15 + 6 + 12 - 4 - 3  # four zeroed weights, three BatchNorm biases
    assert SIZES["bits"](net) == 33
    assert SIZES["bits"](net.bfloat16()) == 16.5


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert SIZES["parameters"](net) == 16
