"""Channels that shrink before ChannelPruning removes them."""

import copy
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.models import (
    Classifier,
    ConvNet,
    Files,
    ResumableLoader,
    Stacked,
    assert_same_state,
    fit,
    new,
    trainer,
    val_loader,
)
from lightning_optim import DistillationModule, Recipe, WeightPruning, load_from_checkpoint
from lightning_optim.callbacks import ChannelPruning, DepthPruning
from lightning_optim.functional.channels import CHANNEL_CRITERIA
from lightning_optim.functional.regularization import REGULARIZATIONS

every_regularization = pytest.mark.parametrize("name", sorted(REGULARIZATIONS))
one_quickly = pytest.mark.parametrize("name", ["growing", pytest.param("group_lasso", marks=pytest.mark.slow)])


def channels(name, ratio=0.5, **arguments):
    return ChannelPruning(ratio, **{"events": 3, "start": 2, "end": 17, "regularization": name, **arguments})


def widths(module):
    return [layer.weight.shape[0] for layer in module.net if isinstance(layer, (nn.Linear, nn.Conv2d))]


class NormsOfUnits(pl.Callback):
    """Notes after each batch the norms of what reads and writes the first layer's channels."""

    def __init__(self):
        self.norms = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        first, second = pl_module.net[0].weight.detach(), pl_module.net[4].weight.detach()
        scale, shift, bias = pl_module.net[1].weight, pl_module.net[1].bias, pl_module.net[0].bias
        columns = [first, second.T, *(vector.detach()[:, None] for vector in (scale, shift, bias))]
        self.norms[trainer.global_step] = torch.cat(columns, 1).norm(dim=1)


class Still(Classifier):
    """No gradient moves it: what changes is the regularization alone."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_without_gradients_growing_leaves_what_its_strength_says(tmp_path):
    """Half of the channels arrive at the event with exp(-strength) of each weight; others keep theirs bit for bit."""
    module, notes = new(Still), NormsOfUnits()
    before = copy.deepcopy(module)
    fit(tmp_path, module, channels("growing", scope="layer", start=3, end=13, events=1, strength=2.0), notes)
    norms = notes.norms
    assert torch.equal(norms[1], norms[3])
    fractions = {step: norms[step] / norms[3] for step in (8, 12)}
    leaving = fractions[12] < 0.9
    assert int(leaving.sum()) == 8
    squares = before.net[4].weight.detach().norm(dim=1)
    assert squares.shape == (16,)  # the second layer shrinks too, so the first one's columns are only nearly whole
    low, high = fractions[12][leaving], fractions[12][~leaving]
    assert float(low.max()) < math.exp(-2.0 * 0.81) * 1.01
    assert float(high.min()) > 0.5
    assert float(fractions[8][leaving].max()) < math.exp(-2.0 * 0.25) * 1.01
    kept = [index for index in range(16) if not leaving[index]]
    assert torch.equal(module.net[0].weight, before.net[0].weight[kept])
    assert torch.equal(module.net[1].bias, before.net[1].bias[kept])


def test_group_lasso_zeroes_the_smallest_units(tmp_path):
    module, notes = new(Still), NormsOfUnits()
    fit(tmp_path, module, channels("group_lasso", scope="layer", start=3, end=23, events=1, strength=3.0), notes)
    dense, last = notes.norms[3], notes.norms[22]
    gone = last < 1e-3 * dense.mean()
    assert 1 <= int(gone.sum()) <= 14
    assert float(dense[gone].max()) < float(dense[~gone].max())
    assert widths(module) == [8, 8, 3]


@pytest.mark.slow
@every_regularization
@pytest.mark.parametrize("criterion", sorted(set(CHANNEL_CRITERIA) - {"bn_scale"}))
def test_every_criterion_reaches_what_is_asked(tmp_path, name, criterion):
    module = new()
    fit(tmp_path, module, channels(name, criterion=criterion, scope="layer"))
    assert widths(module) == [8, 8, 3]
    module = new(width=24)
    fit(tmp_path, module, channels(name, criterion=criterion, round_to=4))
    assert sum(widths(module)[:2]) == 24
    assert all(width % 4 == 0 for width in widths(module)[:2])


@one_quickly
def test_convolutions_with_groups_patterns_and_goals(tmp_path, name):
    module = new(ConvNet)
    fit(tmp_path, module, channels(name, scope="layer"))
    assert widths(module)[:2] == [4, 4]
    module = new()
    fit(tmp_path, module, channels(name, {"net.4": 0.75}))
    assert widths(module) == [16, 4, 3]
    module = new(width=32)
    fit(tmp_path, module, ChannelPruning(target={"macs": 0.4}, regularization=name, start=2, end=17, events=3))
    assert sum(p.numel() for p in module.parameters()) < 0.45 * sum(p.numel() for p in new(width=32).parameters())


def test_what_was_chosen_is_what_leaves(tmp_path):
    """Under a criterion that draws anew at each event too."""

    class Looks(pl.Callback):
        leaving = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 11:
                self.before = pl_module.net[4].bias.detach().clone()
                scale = pl_module.net[4].weight.detach().norm(dim=1)
                self.small = scale < 0.1 * scale.max()
            if trainer.global_step == 13:
                self.after = pl_module.net[4].bias.shape

    looks = Looks()
    pruning = channels("growing", criterion="random", scope="layer", start=2, end=12, events=1, strength=9.0)
    fit(tmp_path, new(), pruning, looks, max_epochs=2)
    assert int(looks.small.sum()) == 8
    assert looks.after == (8,)


@pytest.mark.parametrize("events", [1, 3])
def test_growing_cuts_what_hardly_counts(tmp_path, events):
    """The outputs change little at the cut, and the log says how large what left was."""

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if "channels/leaving_norm" in trainer.callback_metrics:
                self.logged = float(trainer.callback_metrics["channels/leaving_norm"])

    found = {}
    for name in (None, "growing"):
        module, looks = new(), Looks()
        fit(tmp_path, module, channels(name, events=events, **({} if name is None else {"strength": 5.0})), looks)
        found[name] = getattr(looks, "logged", None)
    assert found[None] is None
    assert found["growing"] < 0.2


def test_the_line_of_an_event_says_it(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, new(), channels("growing"))
    assert "channels shrink by growing (strength 3)" in caplog.text
    assert "of their groups' mean norm)" in caplog.text


# Runs.


class Manual(Classifier):
    """Two optimizers stepped by hand, one of them twice a batch and the other every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            for _ in range(2 if number == 0 else batch_idx % 2):
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD([*self.net[0].parameters(), *self.net[1].parameters()], 0.05, momentum=0.9),
            torch.optim.AdamW([*self.net[4].parameters(), *self.net[6].parameters()], 1e-2),
        )


class StillManual(Manual):
    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        for optimizer in (first, second):
            optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
        return first, second


def test_however_often_an_optimizer_steps_its_parameters_shrink_by_the_same(tmp_path):
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if pl_module.net[0].weight.shape[0] == 16 and batch_idx == 7:
                self.first = pl_module.net[0].weight.detach().clone()
                self.second = pl_module.net[4].weight.detach().clone()

    module, looks = new(StillManual), Looks()
    before = copy.deepcopy(module)
    pruning = channels("growing", scope="layer", include=["net.0"], start=2, end=9, events=1, strength=2.0)
    fit(tmp_path, module, pruning, looks, max_epochs=2)
    decay = math.exp(-2.0 * (6 / 7) ** 2)  # after eight batches, in the last of which both stepped
    rows = looks.first.norm(dim=1) / before.net[0].weight.detach().norm(dim=1)
    columns = looks.second.norm(dim=0) / before.net[4].weight.detach().norm(dim=0)
    torch.testing.assert_close(rows, columns)
    assert sorted(rows.tolist()) == pytest.approx([decay] * 8 + [1.0] * 8)


RUNS = {
    "plain": (Classifier, {}, {}),
    "manual": (Manual, {}, {}),
    "accumulated and clipped": (Classifier, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "bf16-mixed": (Classifier, {}, {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, {}, {"precision": "bf16-true"}),
    "taylor": (Classifier, {"criterion": "taylor"}, {}),
    "activation": (Classifier, {"criterion": "activation"}, {}),
    "goal": (Classifier, {"pruning_ratio": None, "target": {"macs": 0.4}}, {}),
}


QUICK = ("manual", "goal")


def pruning_of(name, options, arguments):
    ends = {"start": 1, "end": 8} if "accumulate_grad_batches" in options else {"start": 2, "end": 17}
    arguments = {**ends, "events": 2, **arguments}
    if arguments.pop("pruning_ratio", 0.5) is None:
        return ChannelPruning(regularization=name, **arguments)
    return ChannelPruning(0.5, regularization=name, **arguments)


@one_quickly
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in RUNS]
)
def test_a_run_resumed_at_an_epoch_equals_the_uninterrupted_one(tmp_path, name, case):
    model, arguments, options = RUNS[case]
    whole = new(model)
    fit(tmp_path, whole, pruning_of(name, options, arguments), Files(tmp_path / "files"), **options)
    files = sorted((tmp_path / "files").glob("[0-9].ckpt"))
    assert len(files) == 3
    for file in files:
        assert "shrinking" in str(torch.load(file, weights_only=True)["callbacks"])
        again = new(model)
        fit(tmp_path, again, pruning_of(name, options, arguments), ckpt_path=file, **options)
        assert_same_state(whole, again)
    assert_same_state(whole, load_from_checkpoint(model, files[-1]))


@one_quickly
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one(tmp_path, name):
    """Also where its inputs, and so its groups, are known after the first resumed step only."""

    def run(module, *callbacks, ckpt_path=None, **arguments):
        pruning = channels(name, criterion="random", start=2, end=12, events=2, **arguments)
        fitted = trainer(tmp_path, pruning, *callbacks, max_epochs=2)
        fitted.fit(module, ResumableLoader(), val_loader(), ckpt_path=ckpt_path, weights_only=True)
        return module

    for known in ({"example_inputs": torch.zeros(2, 12)}, {}):
        whole = run(new(), Files(tmp_path / "files", every_n_steps=1), **known)
        for step in (2, 5, 7, 12):
            again = run(new(), ckpt_path=tmp_path / "files" / f"step{step}.ckpt", **known)
            assert_same_state(whole, again)


def test_the_window_alone_and_only_with_a_regularization(tmp_path):
    """Before the window and after it nothing shrinks; a run without it is what it was."""
    plain, module = new(dropout=0.3), new(dropout=0.3)
    fit(tmp_path, plain, max_epochs=2)
    with pytest.warns(UserWarning, match="will not close"):
        fit(tmp_path, module, channels("group_lasso", start=17, end=30), max_epochs=2)
    assert_same_state(plain, module)
    runs = []
    for name in (None, "growing"):
        run, pruning = new(Still), channels(name, end=9)
        fit(tmp_path, run, pruning)
        runs.append(pruning.state_dict()["shrinking"]["units"])
    assert runs == [{}, {}]


def test_a_second_fit_and_a_file_without_it(tmp_path):
    pruning, module = channels("growing"), new()
    fit(tmp_path, module, pruning, Files(tmp_path / "with"))
    again = new()
    fit(tmp_path, again, pruning)  # a new Trainer, a new model: the window opens anew
    assert_same_state(module, again)
    fit(tmp_path, new(), channels(None), Files(tmp_path / "without"))
    resumed = new()
    fit(tmp_path, resumed, channels("growing"), ckpt_path=tmp_path / "without" / "0.ckpt")
    assert sum(widths(resumed)[:2]) == 16
    resumed = new()
    fit(tmp_path, resumed, channels(None), ckpt_path=tmp_path / "with" / "0.ckpt")
    assert sum(widths(resumed)[:2]) == 16


@one_quickly
def test_frozen_parameters_stay_whole_until_they_leave(tmp_path, name):
    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

    module = new(Frozen)
    rows = {tuple(row) for row in module.net[0].weight.tolist()}
    fit(tmp_path, module, channels(name, scope="layer"))
    assert widths(module) == [8, 8, 3]
    assert {tuple(row) for row in module.net[0].weight.tolist()} <= rows


# With other techniques.


@one_quickly
def test_blocks_that_leave_while_channels_shrink(tmp_path, name):
    def both():
        return [channels(name, start=2, end=15, events=3, scope="layer"), DepthPruning(0.5, start=4, end=9)]

    whole, again = new(Stacked), new(Stacked)
    fit(tmp_path, whole, *both(), Files(tmp_path / "files", every_n_steps=1))
    assert len(whole.blocks) == 2
    assert [block.up.out_features for block in whole.blocks] == [8, 8]
    fit(tmp_path, again, *both(), ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(whole, again)


@one_quickly
def test_in_a_recipe_with_zeros_and_integers(tmp_path, name):
    recipe = Recipe(
        channel_pruning={"pruning_ratio": 0.5, "regularization": name, "scope": "layer", "events": 2},
        weight_pruning={"sparsity": 0.5, "every_n_steps": 2},
        quantization=True,
    )
    module = new()
    fit(tmp_path, module, *recipe.callbacks(), max_epochs=6)
    assert widths(module) == [8, 8, 3]
    zeros = sum(int((module.net[place].weight == 0).sum()) for place in (0, 4))
    assert zeros == (8 * 12 + 8 * 8) // 2
    assert recipe.as_plain()["channel_pruning"]["regularization"] == name


def test_zeros_stay_zero_while_channels_shrink(tmp_path):
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                self.zeros = [int((pl_module.net[place].weight == 0).sum()) for place in (0, 4)]

    pruning, module, looks = WeightPruning(0.5, start=1, end=1), new(), Looks()
    fit(
        tmp_path, module, channels("group_lasso", start=4, end=16, events=1, strength=0.1), looks, pruning, max_epochs=2
    )
    assert sum(looks.zeros) == (16 * 12 + 16 * 16) // 2


def test_under_a_teacher(tmp_path):
    teacher, student = new(width=32), new()
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(student, teacher)
    fit(tmp_path, module, channels("growing", scope="layer"))
    assert widths(student) == [8, 8, 3]
    assert_same_state(teacher, before)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"regularization": "lasso"}, ValueError, "unknown regularization 'lasso'; known: 'group_lasso', 'growing'"),
        ({"regularization": 3}, TypeError, "`regularization` must be 'group_lasso', 'growing' or None, got 3"),
        ({"strength": 1.0}, ValueError, "`strength` belongs to a regularization"),
        ({"regularization": "growing", "strength": 0}, ValueError, "must be a number above 0, got 0"),
        ({"regularization": "growing", "strength": math.inf}, ValueError, "must be a number above 0, got inf"),
        ({"regularization": "growing", "strength": math.nan}, ValueError, "must be a number above 0, got nan"),
        ({"regularization": "growing", "strength": "3"}, TypeError, "must be a number above 0, .* got '3'"),
        ({"regularization": "growing", "strength": True}, TypeError, "must be a number above 0, .* got True"),
        ({"regularization": "growing", "start": 3, "end": 3}, ValueError, "shrink between `start` and `end`, got 3"),
        (
            {"regularization": "growing", "criterion": "taylor", "start": 0},
            ValueError,
            "chooses channels at `start`, and by step 0 the criterion has seen nothing",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ChannelPruning(**arguments)
