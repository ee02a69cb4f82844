"""Rounds of timing: what the range holds, on a clock that only the subjects move, and where a module's tensors lie."""

import copy
import random
from itertools import combinations

import pytest
import torch
from torch import nn

from lightning_optim.measure.latency import against_first, interleaved_latency, latencies
from lightning_optim.measure.rounds import ROUNDS, ModuleSubject, Subject, compared, places_in_memory, time_in_rounds
from lightning_optim.measure.size import bytes_of
from lightning_optim.target import ForwardInputs

PLACEMENT = 0.13
"""How much slower a badly placed copy was."""

TRIES = 100


class World:
    """A clock that calls move; on a busy one half of them take up to three times as long."""

    def __init__(self, seed, busy):
        self.now, self.busy, self.random = 0.0, busy, random.Random(seed)

    def clock(self):
        return self.now

    def model(self, seconds):
        return Placed(self, seconds)


class Placed(Subject):
    """A model whose time depends on where it lies."""

    def __init__(self, world, seconds):
        super().__init__(self.take)
        self.world, self.seconds = world, seconds

    def renew(self):
        self.factor = 1 + PLACEMENT * self.world.random.choice([0, 0, 1])

    def take(self, case):
        disturbed = self.world.busy and self.world.random.random() < 0.5
        self.world.now += self.seconds * self.factor * (1 + 2 * self.world.random.random() * disturbed)


def measured(seed, busy, *seconds):
    """Rows of models with these times, the first of which is the reference."""
    world = World(seed, busy)
    subjects = [world.model(time) for time in (*seconds, seconds[0])]
    times, calls = time_in_rounds(subjects, [None], world.clock, seconds=0.0, least=160, most=160)
    return against_first(times[0], calls)


@pytest.mark.parametrize("busy", [False, True])
def test_equal_models_have_no_winner(busy):
    assert sum(measured(seed, busy, 1e-3, 1e-3)[1].differs for seed in range(TRIES)) <= TRIES / 20


@pytest.mark.parametrize("busy", [False, True])
def test_models_that_differ_do(busy):
    rows = [measured(seed, busy, 1e-3, 0.6e-3, 2e-3) for seed in range(TRIES)]
    for place, ratio in ((1, 0.6), (2, 2.0)):
        assert sum(row[place].differs for row in rows) >= TRIES * 0.95
        assert all(row[place].ratio == pytest.approx(ratio, rel=PLACEMENT + 0.05) for row in rows)


@pytest.mark.parametrize("busy", [False, True])
def test_rows_of_one_shape_agree_within_their_ranges(busy):
    for seed in range(TRIES):
        rows = measured(seed, busy, 4e-3, 1e-3, 1e-3, 1e-3)[1:]
        for left, right in combinations(rows, 2):
            assert max(left.low, right.low) <= min(left.high, right.high)
            assert left.ratio == pytest.approx(right.ratio, rel=PLACEMENT + 0.05)


def test_a_ratio_that_the_reference_has_against_itself_is_noise():
    reference, twin = [1.0] * ROUNDS, [0.85, 1.1, *[1.0] * 6]
    noise = compared([0.9, 0.88, *[0.9] * 6], reference, twin)
    assert (noise.ratio, noise.low, noise.high, noise.differs) == (0.9, 0.85, 1.1, False)
    clear = compared([0.8] * ROUNDS, reference, twin)
    assert (clear.ratio, clear.low, clear.high, clear.differs) == (0.8, 0.8, 0.8, True)
    assert compared([0.9] * ROUNDS, reference).differs  # without a second reference the range is all there is


def test_all_are_called_equally_often_in_an_order_that_changes():
    world, order, readied = World(0, False), [], []

    class Noted(Placed):
        def ready(self):
            readied.append(self.seconds)

        def take(self, case):
            order.append((case, self.seconds))
            super().take(case)

    subjects = [Noted(world, seconds) for seconds in (1.0, 2.0, 3.0)]
    times, calls = time_in_rounds(subjects, ["one", "batch"], world.clock, least=16, most=16)
    assert calls == 16
    assert [[len(rounds) for rounds in case] for case in times] == [[ROUNDS] * 3] * 2
    assert [seconds for _, seconds in order] == readied
    assert len({order.count((case, seconds)) for case in ("one", "batch") for seconds in (1.0, 2.0, 3.0)}) == 1
    firsts = {order[index] for index in range(0, len(order), 3)}
    assert {seconds for _, seconds in firsts} == {1.0, 2.0, 3.0}


class Seen(nn.Module):
    """Notes where its tensors lie when it is called."""

    def __init__(self, fails=False):
        super().__init__()
        self.layer, self.norm, self.fails, self.places = nn.Linear(8, 8), nn.BatchNorm1d(8), fails, set()
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.layer.weight

    def forward(self, x):
        assert self.tied.weight is self.layer.weight
        self.places.add((self.layer.weight.data_ptr(), self.norm.running_mean.data_ptr()))
        if self.fails:
            raise KeyError("boom")
        return self.tied(self.norm(self.layer(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_computes_in_new_places_and_gets_its_own_tensors_back(fails):
    module = Seen(fails)
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    values = copy.deepcopy(module.state_dict())
    subjects = [ModuleSubject(module), ModuleSubject(module)]
    inputs = ForwardInputs((torch.ones(2, 8),))
    if fails:
        with pytest.raises(KeyError, match="boom"):
            time_in_rounds(subjects, [inputs], lambda: 0.0)
    else:
        time_in_rounds(subjects, [inputs], lambda: 0.0, least=1, most=1)
        assert len({place for place, _ in module.places}) == 2 * ROUNDS
    assert before["layer.weight"] not in {place for place, _ in module.places}
    after = module.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
    changed = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} if not fails else set()
    assert all(torch.equal(after[name], values[name]) for name in values.keys() - changed)


def test_without_room_in_memory_tensors_stay_where_they_are(monkeypatch):
    module = Seen()
    home = module.layer.weight.data_ptr()
    assert places_in_memory([module, module]) == ROUNDS
    monkeypatch.setattr("lightning_optim.measure.rounds.free_bytes", lambda device: 4 * 3 * bytes_of(module))
    assert places_in_memory([module, module]) == 2
    monkeypatch.setattr("lightning_optim.measure.rounds.free_bytes", lambda device: 0)
    assert places_in_memory([module]) == 0
    result = interleaved_latency(module, ForwardInputs((torch.ones(2, 8),)), Seen(), twin=True)
    assert result.ratio > 0
    assert {place for place, _ in module.places} == {home}


def test_copies_of_a_net_agree_within_their_ranges():
    """The one with a real clock: ranges of equal rows miss each other once in 12,870 times."""
    large = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
    small = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    models = [large, small, copy.deepcopy(small), copy.deepcopy(small)]
    (rows,) = latencies(models, [ForwardInputs((torch.zeros(16, 64),))], seconds=0.02, least=40, most=80)
    for left, right in combinations(rows[1:], 2):
        assert max(left.low, right.low) <= min(left.high, right.high)
