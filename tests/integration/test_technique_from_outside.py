"""A technique registered from outside the package does all that ours do; no line of the package knows it."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging

from docs.test_techniques_page import techniques_table
from helpers.low_rank import TECHNIQUE, Thin
from helpers.models import Classifier, Files, SeededByStep, assert_same_state, fit, new, trainer, val_loader
from helpers.toy import LowRank as LowRankLayer
from lightning_optim import CompressedCheckpoint, Recipe, ReportCallback, load_from_checkpoint
from lightning_optim.cli.main import main
from lightning_optim.quantization.prepare import quantized_layers
from lightning_optim.techniques import TECHNIQUES

WINDOW = {"start": 2, "end": 12}


@pytest.fixture(autouse=True)
def registered():
    TECHNIQUES.register(TECHNIQUE)
    yield
    TECHNIQUES.unregister(TECHNIQUE.name)


def assert_factorized(module, *places):
    for place in places:
        layer = module.net[place]
        assert type(layer) is LowRankLayer
        assert "weight" not in dict(layer.named_parameters())
        assert layer.u.shape[1] == layer.v.shape[0] == round(0.5 * min(layer.out_features, layer.in_features))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_trains_and_resumes_bit_for_bit_at_every_epoch(tmp_path, optimizer):
    module = new(dropout=0.3, optimizer=optimizer)
    run = fit(tmp_path, module, Thin(0.5, **WINDOW), SeededByStep(), Files(tmp_path))
    assert_factorized(module, 0, 4, 6)
    held = {id(parameter) for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    for epoch in range(2):
        again = new(dropout=0.3, optimizer=optimizer)
        fit(tmp_path, again, Thin(0.5, **WINDOW), SeededByStep(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_its_file_reloads_with_and_without_a_trainer(tmp_path):
    module = new()
    run = fit(tmp_path, module, Thin(0.5, **WINDOW))
    run.save_checkpoint(tmp_path / "file.ckpt")
    torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert_same_state(module, load_from_checkpoint(Classifier, tmp_path / "file.ckpt"))
    fresh = new()
    expected = run.test(module, val_loader(), verbose=False)
    assert trainer(tmp_path, Thin(0.5)).test(fresh, val_loader(), tmp_path / "file.ckpt", verbose=False) == expected
    assert_same_state(module, fresh)


def test_averaged_weights_follow(tmp_path):
    module = new()
    fit(tmp_path, module, Thin(0.5, **WINDOW), EMAWeightAveraging(decay=0.9))
    assert_factorized(module, 0, 4, 6)


def test_a_recipe_takes_it_with_windows_of_the_table(tmp_path):
    recipe = Recipe(channel_pruning={"pruning_ratio": 0.5, "scope": "layer", "events": 2}, thin=0.5)
    assert recipe.stages == ("channel_pruning", "thin")
    assert recipe.thin == {"ratio": 0.5, "start": 0.6, "end": 0.9}
    assert [callback.order for callback in recipe.callbacks()] == [10, 14]
    assert Recipe.load(yaml.safe_load(recipe.to_yaml())) == recipe
    assert replace(recipe, channel_pruning=None).thin == recipe.thin
    assert replace(recipe, thin=None).stages == ("channel_pruning",)
    assert hash(recipe) != hash(replace(recipe, thin=0.25))
    assert "thin={'start': 0.6, 'end': 0.9, 'ratio': 0.5}" in repr(recipe)
    module = new()
    fit(tmp_path, module, *recipe.callbacks())
    assert [module.net[place].out_features for place in (0, 4)] == [8, 8]
    assert_factorized(module, 0, 4, 6)


def test_beside_all_others_in_one_run(tmp_path):
    recipe = Recipe(
        channel_pruning={"pruning_ratio": 0.5, "scope": "layer", "events": 2},
        thin={"ratio": 0.5, "include": ["net.6"]},
        weight_pruning={"sparsity": 0.5, "every_n_steps": 1, "include": ["net.4"]},
        quantization={"include": ["net.0"]},
    )
    starts = [callback.window.start for callback in recipe.callbacks()]
    assert starts == [0.1, 0.3667, 0.6056, 0.8167]
    module = new()
    fit(tmp_path, module, SeededByStep(), *recipe.callbacks(), Files(tmp_path))
    assert_factorized(module, 6)
    for epoch in range(2):
        again = new()
        fit(tmp_path, again, SeededByStep(), *recipe.callbacks(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_a_layer_that_another_technique_replaces_is_quantized_no_more(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recipe = Recipe(thin={"ratio": 0.5, "include": ["net.6"]}, quantization=True)
    module = new()
    fit(tmp_path, module, SeededByStep(), *recipe.callbacks(), Files(tmp_path))
    assert_factorized(module, 6)
    assert list(quantized_layers(module)) == ["net.0", "net.4"]
    assert "net.6 is now a LowRank, which stays float" in caplog.text
    for epoch in range(2):
        again = new()
        fit(tmp_path, again, SeededByStep(), *recipe.callbacks(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_state(module, again)
    assert_same_state(load_from_checkpoint(Classifier, tmp_path / "2.ckpt"), module)


def test_wrong_arguments_are_said_as_those_of_ours():
    with pytest.raises(ValueError, match="`thin` has no argument 'rank'; known: ratio, start, end, module"):
        Recipe(thin={"rank": 3})
    with pytest.raises(ValueError, match=r"the windows overlap\. `thin` acts first"):
        Recipe(thin={"end": 0.7}, quantization=True)


def test_the_report_marks_its_event(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(tmp_path, new(), Thin(0.5, **WINDOW), ReportCallback(tmp_path / "report"))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    steps = {event["step"]: event for event in report["events"]}
    assert steps[12] == {"step": 12, "callback": "Thin", "thin/parameters": steps[12]["thin/parameters"]}
    assert report["epochs"][-1]["thin/parameters"] == steps[12]["thin/parameters"]
    assert any("Thin: asked 50% of the rank" in line for line in report["asked_and_reached"])
    assert "LowRank" in {layer["type"] for layer in report["end"]["layers"]}


def test_the_checkpoint_that_waits_for_the_end_waits_for_it(tmp_path):
    best = CompressedCheckpoint(tmp_path / "best", monitor="val_loss")
    fit(tmp_path, new(), Thin(0.5, **WINDOW), best)
    assert_factorized(load_from_checkpoint(Classifier, best.best_model_path), 0, 4, 6)


def test_the_command_show_prints_it(tmp_path, capsys):
    recipe = Recipe(thin={"ratio": 0.5, **WINDOW})
    run = fit(tmp_path, new(), *recipe.callbacks())
    run.save_checkpoint(tmp_path / "file.ckpt")
    assert main(["show", str(tmp_path / "file.ckpt")]) == 0
    printed = capsys.readouterr().out
    assert "thin" in printed
    assert "LowRank" in printed
    assert "3 layers with another class" in printed


def test_the_documentations_table_has_its_row():
    rows = techniques_table().splitlines()
    assert "| `thin` | Thin | `ratio` | `start`, `end` |" in rows
    assert rows.index("| `thin` | Thin | `ratio` | `start`, `end` |") == 4
