"""QuantizationAwareTraining(bits="auto"): bits that are chosen where rounding begins."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from helpers.models import Classifier, Files, Quiet, Stacked, assert_same_state, fit, new
from lightning_optim import DepthPruning, QuantizationAwareTraining, load_from_checkpoint, quantize_post_training
from lightning_optim.quantization import auto_bits
from lightning_optim.quantization.auto_bits import choose_bits, chosen_bits
from lightning_optim.quantization.prepare import quantized_layers


def automatic(**words):
    return QuantizationAwareTraining(
        **{"bits": "auto", "effective_bits": 4.5, "start": 6, "observe_steps": 3, "freeze": 20, **words}
    )


def bits_of(module):
    return {name: layer.weight_bits for name, layer in quantized_layers(module).items()}


def test_bits_are_chosen_on_the_last_batches_before_rounding_begins(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    asked = []

    def noted(model, layers, calls, *arguments, **words):
        chosen = choose_bits(model, layers, calls, *arguments, **words)
        asked.append((int(module.trainer.global_step), len(calls), tuple(calls[0].args[0].shape), chosen))
        return chosen

    monkeypatch.setattr("lightning_optim.callbacks.auto_bits.choose_bits", noted)
    module, ours, average = new(Quiet), automatic(), WeightAveraging()
    fit(tmp_path, module, ours, average)
    ((step, calls, shape, chosen),) = asked
    assert (step, calls, shape) == (9, 4, (8, 12))
    sizes = {name: layer.weight.numel() for name, layer in quantized_layers(module).items()}
    assert sum(sizes[name] * bits for name, bits in chosen.bits.items()) <= 4.5 * sum(sizes.values())
    assert bits_of(module) == chosen.bits == bits_of(average._average_model.module)
    assert len(set(chosen.bits.values())) > 1
    assert chosen_bits(module) == chosen
    assert ours.plan_entry()["bits"] == chosen.bits
    assert "asked at most 4.5 bits a weight" in caplog.text
    for name in sizes:
        assert f"int{chosen.bits[name]}, per_channel" in caplog.text
        assert len(torch.unique(module.get_submodule(name).quantized_weight()[0])) <= 2 ** chosen.bits[name] - 1


@pytest.mark.parametrize("window", [{"start": 16}, {"start": 14}, {"start": 13}, {}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, window):
    straight, resumed = new(Quiet), new(Quiet)
    fit(tmp_path, straight, automatic(**window), Files(tmp_path / "files"))
    fit(tmp_path, resumed, automatic(**window), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(straight, resumed)
    assert bits_of(straight) == bits_of(resumed)
    assert len(set(bits_of(resumed).values())) > 1
    loaded = load_from_checkpoint(Quiet, tmp_path / "files" / "2.ckpt")
    assert bits_of(loaded) == bits_of(straight)
    with pytest.raises(ValueError, match="no bits were chosen for this Quiet here"):
        chosen_bits(loaded)


def test_a_second_fit_keeps_the_bits_until_it_has_chosen_its_own(tmp_path):
    module = new(Quiet)
    fit(tmp_path, module, automatic())
    first = bits_of(module)
    again = automatic(effective_bits=3.0)

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(bits_of(pl_module))

    seen = []
    fit(tmp_path, module, again, Notes())
    assert seen[0] == seen[8] == first != seen[9]
    assert bits_of(module) != first
    assert chosen_bits(module).asked == 3.0


def test_weights_alone_are_chosen_where_rounding_begins(tmp_path):
    module = new(Quiet)
    fit(tmp_path, module, automatic(activation_bits=None, observe_steps=None))
    assert len(set(bits_of(module).values())) > 1
    with pytest.raises(MisconfigurationException, match="none was trained before rounding begins"):
        fit(tmp_path, new(Quiet), automatic(activation_bits=None, observe_steps=None, start=0))
    fit(tmp_path, new(Quiet), automatic(activation_bits=None, observe_steps=None, start=0.5), fast_dev_run=1)


def test_names_follow_blocks_that_are_removed_later(tmp_path):
    module = new(Stacked)
    fit(tmp_path, module, automatic(start=1, observe_steps=1), DepthPruning(0.5, start=4, end=7), Files(tmp_path / "f"))
    assert set(chosen_bits(module).bits) >= {"blocks.0.up", "blocks.1.down"}
    resumed = new(Stacked)
    ours = automatic(start=1, observe_steps=1)
    fit(tmp_path, resumed, ours, DepthPruning(0.5, start=4, end=7), ckpt_path=tmp_path / "f" / "1.ckpt")
    assert_same_state(module, resumed)
    assert set(ours.plan_entry()["bits"]) == set(bits_of(resumed))


def test_the_plot_shows_each_layer_for_both(tmp_path):
    pytest.importorskip("matplotlib")
    module = new(Quiet)
    fit(tmp_path, module, automatic())
    afterwards = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    loader = [torch.randn(8, 12) for _ in range(3)]
    quantize_post_training(afterwards, loader, bits="auto", effective_bits=4.0, progress_bar=False)
    for place, model in enumerate((module, afterwards)):
        chosen = chosen_bits(model)
        assert chosen.costs.keys() == chosen.bits.keys()
        assert all(list(each) == [2, 3, 4, 5, 6, 7, 8] for each in chosen.costs.values())
        assert sum(chosen.costs[name][bits] for name, bits in chosen.bits.items()) == pytest.approx(chosen.cost)
        chosen.plot(tmp_path / f"{place}.svg")
        text = (tmp_path / f"{place}.svg").read_text()
        assert text.startswith("<?xml")
    assert auto_bits.ChosenBits.of_plain(chosen.as_plain()) == chosen


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"effective_bits": 1.5}, ValueError, "from 2 to `weight_bits`"),
        ({"effective_bits": 5.0, "weight_bits": 4}, ValueError, "from 2 to `weight_bits`"),
        ({"effective_bits": None}, ValueError, "needs a budget"),
        ({"effective_bits": "4"}, TypeError, "must be a number"),
        ({"bits": {"*": 4}}, ValueError, "is the budget of bits='auto'"),
        ({"bits": None}, ValueError, "is the budget of bits='auto'"),
        ({"bits": "most"}, ValueError, "must map patterns to bits, or be 'auto'"),
    ],
)
def test_bad_budgets_are_refused_in_a_sentence(words, error, message):
    with pytest.raises(error, match=message):
        automatic(**words)


def test_a_step_that_calls_no_one_module_is_refused(tmp_path):
    class Parts(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return nn.functional.cross_entropy(x, batch[1])

    with pytest.raises(MisconfigurationException, match="name the part with `module`"):
        fit(tmp_path, new(Parts), automatic())
