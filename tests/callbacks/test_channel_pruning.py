"""ChannelPruning inside the Trainer: channels leave, and optimizer, checkpoint and run go on."""

import copy
import logging
import pickle
import threading

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn

from helpers.marks import cells
from helpers.models import (
    Classifier,
    ConvNet,
    Files,
    Quiet,
    SeededByStep,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import CompressedCheckpoint, PerformanceScore, WeightPruning, load_from_checkpoint
from lightning_optim.callbacks import ChannelPruning
from lightning_optim.checkpoint import KEY
from lightning_optim.functional.channels import CHANNEL_CRITERIA
from lightning_optim.measure.macs import count_macs


def channels(ratio=0.5, **words):
    return ChannelPruning(ratio, **{"events": 3, "start": 2, "end": 0.7, **words})


def widths(module):
    return [layer.weight.shape[0] for layer in module.net if isinstance(layer, (nn.Linear, nn.Conv2d))]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# What is asked is what is reached.


@pytest.mark.parametrize("criterion", sorted(set(CHANNEL_CRITERIA) - {"bn_scale"}))
@pytest.mark.parametrize("epochs", [1, 4])
def test_every_criterion_reaches_what_is_asked(tmp_path, criterion, epochs):
    module = new()
    fit(tmp_path, module, channels(0.5, criterion=criterion, scope="layer"), max_epochs=epochs)
    assert widths(module) == [8, 8, 3]
    assert module.net[0].out_features == module.net[1].num_features == module.net[4].in_features == 8
    assert module.net[6].in_features == 8


def test_a_global_ranking_takes_the_same_number_from_where_it_costs_least(tmp_path):
    module = new(width=32)
    fit(tmp_path, module, channels(0.5, scope="global"))
    assert sum(widths(module)[:2]) == 32


def test_bn_scale_ranks_by_the_norm_layers(tmp_path):
    class AllNormed(Classifier):
        def __init__(self):
            super().__init__()
            self.net[5] = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())

    module = new(AllNormed)
    fit(tmp_path, module, channels(0.5, criterion="bn_scale", scope="layer"))
    assert widths(module) == [8, 8, 3]
    with pytest.raises(ValueError, match=r"group net\.4: no layer of the group can be scored"):
        fit(tmp_path, new(), channels(0.5, criterion="bn_scale"))


def test_ratios_by_pattern_and_round_to(tmp_path):
    module = new()
    fit(tmp_path, module, channels({"net.4": 0.75}))
    assert widths(module) == [16, 4, 3]
    module = new()
    fit(tmp_path, module, channels(0.3, round_to=4, scope="layer"))
    assert widths(module) == [12, 12, 3]
    with pytest.raises(ValueError, match=r"'net\.9' matches no group; there are net\.4, net\.0"):
        fit(tmp_path, new(), channels({"net.9": 0.5}))


def test_convolutions_with_groups(tmp_path):
    module = new(ConvNet)
    fit(tmp_path, module, channels(0.5, scope="layer"))
    assert widths(module)[:2] == [4, 4]
    assert module.net[4].groups == 2


def test_only_what_is_selected_leaves(tmp_path):
    module = new()
    fit(tmp_path, module, channels(0.5, include=["net.4"]))
    assert widths(module) == [16, 8, 3]
    module = new()
    fit(tmp_path, module, channels(0.5, exclude=["net.4"]))
    assert widths(module) == [8, 16, 3]


class Nested(Classifier):
    """The net one level down, called through its own forward."""

    def __init__(self):
        super().__init__()
        self.body, self.net = self.net, None

    def forward(self, x):
        return self.body(x)


def test_a_module_below(tmp_path):
    module = new(Nested)
    fit(tmp_path, module, channels(0.5, module="body", scope="layer"), Files(tmp_path / "files"))
    assert module.body[4].weight.shape == (8, 8)
    assert_same_state(module, load_from_checkpoint(Nested, tmp_path / "files" / "2.ckpt"))


def test_nothing_happens_before_the_window_opens(tmp_path):
    plain, module = new(dropout=0.3), new(dropout=0.3)
    fit(tmp_path, plain, max_epochs=2)
    with pytest.warns(UserWarning, match="will not close"):
        fit(tmp_path, module, channels(start=17, end=30), max_epochs=2)
    assert_same_state(plain, module)


# The run goes on.


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_parameter_trains_on_with_its_state(tmp_path, optimizer):
    module, snapshots = new(optimizer=optimizer), {}

    class Notes(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            snapshots[trainer.current_epoch] = copy.deepcopy(dict(pl_module.named_parameters()))

    run = fit(tmp_path, module, channels(start=2, end=10), Notes(), max_epochs=4)
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}
    assert set(map(id, run.optimizers[0].state)) == {id(p) for p in module.parameters()}
    for parameter, state in run.optimizers[0].state.items():
        assert all(v.shape == parameter.shape for v in state.values() if torch.is_tensor(v) and v.ndim)
    for name in snapshots[3]:
        assert (snapshots[3][name] != snapshots[2][name]).any(), name


def test_reset_forgets_the_state_of_what_changed(tmp_path):
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.counts = [*getattr(self, "counts", []), len(trainer.optimizers[0].state)]

    looks = Looks()
    fit(tmp_path, new(), channels(0.5, start=4, end=4, optimizer_state="reset"), looks, max_epochs=1)
    assert looks.counts[2] == 8
    assert looks.counts[3] < 8  # at the event
    assert looks.counts[4] == 8


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.net[0].parameters(), 0.05, momentum=0.9),
            torch.optim.AdamW(
                [{"params": self.net[4].parameters()}, {"params": self.net[6].parameters(), "lr": 1e-4}], 1e-2
            ),
        )


def test_several_optimizers_and_groups_by_hand(tmp_path):
    module, again = new(Manual), new(Manual)
    run = fit(tmp_path, module, channels(), Files(tmp_path / "files"))
    assert widths(module)[:2] != [16, 16]
    groups = run.optimizers[1].param_groups
    assert groups[0]["params"][0] is module.net[4].weight
    assert groups[1]["params"][0] is module.net[6].weight
    fit(tmp_path, again, channels(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_frozen_layers_stay_frozen_and_shrink(tmp_path):
    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)

    module = new(Frozen)
    fit(tmp_path, module, channels(scope="layer"))
    assert widths(module) == [8, 8, 3]
    assert not module.net[0].weight.requires_grad
    assert module.net[4].weight.requires_grad


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    class Cast(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.net[0].weight.dtype)).float()

    module = new(Cast)
    fit(tmp_path, module, channels(scope="layer"), precision=precision)
    assert widths(module) == [8, 8, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"fast_dev_run": True},
        {"max_steps": 7, "max_epochs": 100},
        {"barebones": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*barebones.*:UserWarning")
def test_trainer_options(tmp_path, options):
    module = new()
    fit(tmp_path, module, channels(0.5, start=0.1, end=0.8, scope="layer"), **options)
    assert widths(module) == [8, 8, 3]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["module", "part"])
def test_torch_compile(tmp_path, when):
    module = new(Quiet)
    if when == "part":
        module.net = torch.compile(module.net, backend="aot_eager")
        fit(tmp_path, module, channels(scope="layer"))
        assert module.net._orig_mod[4].weight.shape == (8, 8)
    else:
        cut = channels(scope="layer", example_inputs=torch.zeros(2, 12))
        fit(tmp_path, torch.compile(module, backend="aot_eager"), cut)
        assert widths(module) == [8, 8, 3]


@pytest.mark.parametrize(
    ("kind", "first"),
    cells(["ema", "swa", "average"], [True, False], quick=[("ema", False), ("swa", True), ("average", True)]),
)
def test_the_average_is_cut_too(tmp_path, kind, first):
    def run(module, ckpt_path=None):
        averaging = {
            "ema": lambda: EMAWeightAveraging(decay=0.9),
            "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
            "average": lambda: WeightAveraging(),
        }[kind]()
        cut = channels(scope="layer")
        callbacks = [averaging, cut] if first else [cut, averaging]
        files = [] if ckpt_path else [Files(tmp_path / "files")]
        fit(tmp_path, module, *callbacks, *files, max_epochs=4, ckpt_path=ckpt_path)

    module = new()
    run(module)
    assert widths(module) == [8, 8, 3]
    assert_same_state(
        module, load_from_checkpoint(Classifier, tmp_path / "files" / "3.ckpt")
    ) if kind != "swa" else None
    if kind != "swa":  # Lightning resumes SWA otherwise than it ran
        again = new()
        run(again, tmp_path / "files" / "1.ckpt")
        assert_same_state(module, again)


# Together with the others.


def both(first="channels", **words):
    pair = [channels(0.5, start=2, end=12, **words), WeightPruning(0.5, start=4, end=20, every_n_steps=4)]
    return pair if first == "channels" else pair[::-1]


@pytest.mark.parametrize("first", ["channels", "weights"])
def test_channels_and_weights_are_pruned_in_one_fit(tmp_path, first):
    module, again = new(), new()
    ours = both(first, scope="layer")
    fit(tmp_path, module, *ours, Files(tmp_path / "files"))
    pruning = next(c for c in ours if isinstance(c, WeightPruning))
    assert widths(module) == [8, 8, 3]
    total = 8 * 12 + 8 * 8
    assert sum(int((module.net[i].weight == 0).sum()) for i in (0, 4)) == total // 2
    for name, mask in pruning.masks.items():
        assert mask.shape == module.state_dict()[name].shape
        assert not module.state_dict()[name][~mask].any()
    for epoch in range(2):
        again = new()
        fit(tmp_path, again, *both(first, scope="layer"), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_p_sees_the_smaller_model_against_the_dense_one_after_a_resume_too(tmp_path):
    def run(ckpt_path=None):
        score = PerformanceScore()
        files = [] if ckpt_path else [Files(tmp_path / "files")]
        trained = fit(tmp_path, new(width=64), channels(scope="layer"), score, *files, ckpt_path=ckpt_path)
        return trained.callback_metrics, score

    metrics, _ = run()
    resumed, score = run(tmp_path / "files" / "1.ckpt")
    assert metrics["P/size"] == resumed["P/size"] < 0.5
    assert score._references["size"] == parameters(new(width=64))
    assert metrics["P/feasible"] == 1


def test_the_best_file_tests_on_the_live_model_and_scores_again(tmp_path):
    best = CompressedCheckpoint(tmp_path / "best", monitor="val_loss")
    module = new()
    run = fit(tmp_path, module, channels(), best, max_epochs=6)
    metrics = run.validate(module, val_loader(), best.best_model_path, verbose=False)
    assert metrics[0]["val_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    fresh = trainer(tmp_path, channels(), best)
    assert fresh.validate(new(), val_loader(), best.best_model_path, verbose=False) == metrics


# Resume, files.


@pytest.mark.parametrize(
    ("cls", "criterion", "precision"),
    cells(
        [Classifier, ConvNet],
        ["magnitude", "taylor", "random"],
        ["32-true", "bf16-mixed"],
        quick=[
            (ConvNet, "magnitude", "32-true"),
            (Classifier, "taylor", "bf16-mixed"),
            (ConvNet, "taylor", "32-true"),
            (Classifier, "random", "32-true"),
        ],
    ),
)
def test_resumed_at_every_epoch_equals_uninterrupted(tmp_path, cls, criterion, precision):
    options = {"max_epochs": 4, "precision": precision}
    module = new(cls)
    fit(tmp_path, module, channels(criterion=criterion), SeededByStep(), Files(tmp_path / "files"), **options)
    for epoch in range(3):
        again = new(cls)
        path = tmp_path / "files" / f"{epoch}.ckpt"
        fit(tmp_path, again, channels(criterion=criterion), SeededByStep(), ckpt_path=path, **options)
        assert_same_state(module, again)


def test_files_load_into_the_class_without_a_trainer(tmp_path):
    module = new()
    run = fit(tmp_path, module, channels(), Files(tmp_path / "files"))
    run.save_checkpoint(tmp_path / "files" / "weights.ckpt", weights_only=True)
    for name in ("2", "weights"):
        path = tmp_path / "files" / f"{name}.ckpt"
        assert torch.load(path, weights_only=True)[KEY]["modules"]
        loaded = load_from_checkpoint(Classifier, path)
        assert_same_state(module, loaded)
        assert torch.equal(loaded.eval()(torch.ones(2, 12)), module.eval()(torch.ones(2, 12)))
    with pytest.raises(RuntimeError, match="size mismatch"):  # Lightning's own loader knows no plan
        Classifier.load_from_checkpoint(tmp_path / "files" / "2.ckpt")


def test_a_second_fit_by_a_new_trainer_prunes_on_from_what_the_module_is(tmp_path):
    module = new()
    fit(tmp_path, module, channels(0.5, scope="layer"))
    run = fit(tmp_path, module, channels(0.5, scope="layer"))
    assert widths(module) == [4, 4, 3]
    run.save_checkpoint(tmp_path / "twice.ckpt")
    assert_same_state(module, load_from_checkpoint(Classifier, tmp_path / "twice.ckpt"))


def test_the_same_trainer_goes_on(tmp_path):
    module, cut = new(), channels(0.5, start=4, end=16, scope="layer")
    with pytest.warns(UserWarning, match="will not close"):
        run = fit(tmp_path, module, cut, max_epochs=1)
    run.fit_loop.max_epochs = 3
    run.fit(module, train_loader(), val_loader())
    assert widths(module) == [8, 8, 3]


def test_the_callback_pickles(tmp_path):
    module, cut = new(), channels()
    fit(tmp_path, module, cut)
    assert pickle.loads(pickle.dumps(cut)).state_dict() == cut.state_dict()
    copy.deepcopy(module)


def test_lines_and_metrics(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = fit(tmp_path, new(), channels(0.5, scope="layer"))
    text = " ".join(record.message for record in caplog.records)
    assert "16 of 32 channels gone in 2 groups" in text
    assert "last layer" in text
    left = parameters(new()), run.callback_metrics["channels/parameters"]
    assert left[1] == pytest.approx((8 * 12 + 8 + 16 + 72 + 27) / left[0])


# What cannot work refuses, and leaves the model whole.


class Attention(nn.Module):
    """Heads from one fused projection."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        width = x.shape[-1]  # that of the input: it does not follow when heads are removed
        q, k, v = (t.view(len(x), -1, self.heads, 4).transpose(1, 2) for t in self.qkv(x).split(width, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class WithAttention(Classifier):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(self.attention(x[:, None])[:, 0])


def test_what_would_be_scrambled_is_left_out_with_its_reason(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    module = new(WithAttention)
    fit(tmp_path, module, channels(scope="layer"))
    assert module.net[0].out_features == 8
    assert module.attention.qkv.weight.shape == (36, 12)
    table = next(r.message for r in caplog.records if "or why not" in r.message)
    assert "attention.qkv" in table


def test_a_failed_event_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    module = new()
    monkeypatch.setattr("lightning_optim.structured.live.event_damage", lambda *a, **k: "it would break")
    with pytest.raises(RuntimeError, match="changed nothing: it would break"):
        fit(tmp_path, module, channels())
    assert widths(module) == [16, 16, 3]
    assert "on_load_checkpoint" not in module.__dict__


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"pruning_ratio": 0}, ValueError, r"fraction in \(0, 1\), got 0"),
        ({"pruning_ratio": 1}, ValueError, r"fraction in \(0, 1\), got 1"),
        ({"pruning_ratio": -1}, ValueError, r"fraction in \(0, 1\), got -1"),
        ({"pruning_ratio": 50}, ValueError, r"pass 0\.5"),
        ({"pruning_ratio": "half"}, TypeError, "fraction"),
        ({"pruning_ratio": {}}, ValueError, "empty"),
        (
            {"criterion": "l7"},
            ValueError,
            "unknown criterion 'l7'; known: activation, bn_scale",
        ),
        ({"scope": "all"}, ValueError, "'global' or 'layer'"),
        ({"reduction": "median"}, ValueError, "'mean', 'sum' or 'max'"),
        ({"round_to": 0}, ValueError, "`round_to`"),
        ({"events": 0}, ValueError, "`events`"),
        ({"optimizer_state": "keep"}, ValueError, "one of 'slice', 'reset'"),
        ({"schedule": "square"}, ValueError, "unknown schedule"),
    ],
)
def test_bad_arguments_raise_at_once(words, error, message):
    with pytest.raises(error, match=message):
        ChannelPruning(**words)


def test_an_event_before_the_first_batch_needs_example_inputs(tmp_path):
    with pytest.raises(MisconfigurationException, match="Pass `example_inputs`"):
        fit(tmp_path, new(), channels(start=0, end=0))
    module = new()
    fit(tmp_path, module, channels(start=0, end=0, example_inputs=torch.zeros(2, 12), scope="layer"))
    assert widths(module) == [8, 8, 3]


def test_a_step_that_calls_a_part_names_the_module(tmp_path):
    class CallsNet(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match=r"Pass module='net'"):
        fit(tmp_path, new(CallsNet), channels())
    module = new(CallsNet)
    fit(tmp_path, module, channels(module="net", scope="layer"))
    assert widths(module) == [8, 8, 3]


def test_a_model_in_which_nothing_can_be_removed(tmp_path):
    class OneLayer(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 3))

    with pytest.raises(MisconfigurationException, match=r"can remove nothing: net\.0 \(last layer\)"):
        fit(tmp_path, new(OneLayer), channels())


def test_learning_rates_rise_again_after_an_event_and_schedulers_do_not_see_it(tmp_path):
    def cut():
        return channels(0.5, start=4, end=4, warmup_steps=3)

    rates = []

    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx < 7:
                assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2

    module, again = new(), new()
    fit(tmp_path, module, cut(), Looks(), Files(tmp_path / "files"), max_epochs=2)
    assert rates[:8] == pytest.approx([1e-2] * 4 + [2.5e-3, 5e-3, 7.5e-3, 1e-2])
    fit(tmp_path, again, cut(), ckpt_path=tmp_path / "files" / "0.ckpt", max_epochs=2)
    assert_same_state(module, again)
    with pytest.raises(ValueError, match="`warmup_steps`"):
        ChannelPruning(warmup_steps=-1)


def test_batchnorm_statistics_become_the_mean_of_the_batches_after_an_event(tmp_path):
    def cut():
        return channels(0.5, start=4, end=4, recalibrate_batches=3, include=["net.4"])

    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            inputs = F.linear(batch[0], before["w"], before["b"]) if before else None
            seen.append((pl_module.net[1].running_mean.clone(), inputs, pl_module.net[1].momentum))
            before.update(w=pl_module.net[0].weight.detach().clone(), b=pl_module.net[0].bias.detach().clone())

    before = {}
    module, again = new(), new()
    fit(tmp_path, module, cut(), Looks(), Files(tmp_path / "files"), max_epochs=2)
    means = [inputs.mean(0) for _, inputs, _ in seen[4:7]]
    torch.testing.assert_close(seen[4][0], means[0])
    torch.testing.assert_close(seen[6][0], sum(means) / 3)
    assert {momentum for _, _, momentum in seen} == {0.1}
    fit(tmp_path, again, cut(), ckpt_path=tmp_path / "files" / "0.ckpt", max_epochs=2)
    assert_same_state(module, again)


# Goals in a measured figure.


@pytest.mark.parametrize(("figure", "fraction"), [("parameters", 0.4), ("macs", 0.5)])
def test_a_goal_is_reached_and_not_passed_by_more_than_one_event(tmp_path, figure, fraction):
    module, again = new(width=64), new(width=64)
    words = {"target": {figure: fraction}, "events": 4}
    run = fit(tmp_path, module, ChannelPruning(**words, start=2, end=0.8), Files(tmp_path / "files"))
    x = torch.zeros(1, 12)
    left = {
        "parameters": parameters(module) / parameters(new(width=64)),
        "macs": count_macs(module, x) / count_macs(new(width=64), x),
    }
    assert fraction - 0.05 <= left[figure] <= fraction
    assert run.callback_metrics["channels/parameters"] == pytest.approx(left["parameters"])
    fit(tmp_path, again, ChannelPruning(**words, start=2, end=0.8), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_a_goal_in_latency_is_measured(tmp_path):
    module = new(width=1024)
    cut = ChannelPruning(target={"latency": 0.7}, start=2, end=0.8, events=2, strict=False)
    fit(tmp_path, module, cut, max_epochs=2)
    assert sum(widths(module)[:2]) < 2048
    assert_same_state(module.state_dict(), module.state_dict())


def test_a_goal_that_cannot_be_reached_says_what_stopped_it(tmp_path):
    words = {"target": {"parameters": 0.05}, "include": ["net.4"], "events": 2}
    with pytest.raises(RuntimeError, match=r"reached .* net\.4 are at their smallest; left alone are .*net\.0"):
        fit(tmp_path, new(), ChannelPruning(**words))
    with pytest.warns(UserWarning, match="are at their smallest"):
        fit(tmp_path, new(), ChannelPruning(**words, strict=False))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ({"macs": 1.5}, ValueError, r"fraction in \(0, 1\) of the dense model's macs, got 1\.5"),
        ({"macs": 0.5, "latency": 0.5}, ValueError, "one key of parameters, macs, latency"),
        ({"speed": 0.5}, ValueError, "one key of"),
        ({}, ValueError, "one key of"),
        (0.5, TypeError, "must be a dict"),
    ],
)
def test_bad_goals_raise_at_once(target, error, message):
    with pytest.raises(error, match=message):
        ChannelPruning(target=target)


@pytest.mark.parametrize("first", ["channels", "weights"])
def test_zeros_that_left_with_their_channels_are_made_up_for(tmp_path, first):
    """Channels leave after the weights' window has closed: the sparsity asked is reached anew."""

    def pair():
        both = [channels(0.5, start=14, end=14, scope="layer"), WeightPruning(0.6, start=2, end=8, every_n_steps=3)]
        return both if first == "channels" else both[::-1]

    module, again = new(), new()
    fit(tmp_path, module, *pair(), Files(tmp_path / "files"))
    hidden = [module.net[i].weight for i in (0, 4)]
    assert sum(w.numel() for w in hidden) == 160
    assert sum(int((w == 0).sum()) for w in hidden) == 96
    fit(tmp_path, again, *pair(), ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)


def test_rounding_is_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(tmp_path, new(), channels(0.3, round_to=4, scope="layer"))
    assert any("8 of 32 channels gone in 2 groups (kept in multiples of 4)" in r.message for r in caplog.records)


def test_a_sharded_strategy_is_refused_with_what_to_do(tmp_path):
    run = trainer(tmp_path, channels())

    class ModelParallelStrategy(type(run.strategy).__mro__[1]):
        pass

    ModelParallelStrategy.__abstractmethods__ = frozenset()
    run.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(
        MisconfigurationException, match=r"under ModelParallelStrategy.*prune before the model is sharded"
    ):
        channels().setup(run, new(), "fit")


# What a review found.


def test_a_target_that_shares_a_parameter_with_the_outside_is_refused(tmp_path):
    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(16, 16)
            self.extra.weight = self.net[4].weight

    with pytest.raises(ValueError, match=r"net\.4\.weight is shared with extra\.weight, outside the module to prune"):
        fit(tmp_path, new(Tied), channels(module="net", example_inputs=torch.zeros(2, 12)))


def test_a_module_that_keeps_outputs_and_a_lock_can_be_copied(tmp_path):
    class Keeps(Classifier):
        def __init__(self):
            super().__init__()
            self.outputs, self.lock = [], threading.Lock()

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.outputs.append(logits)
            return F.cross_entropy(logits, batch[1])

        def on_train_epoch_end(self):
            self.outputs.clear()

    module = new(Keeps)
    fit(tmp_path, module, channels(scope="layer"))
    assert widths(module) == [8, 8, 3]


def test_a_layer_that_only_training_calls_keeps_what_feeds_it(tmp_path):
    class Auxiliary(Quiet):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(16, 3)
            self.net.append(nn.Identity())

        def forward(self, x):
            hidden = self.net[:4](x)
            logits = self.net[4:](hidden)
            return logits + 0.1 * self.aux(hidden) if self.training else logits

    module = new(Auxiliary)
    fit(tmp_path, module, channels(scope="layer", exclude=["net.6"], include=["net.0", "net.4"]))
    assert widths(module) == [16, 8, 3]


def test_what_hangs_on_a_parameter_survives_loading_too(tmp_path):
    class Hangs(Classifier):
        def __init__(self):
            super().__init__()
            self.net[4].weight.no_decay = True
            self.net[4].weight.register_hook(lambda gradient: gradient * 0.5)

        def configure_optimizers(self):
            marked = [p for p in self.parameters() if getattr(p, "no_decay", False)]
            others = [p for p in self.parameters() if not getattr(p, "no_decay", False)]
            return torch.optim.AdamW([{"params": marked, "weight_decay": 0.0}, {"params": others}], 1e-2)

    module = new(Hangs)
    fit(tmp_path, module, channels(start=2, end=10), Files(tmp_path / "files"))
    for epoch in range(2):
        again = new(Hangs)
        fit(tmp_path, again, channels(start=2, end=10), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_two_instances_on_different_layers_and_not_on_one(tmp_path):
    words = {"criterion": "taylor", "start": 2, "end": 12}
    module = new()
    fit(tmp_path, module, channels(0.5, include=["net.0"], **words), channels(0.25, include=["net.4"], **words))
    assert widths(module) == [8, 12, 3]
    with pytest.raises(MisconfigurationException, match=r"net\.0 is selected by two ChannelPruning"):
        fit(tmp_path, new(), channels(0.5, include=["net.0"]), channels(0.5, include=["net.0", "net.4"]))


def test_a_goal_and_a_ratio_contradict_each_other():
    with pytest.raises(ValueError, match="takes the place of `pruning_ratio`"):
        ChannelPruning(0.3, target={"macs": 0.5})


def test_an_exception_in_a_warm_step_gives_the_learning_rate_back(tmp_path):
    class Fails(Quiet):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 6:
                raise KeyError("boom")
            return super().training_step(batch, batch_idx)

    module = new(Fails)
    run = trainer(tmp_path, channels(start=4, end=4, warmup_steps=8))
    with pytest.raises(KeyError, match="boom"):
        run.fit(module, train_loader(), val_loader())
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-2


def test_a_ratio_that_floors_hold_up_is_said(tmp_path):
    with pytest.warns(UserWarning, match="groups are at their floor"):
        fit(tmp_path, new(width=64), channels(0.97, scope="global"))


def test_the_line_gives_the_target_and_macs_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = fit(tmp_path, new(width=64), ChannelPruning(target={"macs": 0.5}, start=2, end=0.8, events=2))
    assert run.callback_metrics["channels/macs"] <= 0.5
    assert any("asked 50.00% of the dense macs" in r.message for r in caplog.records)
    fit(tmp_path, new(), channels(0.5, scope="layer"))
    assert any("asked 50.00% of the channels gone; 16 of 32" in r.message for r in caplog.records)


def test_half_precision_from_autocast_is_cast_for_the_trace(tmp_path):
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.front, self.net = self.net[:4], self.net[4:]

        def forward(self, x):
            return self.net(self.front(x))

    module = new(Two)
    fit(tmp_path, module, channels(module="net", scope="layer"), precision="bf16-mixed")
    assert module.net[0].out_features == 8
