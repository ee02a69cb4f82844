"""Recipes: words become callbacks whose windows fit, from Python and from YAML."""

from dataclasses import replace
from enum import StrEnum
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Classifier, data
from lightning_optim import (
    ChannelPruning,
    CompressedCheckpoint,
    DistillationModule,
    PerformanceScore,
    QuantizationAwareTraining,
    Recipe,
    WeightPruning,
    load_from_checkpoint,
)
from lightning_optim.checkpoint import KEY
from lightning_optim.recipe import recipe_names

ALL = {
    "channel_pruning": {"pruning_ratio": 0.5, "events": 2},
    "weight_pruning": {"sparsity": 0.5, "every_n_steps": 2},
    "quantization": True,
    "score": {"accuracy": "val_acc", "weights": {"size": 1.0, "accuracy": 0.1}},
    "checkpoint": {"monitor": "P"},
}


def fit(recipe, tmp_path, *, teacher=None, epochs=4, seed=0):
    pl.seed_everything(seed, verbose=False)
    module = recipe.wrap(Classifier(16), teacher)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=recipe.callbacks(),
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(data(), 8), DataLoader(data(), 16))
    return module, trainer


def test_every_word_makes_its_class():
    made = Recipe(**ALL).callbacks()
    classes = [ChannelPruning, WeightPruning, QuantizationAwareTraining, PerformanceScore, CompressedCheckpoint]
    assert [type(callback) for callback in made] == classes
    assert made[0].window.events == 2
    assert made[1].sparsity == 0.5


@pytest.mark.parametrize("stages", [(0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_windows_follow_each_other_with_time_to_recover(stages):
    names = [("channel_pruning", "weight_pruning", "quantization")[stage] for stage in stages]
    recipe = Recipe(**{name: ALL[name] for name in names})
    windows = [callback.window for callback in recipe.callbacks()]
    for earlier, later in pairwise(windows):
        assert later.start - earlier.end >= 0.1 - 1e-9
    assert windows[0].start >= 0.1 - 1e-9
    assert windows[-1].end <= 0.9


@pytest.mark.parametrize(
    ("name", "callback"), [("channel_pruning", ChannelPruning), ("quantization", QuantizationAwareTraining)]
)
def test_one_technique_alone_keeps_its_own_window(name, callback):
    (made,) = Recipe(**{name: True}).callbacks()
    assert (made.window.start, made.window.end) == (callback().window.start, callback().window.end)


def test_a_bare_value_is_the_first_word():
    recipe = Recipe(
        channel_pruning=0.25, weight_pruning=0.8, quantization=4, distillation="dist", score="acc", checkpoint="P"
    )
    assert recipe.channel_pruning["pruning_ratio"] == 0.25
    assert recipe.weight_pruning["sparsity"] == 0.8
    assert recipe.quantization["weight_bits"] == 4
    assert recipe.distillation == {"loss": "dist"}
    assert recipe.score == {"accuracy": "acc"}
    assert recipe.checkpoint == {"monitor": "P"}


def test_layer_classes_are_written_as_torch_names():
    recipe = Recipe(weight_pruning={"sparsity": 0.5, "include": ["torch.nn.Linear", "net.0"]})
    assert recipe.callbacks()[0].include == [nn.Linear, "net.0"]
    assert recipe.as_plain()["weight_pruning"]["include"] == ["torch.nn.Linear", "net.0"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"channel_prunning": 0.5}, "unknown keys 'channel_prunning'; known: description, depth_pruning"),
        ({"weight_pruning": {"sparsty": 0.5}}, "`weight_pruning` has no argument 'sparsty'; known: sparsity"),
        ({"weight_pruning": 80}, r"`weight_pruning`: `sparsity` must be a fraction in \[0, 1\), got 80"),
        (
            {"weight_pruning": {"start": 0.9, "end": 0.5, "sparsity": 0.5}},
            "`weight_pruning`: `start` must not be after",
        ),
        ({"quantization": {"weight_bits": 9}}, "`quantization`: `weight_bits` must be a whole number of bits"),
        ({"quantization": {"example_inputs": 1}}, r"Pass example inputs to `callbacks\(example_inputs"),
        ({"distillation": {"alpha": 2.0}}, r"`distillation`: `alpha` must be a weight in \[0, 1\]"),
        ({"distillation": {"loss": "kdd"}}, "unknown loss 'kdd'"),
        ({"distillation": {"teacher": 1}}, "`distillation` has no argument 'teacher'"),
        ({"score": {"min_accuracy": 95}}, "`score`: `min_accuracy` must be"),
        ({"checkpoint": {"monitr": "P"}}, "`checkpoint` has no argument 'monitr'; known: dirpath"),
        ({"weight_pruning": {"sparsity": 0.5, "include": ["torch.nn.Linaer"]}}, "'torch.nn.Linaer' is no layer class"),
        ({"channel_pruning": 0.5, "quantization": {"start": 0.3}}, "the windows overlap"),
        ({"weight_pruning": {"sparsity": 0.5, "end": 0.9}, "quantization": True}, "the windows overlap"),
        ({"channel_pruning": {"start": 10, "end": 20}, "quantization": True}, "all windows of a recipe as fractions"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_said_at_once(words, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Recipe.load(words)


def test_a_part_is_a_mapping_or_its_first_value():
    with pytest.raises(TypeError, match="must be a mapping of arguments, or a value for sparsity"):
        Recipe(weight_pruning=[0.5])


def test_a_teacher_needs_distillation():
    with pytest.raises(ValueError, match="no `distillation`, and a teacher was given"):
        Recipe(quantization=True).wrap(Classifier(16), Classifier(32))
    with pytest.raises(ValueError, match="no `distillation`, and got cache"):
        Recipe(quantization=True).wrap(Classifier(16), cache="file")


def test_steps_are_windows_too():
    recipe = Recipe(channel_pruning={"start": 10, "end": 20}, quantization={"start": 30, "freeze": 40})
    assert [callback.window.start for callback in recipe.callbacks()] == [10, 30]


def test_a_module_that_holds_its_zeros_has_no_window_to_overlap():
    recipe = Recipe(weight_pruning="hold", quantization={"start": 0.2})
    assert len(recipe.callbacks()) == 2


def test_wrap():
    student, teacher = Classifier(16), Classifier(32)
    assert Recipe(quantization=True).wrap(student) is student
    module = Recipe(distillation={"loss": "dist", "alpha": 0.7}).wrap(student, teacher)
    assert isinstance(module, DistillationModule)
    assert module.student is student


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_the_recipes_of_the_package_load_and_say_what_they_are_for(name):
    recipe = Recipe.load(name)
    assert len(recipe.description) > 50
    assert recipe.callbacks()
    assert Recipe.load(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'tiny'; known: cpu-latency"):
        Recipe.load("tiny")
    with pytest.raises(FileNotFoundError, match=r"no recipe file 'mine\.yaml'"):
        Recipe.load("mine.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping with keys of description"):
        Recipe.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        Recipe.load(tmp_path / "broken.yaml")


def test_a_file_and_python_train_the_same_model(tmp_path):
    recipe = Recipe(**ALL, distillation={"alpha": 0.5})
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    models = []
    for number, each in enumerate((recipe, Recipe.load(tmp_path / "mine.yaml"))):
        pl.seed_everything(1, verbose=False)
        models.append(fit(each, tmp_path / str(number), teacher=Classifier(32))[0].student)
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_all_of_it_in_one_run_reaches_what_was_asked(tmp_path):
    recipe = Recipe(**ALL, distillation={"alpha": 0.5})
    pl.seed_everything(1, verbose=False)
    module, trainer = fit(recipe, tmp_path, teacher=Classifier(32))
    student = module.student
    assert student.net[0].out_features == 8
    weights = torch.cat([student.net[place].weight.flatten() for place in (0, 4)])
    assert abs((weights == 0).float().mean().item() - 0.5) < 0.02
    assert student.net[0].quantization_phase == "frozen"
    assert trainer.callback_metrics["P/feasible"] == 1.0
    again = load_from_checkpoint(
        DistillationModule(Classifier(16), Classifier(32)), trainer.checkpoint_callback.best_model_path
    )
    inputs = data()[:8][0]
    assert torch.equal(again.eval()(inputs), module.eval()(inputs))


def test_a_stage_less_keeps_the_windows_of_the_others():
    recipe = Recipe(**ALL)
    fewer = replace(recipe, weight_pruning=None)
    assert fewer.quantization["start"] == recipe.quantization["start"]
    assert [type(callback) for callback in fewer.callbacks()][:2] == [ChannelPruning, QuantizationAwareTraining]


def test_the_checkpoint_says_where_it_comes_from(tmp_path):
    _, trainer = fit(Recipe(**ALL), tmp_path)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("full", "weights"):
        found = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)[KEY]["provenance"]
        assert found["recipe"] == Recipe(**ALL).as_plain()
        assert found["model"] == "helpers.models.Classifier"
        assert found["data"]["samples"] == len(data())
        assert found["versions"]["torch"] == torch.__version__
        assert found["metrics"]["val_acc"] == pytest.approx(trainer.callback_metrics["val_acc"].item())
        assert found["run"]["max_epochs"] == 4


def test_a_file_loaded_and_saved_again_keeps_where_it_comes_from(tmp_path):
    _, trainer = fit(Recipe(**ALL), tmp_path)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module = load_from_checkpoint(Classifier, tmp_path / "first.ckpt", width=16)
    saved = {}
    module.on_save_checkpoint(saved)
    assert saved[KEY]["provenance"] == torch.load(tmp_path / "first.ckpt", weights_only=True)[KEY]["provenance"]


class Word(StrEnum):
    VALUE = "layer"


def test_numbers_of_numpy_and_enums_leave_a_file_that_loads(tmp_path):
    recipe = Recipe(
        channel_pruning={"pruning_ratio": np.float64(0.5), "start": np.float64(0.1), "scope": Word.VALUE, "events": 2},
        distillation={"alpha": np.float64(0.5)},
    )
    module, trainer = fit(recipe, tmp_path, teacher=Classifier(32))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    load_from_checkpoint(DistillationModule(Classifier(16)), tmp_path / "file.ckpt")
    assert Recipe.load(yaml.safe_load(recipe.to_yaml())).channel_pruning["scope"] == "layer"
    assert module.student.net[0].out_features == 8


class Lost:
    """A dataset that can no longer say anything of itself."""

    def __init__(self):
        self.rows = data()
        self.asked = 0

    def __len__(self):
        self.asked += 1
        if self.asked > 30:
            raise OSError("the connection was lost")
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @property
    def name(self):
        raise RuntimeError("closed")


def test_a_description_never_costs_the_file(tmp_path):
    rows = Lost()
    words = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, **words, callbacks=[WeightPruning(0.5, start=1, end=4)])
    trainer.fit(Classifier(16), DataLoader(rows, 8), DataLoader(data(), 16))
    rows.asked = 100
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert load_from_checkpoint(Classifier, tmp_path / "file.ckpt", width=16)


def test_validating_a_file_and_saving_again_keeps_where_it_comes_from(tmp_path):
    _, trainer = fit(Recipe(**ALL), tmp_path)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    again = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=Recipe(**ALL).callbacks())
    again.validate(Classifier(16), DataLoader(data(), 16), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    again.save_checkpoint(tmp_path / "second.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)[KEY] for name in ("first", "second"))
    assert second["provenance"] == first["provenance"]


def test_a_recipe_that_only_distils_is_in_the_file_too(tmp_path):
    recipe = Recipe(distillation={"alpha": 0.3})
    _, trainer = fit(recipe, tmp_path, teacher=Classifier(32))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert torch.load(tmp_path / "file.ckpt", weights_only=True)["distillation"]["recipe"] == recipe.as_plain()


def test_a_window_of_a_step_and_a_fraction_is_refused():
    with pytest.raises(ValueError, match="all windows of a recipe as fractions, or all as steps"):
        Recipe(channel_pruning={"start": 12}, quantization=True)
    assert Recipe(channel_pruning={"start": 0}, quantization=True).channel_pruning["end"] == 0.5


def test_a_recipe_is_its_own():
    given = {"sparsity": {"net.*": 0.5}}
    recipe = Recipe(weight_pruning=given)
    given["sparsity"]["net.*"] = 0.9
    assert recipe.weight_pruning["sparsity"] == {"net.*": 0.5}
    assert len({recipe, Recipe(weight_pruning={"sparsity": {"net.*": 0.5}})}) == 1


@pytest.mark.parametrize("source", [None, 3, b"x"])
def test_what_is_no_recipe_is_said(source):
    with pytest.raises(TypeError, match="a recipe is a name, a path or a mapping"):
        Recipe.load(source)


def test_a_binary_file_is_named_in_the_error(tmp_path):
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bin\.yaml' is not UTF-8 text"):
        Recipe.load(tmp_path / "bin.yaml")


def test_a_recipe_that_distils_and_was_not_wrapped_raises_at_fit_start(tmp_path):
    """Without it the run trained without a teacher, and its file said that it had one."""
    for words in ({}, {"weight_pruning": 0.5}, {"checkpoint": {"monitor": "val_acc"}}):
        recipe = Recipe(distillation=True, **words)
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
        trainer = pl.Trainer(max_epochs=1, **options, callbacks=recipe.callbacks())
        with pytest.raises(MisconfigurationException, match=r"distils.*fits a Classifier.*recipe\.wrap"):
            trainer.fit(Classifier(16), DataLoader(data(), 8), DataLoader(data(), 16))
        trainer.validate(Classifier(16), DataLoader(data(), 16), verbose=False)


def test_a_file_claims_the_techniques_that_ran(tmp_path):
    """Another distillation than the recipe's, and callbacks of one stage only."""
    recipe = Recipe(distillation={"alpha": 0.3}, channel_pruning=0.5, weight_pruning=0.5, description="both")
    _, weights, guard = recipe.callbacks()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_epochs=2, **options, enable_checkpointing=False, callbacks=[weights, guard])
    trainer.fit(
        DistillationModule(Classifier(16), Classifier(32), loss="mse"), DataLoader(data(), 8), DataLoader(data(), 16)
    )
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert file[KEY]["provenance"]["recipe"] == {"description": "both", "weight_pruning": recipe.weight_pruning}
    assert file["distillation"]["asked"]["loss"] == {"mse": 1.0}
