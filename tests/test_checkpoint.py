"""The plan: one mechanism for every technique that changes a module's shape or class."""

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_optim
from helpers.models import Classifier, Files, assert_same_state, fit, new, train_loader, trainer, val_loader
from helpers.toy import Narrow, ScaledLinear
from lightning_optim import WeightPruning, conform, load_from_checkpoint
from lightning_optim.checkpoint import EMPTY, KEY, VERSION, plan_of
from lightning_optim.structure import Structure


@pytest.fixture
def narrowed(tmp_path):
    """A run of 4 epochs (8 steps each), narrowed at step 10, with a file at the end of each epoch."""
    module = new()
    run = fit(tmp_path, module, Narrow(10), Files(tmp_path / "files"), max_epochs=4)
    return module, run, tmp_path / "files"


def test_the_toy_changes_shape_and_class_mid_run(narrowed):
    module, _, files = narrowed
    assert module.net[4].weight.shape == (8, 16)
    assert type(module.net[0]) is ScaledLinear
    plans = [torch.load(files / f"{e}.ckpt", weights_only=True)[KEY] for e in range(4)]
    assert plans[0]["modules"] == {}
    assert sorted(plans[1]["modules"]) == ["net.0", "net.4", "net.6"]
    assert plans[1]["modules"]["net.4"]["attributes"] == {"out_features": 8}


@pytest.mark.parametrize("epoch", range(3))
def test_a_resumed_run_equals_the_uninterrupted_one(narrowed, tmp_path, epoch):
    module, _, files = narrowed
    again = new()
    fit(tmp_path, again, Narrow(10), Files(tmp_path / "again"), ckpt_path=files / f"{epoch}.ckpt", max_epochs=4)
    assert_same_state(module, again)


def test_a_fresh_module_is_tested_from_the_file_by_a_trainer_that_has_the_callback(narrowed, tmp_path):
    module, run, files = narrowed
    expected = run.test(module, val_loader(), verbose=False)
    fresh = new()
    got = trainer(tmp_path, Narrow(10)).test(fresh, val_loader(), ckpt_path=files / "3.ckpt", verbose=False)
    assert got == expected
    assert_same_state(module, fresh)


def test_conforming_works_both_ways_on_a_live_module(narrowed):
    module, run, files = narrowed
    expected = run.test(module, val_loader(), verbose=False)
    dense = torch.load(files / "0.ckpt", weights_only=True)["state_dict"]
    run.test(module, val_loader(), ckpt_path=files / "0.ckpt", verbose=False)
    assert type(module.net[0]) is nn.Linear
    assert module.net[4].out_features == 16
    assert_same_state(module, dense)
    assert run.test(module, val_loader(), ckpt_path=files / "3.ckpt", verbose=False) == expected


@pytest.mark.parametrize("give", ["class", "instance"])
def test_it_loads_without_a_trainer_and_then_goes_anywhere(narrowed, tmp_path, give):
    module, _, files = narrowed
    loaded = load_from_checkpoint(Classifier if give == "class" else new(), files / "3.ckpt")
    assert type(loaded) is Classifier
    assert_same_state(module, loaded)
    assert loaded.hparams == module.hparams
    plain = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    plain.fit(loaded, train_loader(), val_loader())  # no callback of ours
    plain.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert_same_state(loaded, load_from_checkpoint(Classifier, tmp_path / "again.ckpt"))
    pickle.loads(pickle.dumps(loaded))


def test_a_copy_of_a_changed_module_saves_itself_and_not_the_original(narrowed, tmp_path):
    module, _, _ = narrowed
    duplicate = copy.deepcopy(module)
    assert plan_of(duplicate).module is duplicate
    with torch.no_grad():
        duplicate.net[4].weight.zero_()
    run = trainer(tmp_path)
    run.strategy.connect(duplicate)
    run.save_checkpoint(tmp_path / "copy.ckpt", weights_only=True)
    assert_same_state(duplicate, load_from_checkpoint(Classifier, tmp_path / "copy.ckpt"))


@pytest.mark.parametrize("after_fit", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_four_ways_of_saving(tmp_path, after_fit, weights_only):
    module = new()
    save = ModelCheckpoint(tmp_path, "in", save_weights_only=weights_only, every_n_epochs=2)
    run = fit(tmp_path, module, Narrow(10), save, max_epochs=2)
    path = tmp_path / "in.ckpt"
    if after_fit:
        path = tmp_path / "after.ckpt"
        run.save_checkpoint(path, weights_only)
    assert_same_state(module, load_from_checkpoint(Classifier, path))


def test_hooks_are_gone_after_fit_unless_the_module_differs(tmp_path):
    module = new()
    run = fit(tmp_path, module, WeightPruning(0.5, start=1, end=5), max_epochs=1)
    assert "on_save_checkpoint" not in module.__dict__
    assert "on_load_checkpoint" not in module.__dict__
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert "on_save_checkpoint" not in module.__dict__


def test_hooks_are_gone_after_an_exception(tmp_path):
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyError("boom")

    module = new(Fails)
    with pytest.raises(KeyError, match="boom"):
        fit(tmp_path, module, Narrow(10))
    assert "on_save_checkpoint" not in module.__dict__
    assert "on_load_checkpoint" not in module.__dict__


def test_the_modules_own_hooks_still_run(tmp_path):
    class Own(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["own"]
            assert self.net[4].out_features == 8  # conformed before

    module = new(Own)
    run = fit(tmp_path, module, Narrow(10), max_epochs=2)
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert load_from_checkpoint(Own, tmp_path / "own.ckpt").loaded == 5


def test_tied_parameters_stay_tied_when_conformed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    source = Tied()
    plan = plan_of(source)
    plan.track("a", "in_features", "out_features")
    source.a.weight = nn.Parameter(torch.ones(2, 2))
    source.a.in_features = source.a.out_features = 2
    target = Tied()
    conform(target, plan.as_plain())
    assert target.a.weight is target.b.weight
    assert target.a.weight.shape == (2, 2)
    assert target.a.in_features == 2


def test_a_plan_that_does_not_fit_changes_nothing():
    source = new()
    plan = plan_of(source)
    plan.track("net.4", "out_features")
    source.net[4].weight = nn.Parameter(torch.ones(2, 16))
    plain = plan.as_plain()
    plain["modules"]["net.99"] = plain["modules"]["net.4"]
    target = new()
    with pytest.raises(ValueError, match=r"plan changes 'net\.99', and Classifier has no such module"):
        conform(target, plain)
    assert target.net[4].weight.shape == (16, 16)


def test_a_plan_swaps_in_registered_layer_classes_only():
    plan = plan_of(new())
    plan.track("net.0")
    structure = Structure.of(plan.module.net[0], ()).as_plain(None) | {"class": "os.system"}
    with pytest.raises(ValueError, match=r"makes 'net\.0' a os\.system"):
        conform(new(), {"version": VERSION, "modules": {"net.0": structure}, "entries": {}})


def test_a_newer_plan_is_refused(tmp_path):
    run = fit(tmp_path, new(), max_epochs=1)
    run.save_checkpoint(tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    file[KEY] = {**EMPTY, "version": VERSION + 1, "package": "9.9"}
    torch.save(file, tmp_path / "newer.ckpt")
    for load in (
        lambda: load_from_checkpoint(Classifier, tmp_path / "newer.ckpt"),
        lambda: load_from_checkpoint(new(), tmp_path / "newer.ckpt"),
        lambda: fit(tmp_path, new(), WeightPruning(0.5), ckpt_path=tmp_path / "newer.ckpt"),
    ):
        with pytest.raises(ValueError, match=r"written by lightning_optim 9\.9.*Install a newer lightning_optim"):
            load()


def test_a_half_written_file_and_other_files_are_named(tmp_path):
    run = fit(tmp_path, new(), max_epochs=1)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "junk.ckpt").write_bytes(b"no checkpoint at all")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    cases = dict.fromkeys(("half", "empty", "junk"), "not a complete Lightning checkpoint") | {
        "other": "no 'state_dict'"
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_from_checkpoint(Classifier, tmp_path / f"{name}.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_from_checkpoint(Classifier, tmp_path / "absent.ckpt")
    with pytest.raises(TypeError, match="LightningModule class or instance"):
        load_from_checkpoint(nn.Linear, tmp_path / "whole.ckpt")


def test_an_entry_that_no_callback_claims_prints_both_keys(narrowed, tmp_path):
    _, _, files = narrowed
    other = Narrow(10, module="net")
    with pytest.raises(MisconfigurationException, match=r"Narrow\{'module': None.*Narrow\{'module': 'net'"):
        fit(tmp_path, new(), other, ckpt_path=files / "2.ckpt", max_epochs=4)


def test_public_names():
    for name in lightning_optim.__all__:
        assert getattr(lightning_optim, name) is not None


def test_an_instance_keeps_its_strictness(tmp_path):
    class Loose(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)
            self.strict_loading = False

    fit(tmp_path, new(), max_epochs=1).save_checkpoint(tmp_path / "file.ckpt")
    load_from_checkpoint(Loose(), tmp_path / "file.ckpt")


def trained_file(tmp_path, cls, **init):
    """A file of a narrowed module."""
    module = new(cls, **init)
    run = fit(tmp_path, module, Narrow(10), max_epochs=2)
    run.save_checkpoint(tmp_path / "file.ckpt")
    return module, tmp_path / "file.ckpt"


def test_loading_makes_no_subclass_that_a_registry_would_take_in(tmp_path):
    known = {}

    class Registered(Classifier):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            if cls.__name__ in known:
                raise TypeError(f"{cls.__name__} is registered already")
            known[cls.__name__] = cls

    class Mine(Registered):
        pass

    module, path = trained_file(tmp_path, Mine)
    loaded = load_from_checkpoint(Mine, path)
    assert_same_state(module, loaded)
    assert type(loaded) is known["Mine"] is Mine
    assert "on_load_checkpoint" not in vars(Mine)


def test_a_class_is_left_as_it_was_when_loading_fails(tmp_path):
    class Own(Classifier):
        def on_load_checkpoint(self, checkpoint):
            raise KeyError("own")

    _, path = trained_file(tmp_path, Own)
    hook = vars(Own)["on_load_checkpoint"]
    with pytest.raises(KeyError, match="own"):
        load_from_checkpoint(Own, path)
    assert vars(Own)["on_load_checkpoint"] is hook


class Scale:
    """An object as many modules keep among their hyperparameters."""

    def __init__(self, by: float) -> None:
        self.by = by


class Scaled(Classifier):
    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.save_hyperparameters({"scale": scale})
        self.by = scale.by


@pytest.mark.parametrize("give", ["class", "instance"])
def test_a_file_with_objects_loads_where_it_is_trusted(tmp_path, give):
    module, path = trained_file(tmp_path, Scaled, scale=Scale(3))
    target = Scaled if give == "class" else new(Scaled, scale=Scale(3))
    with pytest.raises(ValueError, match=r"Scale was not an allowed global by default\).*weights_only=False"):
        load_from_checkpoint(target, path)
    loaded = load_from_checkpoint(target, path, weights_only=False)
    assert loaded.by == 3
    assert_same_state(module, loaded)


class SetsItself(Classifier):
    """Reads its files with a loader that sets ``weights_only`` itself, and passes all else on."""

    @classmethod
    def load_from_checkpoint(cls, path, map_location=None, **arguments):
        return super().load_from_checkpoint(path, map_location, weights_only=False, **arguments)


class TakesPathOnly(Classifier):
    """Reads its files with a loader that takes the path and the width."""

    @classmethod
    def load_from_checkpoint(cls, path, width=16):
        return super().load_from_checkpoint(path, width=width)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("cls", [SetsItself, TakesPathOnly])
def test_a_class_may_read_its_files_by_a_loader_of_its_own(tmp_path, cls, weights_only):
    module, path = trained_file(tmp_path, cls)
    loaded = load_from_checkpoint(cls, path, weights_only=weights_only, width=16)
    assert type(loaded) is cls
    assert_same_state(module, loaded)


def test_a_type_error_of_the_module_is_its_own(tmp_path):
    class Once(Classifier):
        def __init__(self, width=16, **others):
            super().__init__(width)
            if "height" in others:
                raise TypeError("unknown: height")

    _, path = trained_file(tmp_path, Once)
    with pytest.raises(TypeError, match="unknown: height"):
        load_from_checkpoint(Once, path, height=2)


def test_an_object_whose_class_is_gone_is_named(tmp_path):
    _, path = trained_file(tmp_path, Scaled, scale=Scale(3))
    own = globals().pop("Scale")
    try:
        with pytest.raises(ValueError, match=r"class cannot be imported here.*Scale"):
            load_from_checkpoint(Scaled, path, weights_only=False)
    finally:
        globals()["Scale"] = own


def test_a_file_of_torchs_old_format_loads(tmp_path):
    module, path = trained_file(tmp_path, Classifier)
    file = torch.load(path, weights_only=True)
    torch.save(file, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same_state(module, load_from_checkpoint(Classifier, tmp_path / "old.ckpt"))
