"""LowRankFactorization in a Trainer, beside what test_promises.py asks of every technique."""

import json
import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from helpers.models import (
    Classifier,
    Files,
    SeededByStep,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from helpers.techniques import low_rank
from lightning_optim import (
    ChannelPruning,
    LowRankFactorization,
    QuantizationAwareTraining,
    Recipe,
    ReportCallback,
    WeightPruning,
    export_onnx,
    load_from_checkpoint,
)
from lightning_optim.low_rank import LowRank
from lightning_optim.quantization.prepare import quantized_layers


def messages(caplog):
    return [record.message for record in caplog.records]


def test_it_says_what_became_of_each_layer_and_that_optimizer_state_starts_anew(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    module, callback = new(), low_rank()
    states = {}

    class Looks(SeededByStep):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            optimizer = trainer.optimizers[0]
            names = {p: name for name, p in pl_module.named_parameters()}
            states[trainer.global_step] = {names[p]: int(s["step"]) for p, s in optimizer.state.items() if p in names}
            held = [p for group in optimizer.param_groups for p in group["params"]]
            assert held == list(pl_module.parameters()) or callback.window.due()

    fit(tmp_path, module, callback, Looks())
    after = states[8]
    assert after["net.4.reduce.weight"] == after["net.4.expand.weight"] == 1
    assert after["net.4.expand.bias"] == after["net.6.weight"] == 8
    said = next(line for line in messages(caplog) if "step 7, asked rank 4" in line)
    assert "2 of 2 layers became two" in said
    assert said.endswith("The optimizer's state starts anew for their weights: net.0, net.4.")
    table = next(line for line in messages(caplog) if "4 of 12" in line)
    assert "last layer" in table
    assert any("asked rank 4; 2 layers are two, with 240 of 448 parameters" in line for line in messages(caplog))
    assert {name: each.rank for name, each in callback.ranks.items()} == {"net.0": 4, "net.4": 4}


def test_the_factors_are_those_of_the_inputs_of_the_steps_before_the_event(tmp_path):
    """The statistic is the sum over the observed batches only, and the event at the end uses all of it."""
    seen, callback = [], low_rank(start=2, end=7, observe_steps=3, criterion={"second_moment": {"damping": 0.0}})

    class Reads(SeededByStep):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step in (4, 5, 6):
                seen.append(batch[0])
            if trainer.global_step == 6:
                self.moment = callback._statistics.state_dict()["input_second_moment"]["sums"]["net.0.weight"].clone()

    module, reads = new(), Reads()
    fit(tmp_path, module, callback, reads, max_epochs=1)
    x = torch.cat(seen[:2])
    torch.testing.assert_close(reads.moment, x.T @ x)
    assert len(seen) == 3


def test_an_averaged_copy_gets_the_models_directions(tmp_path):
    """Signs and bases of two decompositions differ: averages of their factors would mean nothing."""
    module = new()
    before = {}

    class Looks(SeededByStep):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module
            layer = average.net[4]
            if trainer.global_step == 6:
                before["weight"] = layer.weight.detach().clone()
            if trainer.global_step in (7, 8):
                before[trainer.global_step] = layer.weight.detach().clone()
                before[f"model {trainer.global_step}"] = pl_module.net[4].weight.detach().clone()

    fit(tmp_path, module, EMAWeightAveraging(decay=0.5), low_rank(rank=7), Looks(), max_epochs=2)
    for step in (7, 8):
        distance = (before[step] - before[f"model {step}"]).norm() / before[f"model {step}"].norm()
        assert distance < 0.2


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_weights_that_it_adds_are_pruned_in_the_same_run(tmp_path, caplog, criterion):
    caplog.set_level(logging.INFO)

    def callbacks():
        pruning = WeightPruning(0.5, start=7, end=14, every_n_steps=3, criterion=criterion)
        return [low_rank(), pruning]

    module, both = new(), callbacks()
    fit(tmp_path, module, SeededByStep(), *both, Files(tmp_path, every_n_steps=5))
    names = {f"net.{place}.{factor}.weight" for place in (0, 4) for factor in ("reduce", "expand")}
    assert set(both[1].masks) == names
    weights = [dict(module.named_parameters())[name] for name in names]
    assert sum(int((weight == 0).sum()) for weight in weights) == 120
    assert any("joined what is pruned" in line for line in messages(caplog))
    for file in ("0.ckpt", "1.ckpt", "step10.ckpt"):
        again = new()
        if "step" in file:
            load_from_checkpoint(again, tmp_path / file)
            continue
        fit(tmp_path, again, SeededByStep(), *callbacks(), ckpt_path=tmp_path / file)
        assert_same_state(module, again)


def test_a_sparsity_by_layer_takes_both_factors(tmp_path):
    module = new()
    sparsity = {"net.0": 0.25, "*": 0.5}
    fit(tmp_path, module, low_rank(include=["net.0"]), WeightPruning(sparsity, start=7, end=9, every_n_steps=1))
    factors = [module.net[0].reduce.weight, module.net[0].expand.weight]
    assert sum(int((weight == 0).sum()) for weight in factors) == 28
    assert int((module.net[4].weight == 0).sum()) == 128


def test_layers_that_it_adds_are_rounded_in_the_same_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def callbacks():
        return [low_rank(), QuantizationAwareTraining(start=8, freeze=14, weight_bits=4, bits={"net.4": 3})]

    module = new()
    fit(tmp_path, module, SeededByStep(), *callbacks(), Files(tmp_path))
    layers = quantized_layers(module)
    factors = [f"net.{place}.{factor}" for place in (0, 4) for factor in ("reduce", "expand")]
    assert set(layers) == {*factors, "net.6"}
    assert {layer.quantization_phase for layer in layers.values()} == {"frozen"}
    assert [layers[name].weight_bits for name in factors] == [4, 4, 3, 3]
    assert not any("which stays float" in line for line in messages(caplog))
    for epoch in range(2):
        again = new()
        fit(tmp_path, again, SeededByStep(), *callbacks(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_a_new_fit_keeps_the_layers_and_factorizes_those_that_are_whole(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    module = new()
    fit(tmp_path, module, low_rank(include=["net.4"]))
    layer = module.net[4]
    fit(tmp_path, module, low_rank())
    assert module.net[4] is layer
    assert [module.net[place].rank for place in (0, 4)] == [4, 4]
    run = fit(tmp_path, module, low_rank())  # there is none left
    assert any("the layers were two before" in line for line in messages(caplog))
    run.save_checkpoint(tmp_path / "file.ckpt")
    assert_same_state(load_from_checkpoint(Classifier, tmp_path / "file.ckpt"), module)


def test_a_dense_file_makes_the_layers_whole_again(tmp_path):
    dense = new()
    fit(tmp_path, dense, max_epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    module = new()
    fit(tmp_path, module, low_rank())
    trainer(tmp_path, low_rank()).test(module, val_loader(), tmp_path / "dense.ckpt", verbose=False)
    assert type(module.net[4]) is nn.Linear
    assert_same_state(module, dense)


def test_it_exports_what_it_computes(tmp_path):
    module = new()
    fit(tmp_path, module, low_rank())
    rows = train_loader().dataset[:16][0]
    report = export_onnx(module, tmp_path / "model.onnx", rows)
    assert report


def test_the_report_marks_its_event(tmp_path):
    fit(tmp_path, new(), low_rank(), ReportCallback(tmp_path / "report"))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    event = next(event for event in report["events"] if event["step"] == 7)
    assert event["callback"] == "LowRankFactorization"
    assert event["low_rank/parameters"] == pytest.approx(240 / 448)
    assert 0 < event["low_rank/energy"] <= 1


def test_a_recipe_lays_out_its_window():
    recipe = Recipe(channel_pruning=0.5, low_rank=0.95, weight_pruning=0.5)
    assert recipe.stages == ("channel_pruning", "low_rank", "weight_pruning")
    assert recipe.low_rank == {"energy": 0.95, "start": 0.45, "end": 0.65}


def test_nothing_becomes_two_where_that_is_not_smaller_and_that_is_a_warning(tmp_path):
    module = new()
    with pytest.warns(UserWarning, match=r"step 7, asked rank 12; no layer became two"):
        fit(tmp_path, module, low_rank(rank=12))
    assert type(module.net[4]) is nn.Linear


class Slow(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        optimizer.kept = list(self.parameters())
        return optimizer


@pytest.mark.parametrize(
    ("callbacks", "error"),
    [
        (lambda: [ChannelPruning(0.5, start=2, end=9), low_rank()], "ChannelPruning acts until step 9. Let it end"),
        (lambda: [low_rank(), WeightPruning(0.5, start=3)], "WeightPruning acts on them from step 3 on. Let it begin"),
        (lambda: [low_rank(), WeightPruning("hold")], "WeightPruning acts on them from step 0 on"),
        (lambda: [low_rank(), QuantizationAwareTraining(start=3, freeze=20)], "acts on them from step 3 on"),
        (lambda: [low_rank(), WeightPruning(0.5, start=8, include=["net.4.weight"])], "Name the layer, 'net.4'"),
        (lambda: [low_rank(start=0, end=0)], "event before the first batch, and its criterion needs"),
        (lambda: [low_rank(), low_rank(include=["net.4"])], "net.4 is selected by two LowRankFactorization"),
        (lambda: [low_rank(include=["net.0"], exclude=["net.0"])], "selects no layer: left out are net.0"),
    ],
    ids=[
        "channels later",
        "weights before",
        "held zeros",
        "rounding before",
        "by weight",
        "too early",
        "twice",
        "none",
    ],
)
def test_what_cannot_work_is_refused_at_fit_start(tmp_path, callbacks, error):
    module = new()
    if "from step 0" in error:
        nn.utils.prune.l1_unstructured(module.net[4], "weight", 0.5)
        nn.utils.prune.remove(module.net[4], "weight")
    with pytest.raises(MisconfigurationException, match=error):
        fit(tmp_path, module, *callbacks())


def test_an_optimizer_that_cannot_follow_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="SGD keeps parameters in `kept`, besides its param_groups"):
        fit(tmp_path, new(Slow), low_rank())


def test_others_that_select_other_layers_may_act_when_they_will(tmp_path):
    module = new()
    fit(tmp_path, module, low_rank(include=["net.4"]), WeightPruning(0.5, start=2, end=5, include=["net.0"]))
    assert type(module.net[4]) is LowRank
    assert int((module.net[0].weight == 0).sum()) == 96


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"energy": 2.0}, r"`energy` must be a fraction in \(0, 1\]"),
        ({"rank": 3, "energy": 0.5}, "`rank` takes the place of `energy`"),
        ({"observe_steps": 0}, "`observe_steps` must be a whole number >= 1"),
        ({"criterion": "pca"}, "unknown low-rank criterion"),
        ({"start": 9, "end": 3}, "`start` must not be after `end`"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error):
    with pytest.raises(ValueError, match=error):
        LowRankFactorization(**arguments)
