import pytest
import torch
from torch import nn

from lightning_optim import measure_latency
from lightning_optim.measure.latency import LatencyResult, interleaved_latency
from lightning_optim.target import ForwardInputs


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 8))
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return self.layers(x)


def test_a_smaller_model_is_faster_and_equal_ones_are_called_equal():
    small, big = Net(64), Net(4096)
    result = measure_latency(small, torch.randn(3, 64), against=big, batch_size=8)
    assert result.ratio < 0.5
    assert result.low <= result.ratio <= result.high
    assert result.differs
    assert result.batch_size == 8
    assert not LatencyResult(1.0, 1.0, 1.02, 0.9, 1.1).differs
    assert "no difference" in str(LatencyResult(1.0, 1.0, 1.02, 0.9, 1.1))


def test_measuring_changes_nothing():
    net = Net(16)
    net.layers[2].eval()
    threads = torch.get_num_threads()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    interleaved_latency(net, ForwardInputs((torch.randn(2, 64, generator=torch.Generator()),)), seconds=0.0)
    assert {call for call in net.calls} == {(False, False, 1)}
    assert [layer.training for layer in net.modules()] == [True, True, True, True, False, True]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


def test_flags_come_back_after_an_error():
    net = Net(16)
    with pytest.raises(RuntimeError):
        measure_latency(net, torch.randn(2, 3))
    assert net.training
    assert torch.is_grad_enabled()


def test_pairs_follow_the_budget():
    inputs = ForwardInputs((torch.randn(1, 64),))
    assert interleaved_latency(Net(8), inputs, seconds=0.0, least=16, most=72).pairs == 16
    assert interleaved_latency(Net(8), inputs, Net(8), seconds=60.0, least=16, most=72).pairs == 72


def test_rows_that_cannot_be_cut_raise_and_ragged_inputs_are_taken_as_given():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.sum() + b.sum()

    with pytest.raises(ValueError, match="rows in dimension 0"):
        measure_latency(Two(), (torch.ones(3), torch.ones(2)))
    assert measure_latency(Two(), (torch.ones(3), torch.ones(2)), batch_size=None).milliseconds > 0
