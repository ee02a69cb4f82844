"""The promises that hold for every callback, one test each over all of them.

A new technique adds a row to ``helpers.techniques.TRIED``; what is tried beside its plain form is in ``CALLBACKS``.
"""

import copy
import logging
from itertools import product

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from helpers.marks import cells
from helpers.models import (
    Classifier,
    Files,
    ResumableLoader,
    SeededByStep,
    Stacked,
    Stream,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from helpers.techniques import (
    TRIED,
    assert_reached,
    blocks,
    channels,
    integers,
    low_rank,
    names_without_factors,
    weights,
)
from lightning_optim import ChannelPruning, CompressedCheckpoint, PerformanceScore, load_from_checkpoint


def low_rank_then_weights(*, start=2, end=9, **arguments):
    """Weights are pruned from where the layers become two."""
    middle = (start + end) // 2
    return [low_rank(start=start, end=middle, **arguments), weights(start=middle, end=end, **arguments)]


def plainly(name):
    return lambda **arguments: [TRIED[name].make(**arguments)]


CALLBACKS = {
    **{name: plainly(name) for name in TRIED},
    "weights, taylor": lambda **arguments: [weights(criterion="taylor", **arguments)],
    "channels, taylor": lambda **arguments: [channels(criterion="taylor", **arguments)],
    "channels, activation": lambda **arguments: [channels(criterion="activation", **arguments)],
    "channels, growing": lambda **arguments: [channels(regularization="growing", **arguments)],
    "channels, group lasso and activation": lambda **arguments: [
        channels(criterion="activation", regularization="group_lasso", strength=0.3, **arguments)
    ],
    "channels and weights": lambda **arguments: [channels(**arguments), weights(**arguments)],
    "weights and channels": lambda **arguments: [weights(**arguments), channels(**arguments)],
    "low rank and weights": low_rank_then_weights,
    "channels and low rank": lambda **arguments: [low_rank(**arguments, rank=2), channels(**arguments)],
    "integers, histogram": lambda **arguments: [integers(observer="histogram", **arguments)],
    "weights and integers": lambda **arguments: [weights(**arguments), integers(**arguments)],
    "all": lambda **arguments: [integers(**arguments), channels(**arguments), weights(**arguments)],
}
STACKED = {
    "blocks, influence": lambda **arguments: [blocks(criterion="influence", **arguments)],
    "blocks and low rank": lambda **arguments: [low_rank(**arguments), blocks(**arguments)],
    "blocks, channels, weights and integers": lambda **arguments: [
        weights(**arguments),
        integers(**arguments),
        channels(**arguments),
        blocks(**arguments),
    ],
}
"""The same on a model with a stack."""
MODELS = {name: TRIED[name].model if name in TRIED else Classifier for name in CALLBACKS} | dict.fromkeys(
    STACKED, Stacked
)
CALLBACKS |= STACKED
TOGETHER = ("blocks, channels, weights and integers", "low_rank")
"""Rows that hold every technique once. Those of one technique alone are slow where it decides nothing by itself."""
ALONE_AND_TOGETHER = (*TRIED, "all")
"""Rows whose tests are quick: what the others add shows in what they save and how they resume."""
WITH_A_STATE = (
    *ALONE_AND_TOGETHER,
    "weights, taylor",
    "channels, taylor",
    "integers, histogram",
    "channels and weights",
)
"""Rows whose quick tests resume and reload: criteria and observers with statistics, and two techniques together."""


def rows(quick):
    """Return every row as test parameters; those that are not quick are slow."""
    return pytest.mark.parametrize(
        ("make", "model"),
        [
            pytest.param(CALLBACKS[name], MODELS[name], marks=() if name in quick else pytest.mark.slow, id=name)
            for name in CALLBACKS
        ],
    )


KEPT = [
    *((name, "P") for name in TRIED),
    (TOGETHER[0], "val_loss"),
]
together = rows(TOGETHER)
every_callback = rows(ALONE_AND_TOGETHER)
every_state = rows(WITH_A_STATE)


# 1. Nothing of the user's code changes.


@every_callback
def test_the_module_is_what_it_was_but_for_its_weights(tmp_path, make, model):
    module, callbacks = new(model), make()
    optimizers = []

    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            optimizers.extend(trainer.optimizers)

    fit(tmp_path, module, *callbacks, Looks())
    assert_reached(module, callbacks)
    assert type(module) is model
    fewer = {"blocks": len(module.blocks)} if model is Stacked else {}
    assert names_without_factors(module) == [name for name, _ in new(model, **fewer).named_parameters()]
    assert module.hparams == new(model).hparams
    for layer in module.modules():
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert "on_load_checkpoint" not in module.__dict__


@together
def test_nothing_happens_before_the_window_opens(tmp_path, make, model):
    plain, module = new(model, dropout=0.3), new(model, dropout=0.3)
    fit(tmp_path, plain, max_epochs=2)
    with pytest.warns(UserWarning, match="will not close"):
        fit(tmp_path, module, *make(start=17, end=30), max_epochs=2)
    state = module.state_dict()  # ranges, still empty, are beside the weights
    assert_same_state(plain, {name: state[name] for name in plain.state_dict()})


# 3. Resume is invisible.


@every_callback
def test_resumed_at_every_epoch_equals_uninterrupted(tmp_path, make, model):
    module = new(model, dropout=0.3)
    fit(tmp_path, module, *make(), SeededByStep(), Files(tmp_path / "files"))
    for epoch in range(2):
        again = new(model, dropout=0.3)
        fit(tmp_path, again, *make(), SeededByStep(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


@pytest.mark.parametrize(
    ("name", "first"),
    cells(
        list(CALLBACKS),
        [True, False],
        quick=[*((name, True) for name in WITH_A_STATE), ("all", False)],
    ),
)
def test_resumed_at_every_step_equals_uninterrupted(tmp_path, name, first):
    """``first``: files are written before our callbacks act, or after."""
    files, model, make = tmp_path / "files", MODELS[name], CALLBACKS[name]

    def run(module, ckpt_path=None):
        class Saves(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if ckpt_path is None:
                    trainer.save_checkpoint(files / f"{trainer.global_step}.ckpt")

        example = {"example_inputs": torch.zeros(2, 12)}
        ours = [
            channels(criterion=callback.allocation.criterion, regularization=callback.regularization, **example)
            if isinstance(callback, ChannelPruning)
            else callback
            for callback in make()
        ]
        callbacks = [Saves(), *ours] if first else [*ours, Saves()]
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, ResumableLoader(), val_loader(), ckpt_path=ckpt_path)

    module = new(model)
    run(module)
    for step in (1, 2, 3, 5, 6, 7, 9, 12):
        again = new(model)
        run(again, files / f"{step}.ckpt")
        assert_same_state(module, again)


# 4. One file reloads. 6. The saved score is the saved model's.


@every_state
@pytest.mark.parametrize(
    ("when", "weights_only"),
    cells(["in fit", "after fit"], [False, True], quick=[("in fit", False), ("after fit", True)]),
)
def test_the_four_ways_of_saving_reload_in_three(tmp_path, make, model, when, weights_only):
    class Saves(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "file.ckpt", weights_only)

    module, saves = new(model), Saves()
    run = fit(tmp_path, module, *make(), *([saves] if when == "in fit" else []))
    if when == "after fit":
        run.save_checkpoint(tmp_path / "file.ckpt", weights_only)
    path = tmp_path / "file.ckpt"
    torch.load(path, weights_only=True)
    assert_same_state(module, load_from_checkpoint(model, path))
    assert_same_state(module, load_from_checkpoint(new(model), path))
    fresh = new(model)
    expected = run.test(module, val_loader(), verbose=False)
    assert trainer(tmp_path, *make()).test(fresh, val_loader(), path, verbose=False) == expected
    assert_same_state(module, fresh)
    predicted = torch.cat(trainer(tmp_path, *make()).predict(new(model), val_loader(), ckpt_path=path))
    assert torch.equal(predicted, torch.cat(run.predict(module, val_loader())))


@pytest.mark.parametrize(("name", "monitor"), cells(list(CALLBACKS), ["val_loss", "P"], quick=KEPT))
def test_the_kept_file_scores_again_what_was_monitored(tmp_path, name, monitor):
    model, make = MODELS[name], CALLBACKS[name]
    best = CompressedCheckpoint(tmp_path / "best", monitor=monitor)
    accuracies = {}

    class Notes(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            accuracies[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    fit(tmp_path, new(model), *make(), PerformanceScore(), Notes(), best, max_epochs=5)
    step = torch.load(best.best_model_path, weights_only=True)["global_step"]
    again = trainer(tmp_path, *make(), PerformanceScore(), best)
    metrics = again.validate(new(model), val_loader(), best.best_model_path, verbose=False)
    assert metrics[0]["val_loss"] == pytest.approx(accuracies[step], rel=1e-6)


# 7. Combinations work.


TRAINERS = {
    "max_steps": {"max_steps": 12, "max_epochs": 100},
    "max_time": {"max_time": "00:01:00:00", "max_epochs": 3},
    "accumulate_grad_batches": {"accumulate_grad_batches": 2, "max_epochs": 4},
    "barebones": {"barebones": True},
    "overfit_batches": {"overfit_batches": 4, "max_epochs": 4},
    "limit_train_batches": {"limit_train_batches": 4, "max_epochs": 4},
    "gradient_clip_val": {"gradient_clip_val": 0.5},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "val_check_interval": {"val_check_interval": 0.5},
    "precision": {"precision": "bf16-mixed"},
}
FOR_EACH = ("accumulate_grad_batches", "barebones", "precision")
"""Quick for each technique alone; the others change the window, which all share, and are quick for all together."""


@pytest.mark.parametrize(
    ("name", "options"),
    cells(
        list(CALLBACKS),
        list(TRAINERS),
        quick=[*product(["all"], TRAINERS), *product(TRIED, FOR_EACH)],
    ),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.filterwarnings("ignore:.*barebones.*:UserWarning")
def test_trainers_of_all_kinds(tmp_path, name, options):
    module, callbacks = new(MODELS[name]), CALLBACKS[name]()
    fit(tmp_path, module, *callbacks, **TRAINERS[options])
    assert_reached(module, callbacks)


@together
def test_fast_dev_run_reaches_the_target(tmp_path, make, model):
    module, callbacks = new(model), make(start=100, end=2000)
    fit(tmp_path, module, *callbacks, fast_dev_run=1)
    assert_reached(module, callbacks)


@together
def test_a_loader_without_length_and_int_windows(tmp_path, make, model):
    module, callbacks = new(model), make()
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module, DataLoader(Stream(), 8), val_loader())
    assert_reached(module, callbacks)


@together
def test_the_learning_rate_finders(tmp_path, make, model):
    module, callbacks = new(model), make()
    module.learning_rate = 1e-2
    run = trainer(tmp_path, *callbacks)
    Tuner(run).lr_find(module, train_loader(), val_loader(), num_training=5)
    run.fit(module, train_loader(), val_loader())
    assert_reached(module, callbacks)
    module, callbacks = new(model), make()
    module.learning_rate = 1e-2
    fit(tmp_path, module, LearningRateFinder(num_training_steps=5), *callbacks)
    assert_reached(module, callbacks)


@together
def test_layers_built_in_configure_model(tmp_path, make, model):
    class Late(model):
        def __init__(self):
            super().__init__()
            for name, _ in list(self.named_children()):
                setattr(self, name, None)

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(3)
                for name, layer in model().named_children():
                    setattr(self, name, layer)

    module, callbacks = new(Late), make()
    fit(tmp_path, module, *callbacks, Files(tmp_path / "files"))
    assert_reached(module, callbacks)
    again = new(Late)
    fit(tmp_path, again, *make(), ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)
    assert_same_state(module, load_from_checkpoint(Late, tmp_path / "files" / "2.ckpt"))


@together
def test_an_early_stop_says_what_was_reached(tmp_path, make, model, caplog):
    caplog.set_level(logging.INFO)
    stop = EarlyStopping("P", patience=1, divergence_threshold=0.0)  # stops at once
    fit(tmp_path, new(model), *make(start=2, end=20), PerformanceScore(), stop)
    lines = [record.message for record in caplog.records if "the run ended at step 8" in record.message]
    assert len(lines) == len(make())


@every_callback
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt.*")
def test_an_interrupt_leaves_a_loadable_file_and_no_hooks(tmp_path, make, model):
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                raise KeyboardInterrupt

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    module, callbacks = new(model), make()
    with pytest.raises(SystemExit):
        fit(tmp_path, module, *callbacks, Interrupts())
    assert not any(callback._handles for callback in callbacks)
    assert_same_state(module, load_from_checkpoint(model, tmp_path / "interrupted.ckpt"))


@every_callback
def test_a_second_fit_by_the_same_trainer_and_with_a_new_model(tmp_path, make, model):
    module, callbacks = new(model), make()
    run = fit(tmp_path, module, *callbacks, max_epochs=2)
    run.fit_loop.max_epochs = 3
    run.fit(module, train_loader(), val_loader())
    assert_reached(module, callbacks)
    other = new(model)
    run.fit_loop.max_epochs = 6
    run.fit(other, train_loader(), val_loader())
    assert_reached(other, callbacks)


@together
def test_pytorch_lightning_imports(tmp_path, make, model):
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            for name, layer in new(model).named_children():
                setattr(self, name, copy.deepcopy(layer))

        def forward(self, x):
            return model.forward(self, x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    module, callbacks = Other(), make()
    run = other.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    run.fit(module, train_loader())
    assert_reached(module, callbacks)
    run.save_checkpoint(tmp_path / "other.ckpt")
    assert_same_state(module, load_from_checkpoint(Other, tmp_path / "other.ckpt"))


# 5. Strategies are an allow list.


@every_callback
@pytest.mark.parametrize(("name", "base"), [("FSDPStrategy", ParallelStrategy), ("DeepSpeedStrategy", DDPStrategy)])
def test_a_strategy_that_is_not_known_to_work_is_refused_by_name(tmp_path, make, model, name, base):
    """DeepSpeed's is a DDPStrategy too."""
    run = trainer(tmp_path)
    run.strategy.__class__ = type(name, (base,), {})
    for callback in make():
        with pytest.raises(MisconfigurationException, match=rf"not supported under {name}\. (Use|Take) .*'optim_ddp'"):
            callback.setup(run, new(model), "fit")
