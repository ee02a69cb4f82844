"""WeightPruning inside the Trainer: what is asked is what is reached, and zeros stay zero."""

import copy
import logging
import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from helpers.marks import cells
from helpers.models import (
    CLASSES,
    Classifier,
    ConvNet,
    Files,
    Quiet,
    ResumableLoader,
    SeededByStep,
    Stream,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import ChannelPruning, WeightPruning, load_from_checkpoint
from lightning_optim.functional.criteria import CRITERIA
from lightning_optim.functional.schedules import SCHEDULES
from lightning_optim.functional.statistics import squared_inputs

SELECTED = ("net.0.weight", "net.4.weight")  # 192 and 256 weights


def zeros(module, names=SELECTED):
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return sum(int((state[name] == 0).sum()) for name in names)


def sparsity(module, names=SELECTED):
    state = module.state_dict()
    return zeros(module, names) / sum(state[name].numel() for name in names)


def pruning(sparsity=0.8, **words):
    return WeightPruning(sparsity, **{"every_n_steps": 4, **words})


class StaysZero(pl.Callback):
    """Sees every forward pass: what was zero at the last event is zero in each."""

    def __init__(self, pruning, module):
        self.pruning, self.module, self.checked = pruning, module, 0
        module.register_forward_pre_hook(self.check)

    def check(self, module, args):
        state = self.module.state_dict()
        for name, mask in self.pruning.masks.items():
            assert not state[name][~mask].any(), name
            self.checked += 1


# What is asked is what is reached.


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    cells(sorted(SCHEDULES), [1, 3], quick=[("cubic", 3), *((schedule, 1) for schedule in sorted(SCHEDULES))]),
)
def test_every_schedule_reaches_what_is_asked(tmp_path, schedule, epochs):
    module = new()
    fit(tmp_path, module, pruning(0.8, schedule=schedule), max_epochs=epochs)
    assert zeros(module) == 358  # floor(0.8 * 448 + 0.5)
    assert not any((value == 0).any() for name, value in module.named_parameters() if name == "net.6.weight")


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_criterion_and_scope_reaches_what_is_asked(tmp_path, criterion, scope):
    module = new()
    fit(tmp_path, module, pruning(0.5, criterion=criterion, scope=scope))
    assert zeros(module) == 224
    if scope == "layer":
        assert zeros(module, SELECTED[:1]) == 96


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [("row", 0.5), ("column", 0.5), ("4x4", 0.5), ("2:4", 0.5), ("1:4", 0.75), ("2:8@unfold", 0.75)],
)
def test_every_granularity_reaches_what_is_asked(tmp_path, granularity, expected):
    module = new()
    asked = None if ":" in granularity else 0.5
    fit(tmp_path, module, pruning(asked, granularity=granularity))
    assert sparsity(module) == pytest.approx(expected, abs=16 / 448)
    if granularity == "2:4":
        for name in SELECTED:
            assert ((module.state_dict()[name].reshape(-1, 4) != 0).sum(1) == 2).all()
    if granularity == "row":
        rows = [(module.state_dict()[name] == 0).float().mean(1) for name in SELECTED]
        assert all(((row == 0) | (row == 1)).all() for row in rows)


def noting(*needs, into, elementwise=False):
    """A criterion of magnitude that notes, by statistic and shape of the weight, what it received at each event."""

    def criterion(weight, stats):
        for name in needs:
            into.setdefault((name, tuple(weight.shape)), []).append(getattr(stats, name).clone())
        return weight.abs()

    criterion.needs, criterion.elementwise = needs, elementwise
    return criterion


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("module", [Classifier, ConvNet])
def test_a_criterion_gets_each_statistic_by_itself(tmp_path, module, elementwise):
    alone, together = {}, {}
    words = {"start": 2, "end": 10, "every_n_steps": 4}
    fit(tmp_path, new(module), pruning(0.5, criterion=noting("gradient", into=alone), **words))
    fit(tmp_path, new(module), pruning(0.5, criterion=noting("input_norm", into=alone), **words))
    both = noting("gradient", "input_norm", into=together, elementwise=elementwise)
    fit(tmp_path, new(module), pruning(0.5, criterion=both, **words))
    assert alone.keys() == together.keys()
    assert len(alone) == 4
    for key, received in alone.items():
        assert len(received) == len(together[key]) == 2  # at step 2 there is nothing to rank
        assert all(map(torch.equal, received, together[key])), key


@pytest.mark.parametrize("needs", [("gradient", "input_norm"), ("input_norm",), ("gradient",)])
def test_statistics_are_resumed_by_name(tmp_path, needs):
    whole, again = {}, {}
    words = {"start": 2, "end": 14, "every_n_steps": 6}
    cut = pruning(0.5, criterion=noting(*needs, into=whole), **words)
    fit(tmp_path, new(), cut, Files(tmp_path, every_n_steps=12), max_epochs=2)
    assert torch.load(tmp_path / "step12.ckpt", weights_only=True)["callbacks"][cut.state_key]["squares"].keys() == {
        *needs
    }
    cut = pruning(0.5, criterion=noting(*needs, into=again), **words)
    torch.manual_seed(0)
    trainer(tmp_path, cut, max_epochs=2).fit(new(), ResumableLoader(), val_loader(), ckpt_path=tmp_path / "0.ckpt")
    assert whole.keys() == again.keys()
    for key, received in whole.items():
        assert received[-1].shape == again[key][-1].shape


def test_input_norms_follow_channels_that_leave_in_the_same_batch(tmp_path):
    received = {}
    cut = pruning(0.5, criterion=noting("input_norm", "gradient", into=received), start=2, end=10)
    module = new()
    fit(tmp_path, module, ChannelPruning(0.5, start=6, end=6), cut)
    assert ("input_norm", tuple(module.net[4].weight.shape)) in received
    assert module.net[4].weight.shape[1] < 16
    for (_, shape), statistics in received.items():
        assert all(torch.broadcast_shapes(statistic.shape, shape) == shape for statistic in statistics)


@pytest.mark.parametrize(
    ("needs", "error", "message"),
    [("gradient", TypeError, "tuple of names"), (("hessian",), ValueError, "'hessian', which nothing collects; known")],
)
def test_a_criterion_with_an_unknown_statistic_is_rejected(needs, error, message):
    def criterion(weight, stats):
        return weight.abs()

    criterion.needs = needs
    with pytest.raises(error, match=message):
        WeightPruning(0.5, criterion=criterion)


def test_a_partial_criterion_gets_what_its_function_needs(tmp_path):
    module = new()
    fit(tmp_path, module, pruning(0.5, criterion=partial(CRITERIA["taylor"])))
    assert zeros(module) == 224


class Decoder(Classifier):
    """Layers of which some cannot be 2:4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Flatten(),
            nn.Linear(32, 10),
            nn.Linear(10, CLASSES),
        )


def test_layers_that_cannot_be_2_of_4_are_left_out_and_listed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    module = new(Decoder)
    fit(tmp_path, module, WeightPruning(granularity="2:4", every_n_steps=4))
    kernel = module.net[4].weight.flatten(2).movedim(1, 2).reshape(-1, 4)
    assert ((kernel != 0).sum(1) == 2).all()  # of each four input channels at a place of the kernel
    assert sparsity(module, ["net.4.weight", "net.6.weight"]) == 0.5
    assert zeros(module, ["net.1.weight", "net.2.weight", "net.3.weight"]) == 0
    table = next(record.message for record in caplog.records if "how, or why not" in record.message)
    for reason in ("net.1.weight", "3 inputs, no", "1 inputs, no", "ConvTranspose2d, stored"):
        assert reason in table


def test_the_order_of_unfold_has_a_name(tmp_path):
    module = new(ConvNet)
    fit(tmp_path, module, WeightPruning(granularity="2:4@unfold", every_n_steps=4))
    for name in CONVOLUTIONS:
        rows = nn.functional.pad(module.state_dict()[name].flatten(1), (0, 1 if name == "net.1.weight" else 0))
        assert ((rows.reshape(-1, 4) != 0).sum(1) == 2).all()


CONVOLUTIONS = ["net.1.weight", "net.4.weight"]
OF_0_1 = Path(__file__).parent / "files" / "two_of_four_0.1.0.ckpt"
"""ConvNet under SGD, two epochs planned, after one; WeightPruning("2:4", taylor), steps 2 to 12, every 4."""


class Sgd(ConvNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def resumed_from_0_1(tmp_path, pruning):
    """Return the module after the file's run went on, having checked that no zero of the file came back."""
    module = new(Sgd)
    fit(tmp_path, module, pruning, ckpt_path=OF_0_1, max_epochs=2)
    before = torch.load(OF_0_1, weights_only=True)["state_dict"]
    assert zeros(before, CONVOLUTIONS) > 0
    assert all((module.state_dict()[name][before[name] == 0] == 0).all() for name in CONVOLUTIONS)
    return module


def test_a_run_of_0_1_goes_on_with_its_masks_in_its_order(tmp_path):
    cut = WeightPruning(granularity="2:4", criterion="taylor", start=2, end=12, every_n_steps=4)
    with pytest.warns(UserWarning, match=r"written by 0\.1.*goes on as '2:4@unfold'"):
        module = resumed_from_0_1(tmp_path, cut)
    for name in CONVOLUTIONS:
        rows = nn.functional.pad(module.state_dict()[name].flatten(1), (0, 1 if name == "net.1.weight" else 0))
        assert ((rows.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert cut.state_dict()["granularity"] == "2:4@unfold"
    fit(tmp_path, new(Sgd), cut)  # a new run has the order that was asked
    assert cut.state_dict()["granularity"] == "2:4"
    assert cut.masks.keys() == {"net.4.weight"}


def test_a_model_of_0_1_is_held(tmp_path):
    before = torch.load(OF_0_1, weights_only=True)["state_dict"]
    held = resumed_from_0_1(tmp_path, WeightPruning("hold", granularity="2:4"))
    assert zeros(held, CONVOLUTIONS) == zeros(before, CONVOLUTIONS)
    module = new(Sgd)
    module.load_state_dict(before)
    fit(tmp_path, module, WeightPruning("hold", granularity="2:4"))
    assert zeros(module, CONVOLUTIONS) == zeros(before, CONVOLUTIONS)


def test_convolutions_are_pruned(tmp_path):
    module = new(ConvNet)
    fit(tmp_path, module, pruning(0.5, criterion="wanda"))
    assert sparsity(module, ["net.1.weight", "net.4.weight"]) == pytest.approx(0.5, abs=1 / 400)


def test_a_sparsity_by_pattern(tmp_path):
    module = new()
    fit(tmp_path, module, pruning({"net.0": 0.9, "net.*": 0.25}))
    assert sparsity(module, ["net.0.weight"]) == pytest.approx(0.9, abs=1 / 192)
    assert sparsity(module, ["net.4.weight"]) == 0.25
    assert sparsity(module, ["net.1.weight", "net.6.weight"]) == 0.0  # left alone by default


def test_a_sparsity_pattern_that_is_a_layers_name_takes_it_in(tmp_path):
    module = new()
    fit(tmp_path, module, pruning({"net.6": 0.5, "net": 0.25}, scope="layer"))
    assert sparsity(module, ["net.6.weight"]) == 0.5
    assert sparsity(module) == 0.25


def test_what_no_pattern_matches_stays_dense_and_resumes(tmp_path):
    def cut():
        return pruning({"net.0": 0.9}, include=["net.0", "net.4"])

    module, again = new(), new()
    fit(tmp_path, module, cut(), Files(tmp_path / "files"))
    assert zeros(module, ["net.0.weight"]) == 173
    assert zeros(module, ["net.4.weight"]) == 0
    fit(tmp_path, again, cut(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_zero_sparsity_changes_nothing(tmp_path):
    plain, pruned = new(), new()
    fit(tmp_path, plain)
    fit(tmp_path, pruned, pruning(0.0))
    assert_same_state(plain, pruned)


def test_nothing_happens_before_the_window_opens(tmp_path):
    plain, pruned = new(), new()
    fit(tmp_path, plain, max_epochs=2)
    with pytest.warns(UserWarning, match="will not close"):
        fit(tmp_path, pruned, pruning(0.8, start=17, end=30), max_epochs=2)
    assert_same_state(plain, pruned)


def test_start_is_end_is_one_event_and_step_zero_comes_before_the_first_step(tmp_path):
    module = new()
    expected = copy.deepcopy(module)
    cut = pruning(0.5, start=0, end=0)
    watch = StaysZero(cut, module)
    fit(tmp_path, module, cut)
    assert zeros(module) == 224
    assert watch.checked > 24
    kept = torch.cat([cut.masks[name].flatten() for name in SELECTED])
    size = torch.cat([expected.state_dict()[name].abs().flatten() for name in SELECTED])
    assert size[kept].min() >= size[~kept].max()  # ranked on the initial weights


def test_preview_is_what_happens(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cut = WeightPruning(0.8, start=0.1, end=0.7, every_n_steps=5)
    preview = cut.preview(24)
    assert preview[-1] == (17, 0.8)
    fit(tmp_path, new(), cut)
    lines = [record.message for record in caplog.records if "achieved" in record.message]
    assert [int(line.split("step ")[1].split(",")[0]) for line in lines] == [step for step, _ in preview]
    assert [line.split("asked ")[1].split(" ")[0] for line in lines] == [f"{s:.2%}" for _, s in preview]
    with pytest.raises(TypeError, match="one sparsity"):
        WeightPruning("hold").preview(10)


# Zeros stay zero.


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    cells(
        ["adam", "sgd"],
        ["32-true", "bf16-mixed", "bf16-true", "64-true"],
        quick=[("sgd", "32-true"), ("adam", "bf16-mixed"), ("adam", "bf16-true"), ("sgd", "64-true")],
    ),
)
def test_no_forward_pass_sees_a_revived_weight(tmp_path, optimizer, precision):
    module = new(optimizer=optimizer)
    if precision in ("bf16-true", "64-true"):
        cast = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
        original = module.forward
        module.forward = lambda x: original(x.to(cast))
    cut = pruning(0.8, start=2, end=10)
    watch = StaysZero(cut, module)
    fit(tmp_path, module, cut, precision=precision)
    assert watch.checked > 20
    assert zeros(module) == 358


def test_a_removed_weight_that_turned_nan_is_zero(tmp_path):
    class Poisons(Classifier):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 12:
                name, mask = next(iter(self.cut.masks.items()))
                with torch.no_grad():
                    self.state_dict()[name][~mask] = float("nan")

    module = new(Poisons)
    module.__dict__["cut"] = pruning(0.5, start=1, end=8)
    fit(tmp_path, module, module.cut, max_epochs=2)
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())


class Manual(Classifier):
    """Two optimizers stepped by hand, one twice, with a forward pass between."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in (*self.optimizers(), self.optimizers()[0]):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.net[0].parameters(), 0.05, momentum=0.9),
            torch.optim.Adam([*self.net[4].parameters(), *self.net[6].parameters()], 1e-2),
        )


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda"])
def test_manual_optimization_with_several_optimizers(tmp_path, criterion):
    module = new(Manual)
    cut = pruning(0.8, start=2, end=20, criterion=criterion)
    watch = StaysZero(cut, module)
    run = fit(tmp_path, module, cut)
    assert cut.window.step == 24  # batches, while global_step counts every optimizer
    assert run.global_step == 72
    assert watch.checked > 100
    assert zeros(module) == 358


@pytest.mark.parametrize(
    ("kind", "first"),
    cells(["ema", "swa", "average"], [True, False], quick=[("ema", True), ("swa", False), ("average", True)]),
)
def test_the_averaged_model_is_as_sparse(tmp_path, kind, first):
    averaging = {
        "ema": lambda: EMAWeightAveraging(decay=0.9),
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
        "average": lambda: WeightAveraging(),
    }[kind]()
    module = new()
    cut = pruning(0.8, start=2, end=0.8)
    callbacks = [averaging, cut] if first else [cut, averaging]
    fit(tmp_path, module, *callbacks, Files(tmp_path / "files"), max_epochs=5)
    assert zeros(module) == 358
    saved = torch.load(tmp_path / "files" / "4.ckpt", weights_only=True)["state_dict"]
    assert sum(int((saved[name] == 0).sum()) for name in SELECTED) == 358


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    module = new()
    cut = pruning(0.8, start=0.0, end=1.0, every_n_steps=1, criterion="taylor")
    run = fit(tmp_path, module, cut, accumulate_grad_batches=3)
    assert cut.window.step == run.global_step == 9
    assert zeros(module) == 358


class SkipsSteps(pl.plugins.MixedPrecision):
    """Skips every third optimizer step after the closure ran, as a loss scaler does that found inf."""

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.calls = 0

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        self.calls += 1
        if self.calls % 3:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        return super()._wrap_closure(model, optimizer, closure)


def test_skipped_steps_count_as_global_step_counts_them(tmp_path):
    module = new()
    cut = pruning(0.8, start=0.1, end=1.0)
    run = fit(tmp_path, module, cut, plugins=[SkipsSteps()])
    assert cut.window.step == run.global_step == 24
    assert zeros(module) == 358


@pytest.mark.slow
@pytest.mark.parametrize("when", ["module", "part"])
def test_torch_compile(tmp_path, when):
    module = new(Quiet)
    if when == "part":
        module.net = torch.compile(module.net, backend="aot_eager")
        fit(tmp_path, module, pruning(0.8))
        names = [f"net._orig_mod.{n}.weight" for n in (0, 4)]
        assert zeros(module, names) == 358
    else:
        fit(tmp_path, torch.compile(module, backend="aot_eager"), pruning(0.8))
        assert zeros(module) == 358


def test_tied_weights_have_one_mask(tmp_path):
    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.net.insert(5, nn.Linear(16, 16))
            self.net[5].weight = self.net[4].weight

    module = new(Tied)
    cut = pruning(0.8)
    fit(tmp_path, module, cut)
    assert list(cut.masks) == ["net.0.weight", "net.4.weight"]
    assert module.net[5].weight is module.net[4].weight
    assert zeros(module) == 358


def test_two_callbacks_on_different_modules(tmp_path):
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.head, self.net[6] = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)), nn.Identity()

        def forward(self, x):
            return self.head(self.net(x))

    module = new(Two)
    first, second = pruning(0.5, module="net", include=["0", "4"]), pruning(0.75, module="head", include=["0"])
    run = fit(tmp_path, module, first, second, Files(tmp_path / "files"))
    assert zeros(module) == 224
    assert zeros(module, ["head.0.weight"]) == 96
    assert run.callback_metrics["pruning/sparsity/net"] == pytest.approx(0.5)
    assert run.callback_metrics["pruning/sparsity/head"] == pytest.approx(0.75)
    again = new(Two)
    words = ({"module": "net", "include": ["0", "4"]}, {"module": "head", "include": ["0"]})
    fit(tmp_path, again, pruning(0.5, **words[0]), pruning(0.75, **words[1]), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_two_callbacks_on_one_layer_raise(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"net\.0\.weight is selected by two WeightPruning"):
        fit(tmp_path, new(), pruning(0.5), pruning(0.6, include=["net.0"]))


def test_layers_built_in_configure_model(tmp_path):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(3)
                self.net = Classifier().net

    module = new(Late)
    fit(tmp_path, module, pruning(0.8), Files(tmp_path / "files"))
    assert zeros(module) == 358
    again = new(Late)
    fit(tmp_path, again, pruning(0.8), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)
    assert_same_state(module, load_from_checkpoint(Late, tmp_path / "files" / "2.ckpt"))


# Trainers of all kinds.


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"max_steps": 7, "max_epochs": 100},
        {"max_time": "00:01:00:00", "max_epochs": 2},
        {"barebones": True, "max_epochs": 2},
        {"logger": False},
        {"gradient_clip_val": 0.1},
        {"detect_anomaly": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.filterwarnings("ignore:.*barebones.*:UserWarning")
def test_trainer_options(tmp_path, options):
    module = new()
    fit(tmp_path, module, pruning(0.8), **options)
    assert zeros(module) == 358


@pytest.mark.parametrize("start", [500, 0.1])
def test_fast_dev_run_reaches_the_target_of_any_window(tmp_path, start):
    module = new()
    fit(tmp_path, module, pruning(0.8, start=start, end=1000 if start == 500 else 0.7), fast_dev_run=1)
    assert zeros(module) == 358


@pytest.mark.parametrize(
    "options", [{"max_epochs": 2}, {"max_epochs": -1, "max_time": "00:00:00:20"}, {"max_epochs": -1}]
)
def test_a_run_of_unknown_length_asks_for_ints(tmp_path, options):
    run = trainer(tmp_path, pruning(0.8), **options)
    with pytest.raises(MisconfigurationException, match=r"Give `start` as an int, in steps"):
        run.fit(new(), DataLoader(Stream(), 8), val_loader())


def test_an_iterable_dataset_with_ints(tmp_path):
    module = new()
    trainer(tmp_path, pruning(0.8, start=2, end=9), max_epochs=2).fit(module, DataLoader(Stream(), 8), val_loader())
    assert zeros(module) == 358


def test_an_early_stop_says_what_was_reached(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = new()
    fit(tmp_path, module, pruning(0.8, start=0.1, end=0.9), Stops())
    line = next(record.message for record in caplog.records if "before the window's end" in record.message)
    assert "ended at step 8" in line
    assert f"{sparsity(module):.2%}" in line
    assert 0 < sparsity(module) < 0.8


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt.*")
def test_a_keyboard_interrupt_leaves_a_loadable_file(tmp_path):
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 13:
                raise KeyboardInterrupt

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    module = new()
    cut = pruning(0.8, start=2, end=20)
    with pytest.raises(SystemExit):
        fit(tmp_path, module, cut, Interrupts())
    assert not cut._handles
    assert_same_state(module, load_from_checkpoint(Classifier, tmp_path / "interrupted.ckpt"))
    assert zeros(module) > 0


def test_the_learning_rate_finder_leaves_the_window_alone(tmp_path):
    module = new()
    module.learning_rate = 1e-2
    cut = pruning(0.8)
    run = trainer(tmp_path, cut)
    Tuner(run).lr_find(module, train_loader(), val_loader(), num_training=5)
    assert zeros(module) == 0
    run.fit(module, train_loader(), val_loader())
    assert cut.window.step == 24
    assert zeros(module) == 358


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_callback(tmp_path, first):
    module = new()
    module.learning_rate = 1e-2
    finder, cut = LearningRateFinder(num_training_steps=5), pruning(0.8)
    fit(tmp_path, module, *((finder, cut) if first else (cut, finder)))
    assert zeros(module) == 358


def test_metrics_reach_callbacks_and_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, "log")
    run = fit(tmp_path, new(), pruning(0.8), logger=logger, log_every_n_steps=50)
    assert run.callback_metrics["pruning/sparsity"] == pytest.approx(358 / 448)
    assert run.callback_metrics["pruning/asked"] == pytest.approx(0.8)
    header, *rows = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("pruning/sparsity")
    values = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert len(values) == len(pruning(0.8).preview(24))
    assert values[-1] == pytest.approx(358 / 448)


def test_the_table_says_what_is_left_out_and_why(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(tmp_path, new(), pruning(0.8), max_epochs=1)
    table = next(record.message for record in caplog.records if "why not" in record.message)
    for words in ("net.0.weight", "80.00%", "last layer", "BatchNorm1d weight"):
        assert words in table


def test_a_plain_monitor_beside_it_gets_one_warning(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max")
    stop = EarlyStopping(monitor="val_loss")
    with pytest.warns(UserWarning, match=r"prefers the epochs before") as warned:
        fit(tmp_path, new(), pruning(0.8, include=["net.0"]), pruning(0.8, include=["net.4"]), best, stop)
    ours = [str(w.message) for w in warned if "prefers" in str(w.message)]
    assert len(ours) == 1
    assert "ModelCheckpoint(monitor='val_acc')" in ours[0]
    assert "EarlyStopping(monitor='val_loss')" in ours[0]


# A second fit.


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    module, cut = new(), pruning(0.8, start=4, end=16)
    with pytest.warns(UserWarning, match="step 16, but the run is planned to take 8 steps"):
        run = fit(tmp_path, module, cut, max_epochs=1)
    reached = zeros(module)
    assert 0 < reached < 358
    run.fit_loop.max_epochs = 3
    run.fit(module, train_loader(), val_loader())
    assert cut.window.step == 24
    assert zeros(module) == 358


@pytest.mark.parametrize("same_callback", [True, False])
def test_a_fit_by_a_new_trainer_keeps_the_zeros_and_opens_a_new_window(tmp_path, same_callback):
    module, cut = new(), pruning(0.5)
    fit(tmp_path, module, cut)
    gone = {name: ~mask for name, mask in cut.masks.items()}
    further = cut if same_callback else pruning(0.8)
    further.sparsity = 0.8
    watch = StaysZero(further, module)
    fit(tmp_path, module, further)
    assert further.window.step == 24
    assert watch.checked >= 2 * 24  # from the first step on
    assert zeros(module) == 358
    for name, removed in gone.items():
        assert not module.state_dict()[name][removed].any()


def test_a_second_fit_with_a_new_model(tmp_path):
    cut = pruning(0.8)
    run = fit(tmp_path, new(), cut)
    other = new(width=24)
    run.fit_loop.max_epochs = 6
    run.fit(other, train_loader(), val_loader())
    assert sparsity(other) == pytest.approx(0.8, abs=1 / 800)


def test_a_target_below_what_is_reached_raises(tmp_path):
    module = new()
    fit(tmp_path, module, pruning(0.8))
    with pytest.raises(MisconfigurationException, match=r"already has 79\.91% zeros .* more than the 50\.00% asked"):
        fit(tmp_path, module, pruning(0.5))


def test_hold_keeps_the_zeros_and_prunes_nothing(tmp_path):
    module = new()
    fit(tmp_path, module, pruning(0.8), Files(tmp_path / "files"))
    loaded = Classifier.load_from_checkpoint(tmp_path / "files" / "2.ckpt")
    before = {name: loaded.state_dict()[name] == 0 for name in SELECTED}
    hold = WeightPruning("hold")
    assert hold.reached_end
    watch = StaysZero(hold, loaded)
    run = trainer(tmp_path, hold, max_epochs=1)
    run.fit(loaded, DataLoader(Stream(), 8), val_loader())  # no window, so no length is needed
    assert watch.checked
    for name in SELECTED:
        assert torch.equal(loaded.state_dict()[name] == 0, before[name])
    with pytest.raises(MisconfigurationException, match="keeps the zeros a module has"):
        fit(tmp_path, new(), WeightPruning("hold"))


def test_a_layer_initialised_to_zero_is_not_taken_for_pruned(tmp_path):
    module = new()
    nn.init.zeros_(module.net[4].weight)
    fit(tmp_path, module, pruning(0.5, start=20, end=22))
    assert (module.net[4].weight != 0).any()


# Resume, reload.


def resumable(criterion):
    return pruning(0.8, start=2, end=0.8, criterion=criterion)


@pytest.mark.parametrize(
    ("criterion", "precision", "dropout"),
    cells(
        sorted(CRITERIA),
        ["32-true", "bf16-mixed"],
        [0.0, 0.3],
        quick=[("random", "32-true", 0.3), ("taylor", "bf16-mixed", 0.3), ("wanda", "bf16-mixed", 0.3)],
    ),
)
def test_resumed_at_every_epoch_equals_uninterrupted(tmp_path, criterion, precision, dropout):
    options = {"precision": precision, "max_epochs": 4}
    plain, module, files = new(dropout=dropout), new(dropout=dropout), tmp_path / "files"
    fit(tmp_path, plain, SeededByStep(), Files(tmp_path / "plain"), **options)
    again = new(dropout=dropout)
    fit(tmp_path, again, SeededByStep(), ckpt_path=tmp_path / "plain" / "1.ckpt", **options)
    assert_same_state(plain, again)  # Lightning itself resumes this run
    cut = resumable(criterion)
    fit(tmp_path, module, cut, SeededByStep(), Files(files), **options)
    for epoch in range(3):
        again, other = new(dropout=dropout), resumable(criterion)
        fit(tmp_path, again, other, SeededByStep(), ckpt_path=files / f"{epoch}.ckpt", **options)
        assert_same_state(module, again)
        assert_same_state(cut.masks, other.masks)


@pytest.mark.parametrize("kind", ["manual", "accumulate", "ema"])
def test_other_runs_resume_bitwise_too(tmp_path, kind):
    cls = Manual if kind == "manual" else Classifier
    options = {"accumulate_grad_batches": 3} if kind == "accumulate" else {}

    def callbacks():
        return [resumable("taylor"), *([EMAWeightAveraging(decay=0.9)] if kind == "ema" else [])]

    module = new(cls)
    fit(tmp_path, module, *callbacks(), Files(tmp_path / "files"), **options)
    for epoch in range(2):
        again = new(cls)
        fit(tmp_path, again, *callbacks(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt", **options)
        assert_same_state(module, again)


@pytest.mark.parametrize(
    ("criterion", "first"), cells(["magnitude", "taylor", "wanda"], [True, False], quick=[("wanda", False)])
)
def test_resumed_at_every_step_equals_uninterrupted(tmp_path, criterion, first):
    def run(module, cut, folder, ckpt_path=None):
        class Saves(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if ckpt_path is None:
                    trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

        callbacks = [Saves(), cut] if first else [cut, Saves()]
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, ResumableLoader(), val_loader(), ckpt_path=ckpt_path)

    module, files = new(), tmp_path / "files"
    run(module, pruning(0.8, start=2, end=12, every_n_steps=3, criterion=criterion), files)
    for step in (1, 2, 4, 5, 7, 10, 12, 14):
        again = new()
        cut = pruning(0.8, start=2, end=12, every_n_steps=3, criterion=criterion)
        run(again, cut, files, files / f"{step}.ckpt")
        assert_same_state(module, again)


def test_a_resumed_run_keeps_its_window_when_max_epochs_was_raised(tmp_path):
    cut = pruning(0.8)
    fit(tmp_path, new(), cut, Files(tmp_path / "files"), max_epochs=3)
    other = pruning(0.8)
    fit(tmp_path, new(), other, ckpt_path=tmp_path / "files" / "1.ckpt", max_epochs=9)
    assert (other.window.start_step, other.window.end_step) == (cut.window.start_step, cut.window.end_step)


def test_a_checkpoint_made_without_the_callback_opens_a_window_on_the_rest_of_the_run(tmp_path):
    fit(tmp_path, new(), Files(tmp_path / "files"), max_epochs=4)
    module, cut = new(), pruning(0.8)
    fit(tmp_path, module, cut, ckpt_path=tmp_path / "files" / "1.ckpt", max_epochs=4)
    assert cut.window.end_step == 11  # 0.7 of the 16 steps that were left
    assert zeros(module) == 358


def test_files_load_everywhere(tmp_path):
    module = new()
    run = fit(tmp_path, module, pruning(0.8), Files(tmp_path / "files"))
    run.save_checkpoint(tmp_path / "files" / "weights.ckpt", weights_only=True)
    expected = run.test(module, val_loader(), verbose=False)
    for name in ("2", "weights"):
        path = tmp_path / "files" / f"{name}.ckpt"
        torch.load(path, weights_only=True)
        assert_same_state(module, Classifier.load_from_checkpoint(path))
        assert_same_state(module, load_from_checkpoint(Classifier, path))
        assert trainer(tmp_path, pruning(0.8)).test(new(), val_loader(), path, verbose=False) == expected
    with pytest.warns(UserWarning, match="need to be provided"):  # Lightning's own
        assert trainer(tmp_path).test(new(), val_loader(), tmp_path / "files" / "2.ckpt", verbose=False) == expected


def test_masks_survive_a_test_run_between_two_saves(tmp_path):
    module = new()
    fit(tmp_path, module, pruning(0.8), Files(tmp_path / "files"))
    cut = pruning(0.8)
    run = trainer(tmp_path, cut)
    run.test(new(), val_loader(), tmp_path / "files" / "2.ckpt", verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    first, second = (torch.load(p, weights_only=True) for p in (tmp_path / "files" / "2.ckpt", tmp_path / "again.ckpt"))
    key = cut.state_key
    assert first["callbacks"][key]["masks"].keys() == second["callbacks"][key]["masks"].keys() == set(SELECTED)


def test_masks_cost_one_bit_per_weight_in_the_file(tmp_path):
    module, cut = new(width=256), pruning(0.8)
    fit(tmp_path, module, cut, Files(tmp_path / "files"), max_epochs=1)
    state = torch.load(tmp_path / "files" / "0.ckpt", weights_only=True)["callbacks"][cut.state_key]
    assert sum(mask.numel() * mask.element_size() for mask in state["masks"].values()) == (256 * 12 + 256 * 256) / 8


def test_masks_that_do_not_fit_raise(tmp_path):
    fit(tmp_path, new(), pruning(0.8), Files(tmp_path / "files"))
    file = torch.load(tmp_path / "files" / "1.ckpt", weights_only=True)
    state = file["callbacks"][pruning(0.8).state_key]
    state["shapes"]["net.0.weight"] = (16, 13)
    torch.save(file, tmp_path / "bad.ckpt")
    with pytest.raises(MisconfigurationException, match=r"masks do not fit the module: net\.0\.weight is \(16, 13\)"):
        fit(tmp_path, new(), pruning(0.8), ckpt_path=tmp_path / "bad.ckpt")


def test_another_selection_on_resume_prints_both_keys(tmp_path):
    fit(tmp_path, new(), pruning(0.8), Files(tmp_path / "files"))
    with pytest.raises(MisconfigurationException, match=r"'include': None.*'include': \['net\.0'\]"):
        fit(tmp_path, new(), pruning(0.8, include=["net.0"]), ckpt_path=tmp_path / "files" / "1.ckpt")


def test_the_callback_pickles_and_copies(tmp_path):
    module, cut = new(), pruning(0.8)
    fit(tmp_path, module, cut)
    for other in (pickle.loads(pickle.dumps(cut)), copy.deepcopy(cut)):
        assert_same_state(other.masks, cut.masks)
        assert other.state_dict()["window"] == cut.state_dict()["window"]


def test_the_callback_draws_nothing_from_the_global_rng(tmp_path):
    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.states = [*getattr(self, "states", []), torch.get_rng_state()]

    with_random, without = Notes(), Notes()
    fit(tmp_path, new(dropout=0.5), pruning(0.8, criterion="random"), with_random)
    fit(tmp_path, new(dropout=0.5), without)
    assert all(torch.equal(a, b) for a, b in zip(with_random.states, without.states, strict=True))


# Criteria that look at training.


def test_wanda_takes_the_norm_of_the_inputs_it_saw(tmp_path):
    layer = nn.Linear(3, 2)
    x = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 1.0]])
    assert squared_inputs(layer, x).tolist() == [[25.0, 4.0, 2.0]]
    assert squared_inputs(layer, x[None]).tolist() == [[25.0, 4.0, 2.0]]
    conv = nn.Conv2d(4, 4, 1, groups=2)
    images = torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 1, 1)
    assert squared_inputs(conv, images).squeeze().tolist() == [[0, 2], [0, 2], [8, 18], [8, 18]]
    assert squared_inputs(conv, images[0]).squeeze().tolist() == [[0, 1], [0, 1], [4, 9], [4, 9]]
    module, cut = new(), pruning(0.5, criterion="wanda")
    fit(tmp_path, module, cut)
    assert not cut._statistics.watching
    assert not module.net[0]._forward_pre_hooks


def test_wanda_refuses_layers_whose_inputs_it_cannot_read(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"net\.1\.weight belongs to a BatchNorm1d"):
        fit(tmp_path, new(), pruning(0.5, criterion="wanda", include=["net"]))


def test_a_criterion_without_its_statistic_names_the_layer(tmp_path):
    class Unused(Classifier):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)

    with pytest.raises(MisconfigurationException, match=r"needs the gradient of unused\.weight"):
        fit(tmp_path, new(Unused), pruning(0.5, criterion="taylor"))


def test_any_callable_is_a_criterion_and_a_schedule(tmp_path):
    module = new()
    cut = pruning(0.5, criterion=lambda weight, stats: -weight.abs(), schedule=lambda u, a, b: a + (b - a) * u)
    fit(tmp_path, module, cut)
    assert zeros(module) == 224
    removed_once = [~mask for mask in cut.masks.values()]
    assert sum(int(mask.sum()) for mask in removed_once) == 224


def test_a_failed_event_leaves_the_model_as_it_was(tmp_path):
    class Diverges(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    self.net[4].weight[0, 0] = float("nan")

    module, cut = new(Diverges), pruning(0.5, start=1, end=8, every_n_steps=4)
    with pytest.raises(ValueError, match=r"net\.4\.weight.*NaN"):
        fit(tmp_path, module, cut, max_epochs=1)
    assert zeros(module, ["net.0.weight"]) == int((~cut.masks["net.0.weight"]).sum())


# Bad input.


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"sparsity": 80}, ValueError, r"fraction in \[0, 1\), got 80. For 80 % zeros pass 0.8"),
        ({"sparsity": -0.1}, ValueError, r"fraction in \[0, 1\), got -0.1"),
        ({"sparsity": 1.0}, ValueError, r"fraction in \[0, 1\), got 1.0"),
        ({"sparsity": "0.8"}, TypeError, "fraction"),
        ({"sparsity": True}, TypeError, "fraction"),
        ({"sparsity": {}}, ValueError, "empty"),
        ({"sparsity": {"a": 2}}, ValueError, "fraction"),
        ({"sparsity": {3: 0.5}}, TypeError, "names, glob patterns"),
        ({"granularity": 124}, TypeError, "must be quoted"),
        ({"granularity": "2:5:1"}, ValueError, "2:5:1"),
        ({"granularity": "4:2"}, ValueError, "4:2"),
        ({"granularity": "2:4", "sparsity": 0.8}, ValueError, "ends at the sparsity 1 - n/m = 0.5"),
        ({"criterion": "l3"}, ValueError, "unknown criterion 'l3'; known: lamp, magnitude, random, taylor, wanda"),
        ({"schedule": "square"}, ValueError, "unknown schedule 'square'; known: cosine"),
        ({"scope": "local"}, ValueError, "'global' or 'layer'"),
        ({"start": 0.7, "end": 0.1}, ValueError, "must not be after"),
        ({"include": "net"}, TypeError, "Put it in a list"),
        ({"include": [3]}, TypeError, "glob patterns, .*, layer classes or functions"),
    ],
)
def test_bad_arguments_raise_at_once(words, error, message):
    with pytest.raises(error, match=message):
        WeightPruning(**words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"include": ["decoder"]}, ValueError, "include: 'decoder' matches no layer"),
        ({"module": "decoder"}, ValueError, "there is no 'decoder'"),
        ({"module": "net.6"}, MisconfigurationException, r"selects no layer: left out are net\.6\.weight \(last"),
        ({"sparsity": {"decoder": 0.5}}, MisconfigurationException, "selects no layer"),
        ({"sparsity": {"net": 0.5, "decoder": 0.5}}, MisconfigurationException, "'decoder' matches no selected layer"),
        ({"granularity": "4x4", "include": ["*.bias"]}, MisconfigurationException, "a vector, which has no 4x4"),
        ({"sparsity": {"net": 0.5, "net.0": 0.6}}, MisconfigurationException, r"'net\.0' matches no selected layer"),
    ],
)
def test_a_selection_that_fails_raises_before_the_first_step_and_changes_nothing(tmp_path, words, error, message):
    module = new()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        fit(tmp_path, module, pruning(**words))
    assert_same_state(module, before)
    assert "on_load_checkpoint" not in module.__dict__


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda net: [net.__setitem__(i, nn.utils.parametrizations.weight_norm(net[i])) for i in (0, 4)],
            r"selects no layer: .*net\.0\.weight \(computed by a parametrization",
        ),
        (lambda net: net.__setitem__(4, nn.LazyLinear(16)), "lazy"),
        (lambda net: setattr(net[4], "weight", nn.Parameter(net[4].weight.detach().to_sparse_csr())), "sparse"),
        (
            lambda net: setattr(net[4], "weight", nn.Parameter(torch.ones(16, 16, dtype=torch.int8), False)),
            "of type torch.int8",
        ),
        (lambda net: [nn.init.zeros_(net[i].weight) for i in (0, 4)], "all 448 weights .* are zero"),
    ],
    ids=["parametrized", "lazy", "sparse", "integer", "all zero"],
)
@pytest.mark.filterwarnings("ignore:.*Sparse CSR.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*UninitializedParameter.*:UserWarning")
def test_weights_that_cannot_be_pruned_are_named(tmp_path, spoil, message):
    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.1)

    module = new(Plain)
    spoil(module.net)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(tmp_path, module, pruning(0.5))


def test_weights_that_no_optimizer_holds_raise(tmp_path):
    class Frozen(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[6].parameters(), 0.1)

    with pytest.raises(MisconfigurationException, match="no optimizer of the Trainer holds"):
        fit(tmp_path, new(Frozen), pruning(0.5))


def test_an_unsupported_strategy_is_refused(tmp_path):
    run = trainer(tmp_path, pruning(0.5))

    class FSDPStrategy(type(run.strategy).__mro__[1]):
        pass

    FSDPStrategy.__abstractmethods__ = frozenset()
    run.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match=r"not supported under FSDPStrategy.*strategy='optim_fsdp'"):
        pruning(0.5).setup(run, new(), "fit")


def test_pytorch_lightning_imports_work(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Classifier().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Other()
    run = other.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        callbacks=[pruning(0.8)],
    )
    run.fit(module, train_loader())
    assert zeros(module) == 358
    run.save_checkpoint(tmp_path / "other.ckpt")
    assert_same_state(module, load_from_checkpoint(Other, tmp_path / "other.ckpt"))


# What a review found.


def test_a_fit_that_failed_to_start_does_not_go_on_in_the_next(tmp_path):
    sparse = new()
    fit(tmp_path, sparse, pruning(0.8))
    module, hold = new(), WeightPruning("hold")
    run = trainer(tmp_path, hold)
    with pytest.raises(MisconfigurationException, match="Load the sparse weights first"):
        run.fit(module, train_loader(), val_loader())
    module.load_state_dict(sparse.state_dict())
    run.fit(module, train_loader(), val_loader())
    assert zeros(module) == 358


@pytest.mark.parametrize(
    "words", [{"granularity": "row", "include": ["net.0"]}, {"granularity": "4x4"}, {"scope": "layer"}]
)
@pytest.mark.parametrize("asked", [0.8, 0.47])
def test_the_same_callback_fits_twice_though_units_overshoot(tmp_path, words, asked):
    module = new(width=4) if words.get("scope") else new()
    for _ in range(2):
        fit(tmp_path, module, pruning(asked, start=1, end=4, **words), max_epochs=1)


def test_hold_keeps_a_layer_that_is_zero_as_a_whole(tmp_path):
    module = new()
    nn.init.zeros_(module.net[4].weight)
    fit(tmp_path, module, WeightPruning("hold"))
    assert zeros(module, ["net.4.weight"]) == 256


def test_two_instances_on_one_module_log_apart(tmp_path):
    first, second = pruning(0.5, module="net", include=["0"]), pruning(0.9, module="net", include=["4"])
    logged = fit(tmp_path, new(), first, second).callback_metrics
    values = sorted(float(v) for k, v in logged.items() if k.startswith("pruning/sparsity/net."))
    assert values == pytest.approx([0.5, 230 / 256])


def test_wanda_refuses_a_compiled_module(tmp_path):
    module = new()
    module.net = torch.compile(module.net, backend="aot_eager")
    with pytest.raises(MisconfigurationException, match=r"torch\.compile compiled"):
        fit(tmp_path, module, pruning(0.5, criterion="wanda"))


def test_fast_dev_run_under_manual_optimization(tmp_path):
    module = new(Manual)
    fit(tmp_path, module, pruning(0.8), fast_dev_run=2)
    assert zeros(module) == 358


def test_a_transposed_convolution_has_no_rows(tmp_path):
    class Transposed(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Unflatten(1, (12, 1)), nn.ConvTranspose1d(12, 8, 1), nn.Flatten(), nn.Linear(8, 3)
            )

    with pytest.raises(MisconfigurationException, match=r"no layer: left out are net\.1\.weight \(ConvTranspose1d, st"):
        fit(tmp_path, new(Transposed), pruning(0.5, granularity="row"))
    fit(tmp_path, new(Transposed), pruning(0.5))


def test_weights_only_files_name_the_masks_too(tmp_path):
    save = ModelCheckpoint(tmp_path, "in", save_weights_only=True)
    cut = pruning(0.8)
    fit(tmp_path, new(), cut, save)
    (entry,) = torch.load(tmp_path / "in.ckpt", weights_only=True)["lightning_optim"]["entries"].values()
    assert entry["masks"] == {"net.0.weight": (16, 12), "net.4.weight": (16, 16)}
