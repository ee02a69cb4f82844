import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_optim.strategies.cost import (
    OPTIMIZERS,
    PRECISIONS,
    Cluster,
    Layout,
    Model,
    held_bytes,
)
from lightning_optim.strategies.traffic import (
    Collective,
    collectives,
    compute_seconds,
    efficiency,
    overlapped_seconds,
)

SINGLE, MIXED, HALF = PRECISIONS["32-true"], PRECISIONS["bf16-mixed"], PRECISIONS["bf16-true"]
MILLION = Model(10**6, 10**6, 10**6, largest_unit=10**5, units=10)

models = st.builds(
    lambda parameters, unit, trained: Model(
        parameters, math.ceil(parameters * trained), parameters, math.ceil(parameters * unit), units=8
    ),
    parameters=st.integers(1, 10**12),
    unit=st.floats(0.01, 1),
    trained=st.floats(0.01, 1),
)
sizes = st.sampled_from([1, 2, 3, 4, 8, 16, 64, 512])
precisions = st.sampled_from(sorted(PRECISIONS))
rates = st.floats(0.01, 1000)


def sharded(size, kind):
    return {"fsdp": Layout(shard=size), "zero2": Layout(shard=size, reshard=False), "tp": Layout(tensor=size)}[kind]


def step(model, layout, precision, cluster, compute):
    sent = collectives(model, layout, precision, cluster)
    return overlapped_seconds(compute, sum(each.seconds(cluster) for each in sent), 0.0, cluster)


# Bytes held


@pytest.mark.parametrize(
    ("layout", "split", "expected"),
    [
        (Layout(), 0, (4, 4, 8)),
        (Layout(replicate=4), 0, (4, 4, 8)),
        (Layout(shard=2), 0, (2, 2, 4)),
        (Layout(shard=4), 0, (1, 1, 2)),
        (Layout(replicate=2, shard=2), 0, (2, 2, 4)),
        (Layout(tensor=2), 0.92, (2.16, 2.16, 4.32)),  # 4 * (0.08 + 0.46)
        (Layout(shard=2, tensor=2), 0.92, (1.08, 1.08, 2.16)),
    ],
)
def test_bytes_per_parameter_are_those_counted_on_ranks(layout, split, expected):
    model = Model(10**6, 10**6, 10**6, 10**5, split=split)
    held = held_bytes(model, layout, SINGLE)
    assert (held.weights / 1e6, held.gradients / 1e6, held.optimizer / 1e6) == pytest.approx(expected)


def test_true_half_precision_halves_all():
    """8 bytes of weight, gradient and two states of 2 bytes each, over 4 devices."""
    held = held_bytes(MILLION, Layout(shard=4), HALF, optimizer=4)
    assert held.weights + held.gradients + held.optimizer == 2e6


def test_frozen_parameters_have_neither_gradients_nor_states():
    held = held_bytes(Model(1000, 10, 1000, 100), Layout(), SINGLE)
    assert (held.weights, held.gradients, held.optimizer) == (4000, 40, 80)


@pytest.mark.parametrize(
    ("layout", "precision", "expected"),
    [
        (Layout(), SINGLE, 0),
        (Layout(replicate=8), MIXED, 2e6),  # autocast's copy of each weight
        (Layout(replicate=8, wire=2), SINGLE, 2e6),  # one bucket: the model is smaller than 25 MiB
        (Layout(shard=8), SINGLE, 4 * 2e5 + (4 + 4) * 1e5),  # two units, one's gradient and as it is sent
        (Layout(shard=8), MIXED, 2 * 2e5 + (2 + 4) * 1e5),
        (Layout(shard=8, reshard=False), MIXED, 2 * 1e6 + (2 + 4) * 1e5),
        (Layout(shard=8), HALF, 2 * 2e5 + (2 + 2) * 1e5),
    ],
)
def test_units_by_hand(layout, precision, expected):
    assert held_bytes(MILLION, layout, precision).units == pytest.approx(expected)


def test_what_is_in_no_unit_is_gathered_all_the_time():
    model = Model(1000, 1000, 1000, largest_unit=100, outside_units=300, units=7)
    assert held_bytes(model, Layout(shard=2), SINGLE).units == 4 * (200 + 300) + 8 * 100
    gather, scatter = collectives(model, Layout(shard=2), SINGLE, Cluster(2))
    assert (gather.bytes, gather.calls, scatter.calls) == (4 * 2000, 16, 8)
    kept, _ = collectives(model, Layout(shard=2, reshard=False), SINGLE, Cluster(2))
    assert (kept.bytes, kept.calls) == (4 * (1000 + 300), 9)  # `training_step` and `forward` both end the root's


def test_tensor_parallelism_splits_part_of_the_activations():
    held = held_bytes(MILLION, Layout(tensor=4), SINGLE, activations=34.0)
    assert held.activations == pytest.approx(10 + 24 / 4)
    assert held_bytes(MILLION, Layout(shard=4), SINGLE, activations=34.0).activations == 34.0


@given(models, sizes, precisions, st.sampled_from(["fsdp", "zero2", "tp"]))
def test_more_devices_never_hold_more(model, size, precision, kind):
    """From two devices on: one alone gathers nothing."""
    fewer = held_bytes(model, sharded(2 * size, kind), PRECISIONS[precision])
    more = held_bytes(model, sharded(4 * size, kind), PRECISIONS[precision])
    assert more.total <= fewer.total * (1 + 1e-12)


@given(models, sizes, precisions)
def test_shards_add_up_to_the_state_of_one_device(model, size, precision):
    one, each = (held_bytes(model, Layout(shard=n), PRECISIONS[precision]) for n in (1, size))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(each, part) * size == pytest.approx(getattr(one, part))


# Bytes sent


@pytest.mark.parametrize(
    ("layout", "precision", "expected"),
    [
        (Layout(replicate=4), SINGLE, {"all-reduce": 4}),
        (Layout(replicate=4, wire=2), SINGLE, {"all-reduce": 2}),
        (Layout(shard=4), SINGLE, {"all-gather": 8, "reduce-scatter": 4}),
        (Layout(shard=4), MIXED, {"all-gather": 4, "reduce-scatter": 4}),
        (Layout(shard=4, reshard=False), SINGLE, {"all-gather": 4, "reduce-scatter": 4}),
        (Layout(replicate=2, shard=2), SINGLE, {"all-gather": 8, "reduce-scatter": 4, "all-reduce": 2}),
        (Layout(), SINGLE, {}),
    ],
)
def test_traffic_per_parameter_is_that_counted_on_ranks(layout, precision, expected):
    found = collectives(MILLION, layout, precision, Cluster(4))
    assert {each.kind: each.bytes / 1e6 for each in found} == pytest.approx(expected)


def test_a_ring_of_four_by_hand():
    """400 bytes in 4 parts: 3 hops of 100 to reduce-scatter, 3 more to gather the sum."""
    assert Collective("reduce-scatter", "", 400, 4).sent == 300
    assert Collective("all-gather", "", 400, 4).sent == 300
    assert Collective("all-reduce", "", 400, 4).sent == 600


def test_split_layers_reduce_their_activations_and_the_computation_waits():
    model = Model(10**6, 10**6, 10**6, 10**5, split=0.9, split_layers=6, row_features=256, column_features=512)
    (found,) = collectives(model, Layout(tensor=2), SINGLE, Cluster(2), tokens=32)
    assert (found.kind, found.bytes, found.calls, found.waits) == ("all-reduce", 32 * 768 * 4, 6, True)
    (found,) = collectives(model, Layout(tensor=2), MIXED, Cluster(2), tokens=32)
    assert found.bytes == 32 * (256 * 2 + 512 * 4)


def test_shards_that_leave_a_node_share_its_cards_between_tensor_groups():
    cluster = Cluster(8, nodes=2, node_bandwidth=360, bandwidth=40)
    gather = collectives(MILLION, Layout(shard=4, tensor=4), SINGLE, cluster)[0]
    assert gather.rate(cluster) == 10e9
    inside = collectives(MILLION, Layout(shard=8, replicate=2), SINGLE, cluster)
    assert [each.rate(cluster) for each in inside] == [360e9, 360e9, 5e9]


@given(models, st.sampled_from([2, 4, 8, 16]), precisions)
def test_a_device_sends_less_than_twice_each_tensor(model, size, precision):
    """Approached as devices grow: the bytes of a ring do not grow with its length."""
    for layout in (Layout(replicate=size), Layout(shard=size)):
        for each in collectives(model, layout, PRECISIONS[precision], Cluster(size)):
            rounds = 2 if each.kind == "all-reduce" else 1
            assert each.bytes * rounds / 2 <= each.sent * (1 + 1e-12) < each.bytes * rounds * (1 + 1e-12)


# Time


@pytest.mark.parametrize(
    ("layout", "cards", "per_cent"),
    [
        # 8 B parameters, 16 x 1024 tokens, bf16-mixed; cards of a node in GB/s reached
        (Layout(shard=8), None, 98),
        (Layout(shard=8, reshard=False), None, 99),
        (Layout(shard=16), 320, 98),
        (Layout(replicate=16), 40, 87),
        (Layout(replicate=16, wire=2), 40, 93),
        (Layout(shard=16, reshard=False), 40, 90),
        (Layout(shard=16), 40, 87),
        (Layout(replicate=2, shard=8), 40, 91),
        (Layout(replicate=16), 2.5, 8),
        (Layout(replicate=16, wire=2), 2.5, 16),
        (Layout(shard=16, reshard=False), 2.5, 11),
        (Layout(shard=16), 2.5, 8),
        (Layout(replicate=2, shard=8), 2.5, 15),
    ],
)
def test_efficiency_of_eight_billion_parameters(layout, cards, per_cent):
    """C = 6 * 8e9 * 16384 / (989e12 * 0.4) = 1.99 s; without jitter, as on paper."""
    count = 8 * 10**9
    model = Model(count, count, count, largest_unit=count // 16, units=33)
    cluster = Cluster(8, 1 if cards is None else 2, bandwidth=cards or 40, jitter=0)
    compute = compute_seconds(count, 16384, 989)
    seconds = step(model, layout, MIXED, cluster, compute)
    assert 100 * efficiency(compute, seconds, layout.data, cluster.world) == pytest.approx(per_cent, abs=0.6)


@pytest.mark.parametrize(("wire", "per_cent"), [(None, 87), (2, 93)])
def test_efficiency_of_a_small_net_on_a_slow_link(wire, per_cent):
    """25 M parameters, 0.1 s: 2 * 100 MB * 15/16 / 2.5 GB/s = 75 ms, a fifth of them seen: 0.1 / 0.115."""
    count = 25 * 10**6
    cluster = Cluster(8, 2, bandwidth=2.5, jitter=0)
    seconds = step(Model(count, count, count, count), Layout(replicate=16, wire=wire), SINGLE, cluster, 0.1)
    assert 100 * efficiency(0.1, seconds, 16, 16) == pytest.approx(per_cent, abs=0.6)


def test_latency_by_hand():
    """100 MB of gradients are 4 buckets of 25 MiB: 4 * 8 us * log2 16 = 128 us, of nothing else on an endless link."""
    model = Model(25 * 10**6, 25 * 10**6, 25 * 10**6, 1)
    endless = Cluster(16, node_bandwidth=math.inf)
    (found,) = collectives(model, Layout(replicate=16), SINGLE, endless)
    assert found.seconds(endless) == pytest.approx(128e-6)


def test_steps_by_hand():
    one, several = Cluster(8), Cluster(8, nodes=2)
    assert overlapped_seconds(2.0, 1.0, 0.5, one) == pytest.approx(2.0 + 0.2 * 1.0 + 0.5)
    assert overlapped_seconds(1.0, 2.0, 0.0, one) == pytest.approx(2.2)
    assert overlapped_seconds(1.0, 2.0, 0.0, several) == pytest.approx(2.2 * 1.025)


layouts = st.sampled_from(
    [
        Layout(replicate=16),
        Layout(replicate=16, wire=2),
        Layout(shard=16),
        Layout(shard=16, reshard=False),
        Layout(replicate=2, shard=8),
        Layout(shard=4, tensor=4),
    ]
)


@given(models, layouts, precisions, rates, rates, st.floats(0, 10), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_slower_link_never_shortens_a_step(model, layout, precision, inside, between, compute, less, little):
    fast = Cluster(8, 2, node_bandwidth=inside, bandwidth=between)
    slow = Cluster(8, 2, node_bandwidth=inside * less, bandwidth=between * little)
    took, takes = (step(model, layout, PRECISIONS[precision], each, compute) for each in (fast, slow))
    assert takes >= took * (1 - 1e-12)
    assert took >= compute


# Optimizers


def made(name, net):
    options = {"SGD_momentum": {"momentum": 0.9}}.get(name, {})
    return getattr(torch.optim, name.removesuffix("_momentum"))(net.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if hasattr(torch.optim, name.removesuffix("_momentum"))])
def test_the_table_says_what_torchs_optimizers_keep(name):
    sparse = name == "SparseAdam"
    net = nn.Embedding(64, 64, sparse=True) if sparse else nn.Linear(64, 64, bias=False)
    optimizer = made(name, net)
    net(torch.arange(64) if sparse else torch.randn(2, 64)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    state = optimizer.state[net.weight].values()
    kept = sum(each.numel() * each.element_size() for each in state if torch.is_tensor(each) and each.numel() > 1)
    factors = 2 * 64 * 4 if name == "Adafactor" else 0
    assert kept == OPTIMIZERS[name].per_parameter(4) * 64 * 64 + factors


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Adam", {"amsgrad": True}, 12),
        ("RMSprop", {"momentum": 0.9, "centered": True}, 12),
        ("SGD", {"momentum": 0}, 0),
        ("AdamW8bit", {}, 2),
    ],
)
def test_options_add_states(name, options, expected):
    assert OPTIMIZERS[name].per_parameter(4, options) == expected
