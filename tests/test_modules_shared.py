import threading

import pytest
import torch
from torch import nn

from lightning_optim.modules import (
    copy_module,
    evaluating,
    is_compiled,
    is_inside_compiled,
    without_compiler,
    without_fast_path,
)


def test_a_copy_runs_in_eval_mode_without_the_functions_that_are_bound_to_the_original():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    linear = net[0]
    linear.forward = lambda x: linear.weight.sum()  # as Lightning's redirection and torch.compile do
    net.lock, net.kept = threading.Lock(), linear.weight * 2
    duplicate = copy_module(net)
    with torch.no_grad():
        linear.weight.zero_()
    assert duplicate(torch.ones(1, 4)).shape == (1, 4)
    assert not any(layer.training for layer in duplicate.modules())
    assert all(layer.training for layer in net.modules())
    assert duplicate.lock is net.lock
    assert duplicate.kept.is_leaf
    assert duplicate.kept.abs().sum() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_of_a_compiled_part_computes_with_its_own_weights(compiled):
    net = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"))
    duplicate = copy_module(net, compiled=compiled)
    with torch.no_grad():
        expected = net(torch.ones(1, 4))
        without_compiler(net[0]).weight.zero_()
        assert torch.equal(duplicate(torch.ones(1, 4)), expected)
    assert (duplicate[0].forward is without_compiler(duplicate[0])) is not compiled


def test_compiled_parts_are_recognized():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert not is_compiled(net)
    assert without_compiler(net) is net
    whole = torch.compile(net, backend="eager")
    assert without_compiler(whole) is net
    assert is_compiled(whole)
    assert not is_compiled(whole, parts=False)
    assert all(is_inside_compiled(name) for name, _ in whole.named_parameters())
    assert not any(is_inside_compiled(name) for name, _ in net.named_parameters())


def test_the_mode_of_every_layer_is_restored():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4))
    net[1].eval()
    other = nn.Dropout()
    with evaluating(net, other):
        assert not any(layer.training for layer in (*net.modules(), other))
        assert not torch.is_grad_enabled()
    assert [layer.training for layer in (*net.modules(), other)] == [True, True, False, True]
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(net, other):
        _ = 1 / 0
    assert [layer.training for layer in (*net.modules(), other)] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_the_fast_path_is_restored():
    assert torch.backends.mha.get_fastpath_enabled()
    with without_fast_path():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), without_fast_path():
        _ = 1 / 0
    assert torch.backends.mha.get_fastpath_enabled()
