"""QuantizationAwareTraining(observer="learned"): trained steps in a run, its files and its exports."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from helpers.models import (
    Classifier,
    ConvNet,
    Files,
    Quiet,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import (
    ChannelPruning,
    LowRankFactorization,
    QuantizationAwareTraining,
    export_onnx,
    load_from_checkpoint,
    quantize_post_training,
)
from lightning_optim.export.integer import convert
from lightning_optim.functional.learned_step import first_step
from lightning_optim.measure.size import SIZES
from lightning_optim.quantization.learned import STEPS, weight_step


def learned(**words):
    return QuantizationAwareTraining(
        **{"observer": "learned", "start": 6, "observe_steps": 3, "freeze": 20, "weight_bits": 4, **words}
    )


def steps(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if name.rpartition(".")[2] in STEPS}


class Notes(pl.Callback):
    """The steps after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(steps(pl_module))


class Weights(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.weight = pl_module.net[0]._parameters["weight"].detach().clone()


class Grouped(Quiet):
    """Weights in one group and the rest in another, which has no decay, with a scheduler that holds a rate of each."""

    def configure_optimizers(self):
        parts = [[p for p in self.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
        groups = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0, "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, 1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=24)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class OnlyNamed(Quiet):
    """It names its parameters, and so leaves the steps out."""

    def configure_optimizers(self):
        named = [p for name, p in self.named_parameters() if name.endswith((".weight", ".bias"))]
        optimizer = torch.optim.AdamW(named, 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Late(Grouped):
    """Its layers are built after the callbacks' setup."""

    def __init__(self):
        super().__init__()
        self.layers, self.net = self.net, None

    def configure_model(self):
        if self.net is None:
            self.net = self.layers


# The phases.


def test_steps_begin_where_the_weights_are_and_are_trained_while_they_are_rounded(tmp_path):
    module, notes, weights = new(), Notes(), Weights(at=9)
    fit(tmp_path, module, learned(), notes, weights)
    assert all(not p.any() for seen in notes.seen[:9] for p in seen.values())  # off to step 6, observing to 9
    layer = module.net[0]
    assert torch.equal(layer.weight_first_step, first_step(weights.weight, 4))
    moved = [name for name, step in notes.seen[18].items() if not torch.equal(step, notes.seen[10][name])]
    assert {name.rpartition(".")[2] for name in moved} == set(STEPS)
    for name, step in notes.seen[-1].items():  # from step 20 on ranges are frozen, and weights are not
        assert torch.equal(step, notes.seen[19][name]) == (not name.endswith("weight_log_step")), name
    assert int(layer.input_batches) == 3  # a range that is trained is observed no longer
    assert (weight_step(layer) > 0).all()
    assert SIZES["bits"](module) == pytest.approx(
        SIZES["bits"](new()) - sum(module.net[i].weight.numel() for i in (0, 4, 6)) * 28 / 32
    )


def test_until_rounding_begins_the_run_is_the_float_run(tmp_path):
    plain, module = new(Grouped), new(Grouped)
    states = []
    for each, ours in ((plain, []), (module, [learned(start=8)])):
        fit(tmp_path, each, *ours, Files(tmp_path / "files"))
        states.append(torch.load(tmp_path / "files" / "0.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_step_per_tensor_and_weights_alone(tmp_path):
    module = new()
    fit(tmp_path, module, learned(weight_granularity="per_tensor"))
    assert module.net[0].weight_log_step.shape == (1,)
    module = new()
    fit(tmp_path, module, learned(activation_bits=None, observe_steps=None))
    assert {name.rpartition(".")[2] for name in steps(module)} == {"weight_log_step"}
    assert all(step.any() for step in steps(module).values())


# Files.


BEFORE, AT, AFTER = {"start": 16}, {"start": 13}, {}
"""Where rounding begins, from the file of step 16 on; in AFTER it has begun."""


@pytest.mark.parametrize(
    ("cls", "window"),
    [
        *((Grouped, window) for window in (BEFORE, {"start": 14}, AT, AFTER)),
        (OnlyNamed, AFTER),
        (Late, AFTER),
        *(pytest.param(cls, BEFORE, marks=pytest.mark.slow) for cls in (OnlyNamed, Late)),
        *(pytest.param(cls, {"freeze": 12}, marks=pytest.mark.slow) for cls in (Grouped, OnlyNamed, Late)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, cls, window):
    straight, resumed = new(cls), new(cls)
    fit(tmp_path, straight, learned(**window), Files(tmp_path / "files"))
    fit(tmp_path, resumed, learned(**window), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(straight, resumed)
    assert all(step.any() for name, step in steps(resumed).items() if not name.endswith("offset"))


@pytest.mark.parametrize("cls", [Classifier, pytest.param(ConvNet, marks=pytest.mark.slow)])
def test_files_load_and_the_exported_one_gives_the_same_answers(tmp_path, cls):
    module = new(cls)
    run = fit(tmp_path, module, learned(weight_bits=3, activation_bits=4))
    run.save_checkpoint(tmp_path / "kept.ckpt")
    loaded = load_from_checkpoint(cls, tmp_path / "kept.ckpt")
    assert_same_state(module, loaded)
    x = train_loader(64).dataset.tensors[0][:64]
    module.eval()
    export_onnx(module, tmp_path / "model.onnx", x)
    import onnxruntime

    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = module(x)
    differs = (torch.from_numpy(answer) - expected).abs().amax(1) > 1e-4
    assert int(differs.sum()) <= 6  # numbers on the edge between two of 16 are as likely with other observers
    layer = next(layer for layer in loaded.modules() if hasattr(layer, "weight_log_step"))
    expected = layer.quantized_weight().detach()
    assert len(torch.unique(expected[0])) <= 7
    scale, zero_point = layer.range_of("input")
    convert(module, {})
    stored = module.get_submodule(next(n for n, each in loaded.named_modules() if each is layer))
    assert torch.equal(stored.stored.matrix().view_as(expected), expected)
    assert torch.equal(stored.reads.scale, scale)
    assert torch.equal(stored.reads.zero_point.int(), zero_point)


def test_the_average_of_steps_rounds_the_average_of_weights(tmp_path):
    module, average = new(Quiet), EMAWeightAveraging(decay=0.5)
    fit(tmp_path, module, learned(), average, Files(tmp_path / "files"))
    assert all(step.any() for name, step in steps(module).items() if not name.endswith("offset"))
    resumed = new(Quiet)
    fit(tmp_path, resumed, learned(), EMAWeightAveraging(decay=0.5), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, resumed)
    assert isinstance(average._average_model, AveragedModel)
    assert_same_state(average._average_model.module, module)


def test_a_second_fit_goes_on_from_the_steps_of_the_first(tmp_path):
    module = new(Quiet)
    run = fit(tmp_path, module, learned())
    before, first = steps(module), module.net[0].weight_first_step.clone()
    run.fit_loop.max_epochs = 4
    run.fit(module, train_loader(), val_loader())
    assert torch.equal(module.net[0].weight_first_step, first)
    assert any(not torch.equal(before[name], step) for name, step in steps(module).items())
    again, notes = steps(module), Notes()
    fit(tmp_path, module, learned(start=2, freeze=20), notes)  # another Trainer: it is rounded from the first step on
    assert torch.equal(module.net[0].weight_first_step, first)
    assert not torch.equal(notes.seen[0]["net.0.weight_log_step"], again["net.0.weight_log_step"])


def test_another_observer_removes_the_steps(tmp_path):
    module = new()
    fit(tmp_path, module, learned())
    fit(tmp_path, module, learned(observer="min_max"))
    assert not steps(module)
    assert "weight_first_step" not in module.net[0]._buffers


# Optimizers, and other techniques.


def test_steps_that_were_left_out_join_the_group_of_their_weight(tmp_path):
    module = new(OnlyNamed)
    run = fit(tmp_path, module, learned())
    (group,) = run.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert all(step.any() for name, step in steps(module).items() if not name.endswith("offset"))


def test_steps_of_weights_that_are_not_trained_stay(tmp_path):
    module = new()
    module.net[0].requires_grad_(False)
    fit(tmp_path, module, learned())
    kept = {name: bool(step.any()) for name, step in steps(module).items() if name.endswith("log_step")}
    assert {name for name, moved in kept.items() if not moved} == {"net.0.weight_log_step", "net.0.input_log_step"}


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, 1e-3)


class Filtered(Quiet):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # it compares their values
def test_steps_of_weights_that_are_unfrozen_later_are_trained_from_then_on(tmp_path):
    module = new(Filtered)
    run = fit(tmp_path, module, learned(freeze=23), Unfreezes())
    assert all(step.any() for name, step in steps(module).items() if not name.endswith("offset"))
    assert len(run.optimizers[0].param_groups) == 2


@pytest.mark.parametrize(
    "before",
    [
        lambda: ChannelPruning(0.5, start=1, end=4, events=2, scope="layer"),
        lambda: LowRankFactorization(rank=4, end=4, start=1),
    ],
    ids=["channels", "low_rank"],
)
def test_it_follows_what_other_techniques_do_before(tmp_path, before):
    module = new()
    fit(tmp_path, module, before(), learned(), Files(tmp_path / "files"))
    for layer in (layer for layer in module.modules() if hasattr(layer, "weight_log_step")):
        assert layer.weight_log_step.shape == layer.weight_first_step.shape == layer.weight.shape[:1]
        assert layer.weight_log_step.any()
    resumed = new()
    fit(tmp_path, resumed, before(), learned(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, resumed)


def test_a_shared_weight_keeps_the_scales_that_it_gives(tmp_path):
    class Tied(Quiet):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(16, 16)
            self.net.insert(5, nn.Linear(16, 16))
            self.net[5].weight = self.net[4].weight

    module = new(Tied)
    fit(tmp_path, module, learned())
    assert "weight_log_step" not in module.net[4]._parameters
    assert module.net[4].input_log_step.any()
    assert module.net[5].input_log_step.any()


# What is refused.


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match=r"a step per channel or per tensor.*'per_group:32'"):
        learned(weight_granularity="per_group:32")
    with pytest.raises(ValueError, match="observes nothing, got observer='learned'"):
        learned(activation_ranges="dynamic", observe_steps=None)
    with pytest.raises(ValueError, match="post-training quantization trains nothing"):
        quantize_post_training(nn.Linear(2, 2), [torch.randn(4, 2)], observer="learned")


def test_an_optimizer_that_cannot_take_steps_is_refused(tmp_path):
    class Keeps(torch.optim.SGD):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr)
            self.kept = [p for group in self.param_groups for p in group["params"]]

    class Odd(Quiet):
        def configure_optimizers(self):
            return Keeps([self.net[i].weight for i in (0, 4, 6)], 1e-2)

    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="cannot train steps"):
        trainer(tmp_path, learned()).fit(new(Odd), train_loader(), val_loader())
