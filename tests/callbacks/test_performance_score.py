"""PerformanceScore: the formula, the references, the guard, the clocks, and what monitors it."""

import logging
import math
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from helpers.models import Classifier, Files, assert_same_state, fit, new, train_loader, trainer, val_loader
from lightning_optim import CompressedCheckpoint, PerformanceScore, WeightPruning
from lightning_optim.functional.score import Terms, performance_score


class History(pl.callbacks.Checkpoint):
    """Notes what monitors see at each epoch's end."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def scored(tmp_path, *callbacks, module=None, **words):
    options = words.pop("options", {})
    history = History()
    module = module or new()
    fit(tmp_path, module, PerformanceScore(**words), *callbacks, history, **options)
    return history.rows


def test_every_term_and_raw_value_is_logged_under_its_name(tmp_path):
    row = scored(tmp_path, weights={"size": 1, "train_time": 2, "inference_time": 3, "accuracy": 4})[-1]
    names = {"P", "P/unguarded", "P/shown", "P/feasible", "P/size", "P/train_time", "P/inference_time", "P/error"}
    names |= {"P/raw/size", "P/raw/train_time_s", "P/raw/inference_time_ms", "P/raw/accuracy"}
    assert names <= row.keys()
    terms = Terms(row["P/size"], row["P/train_time"], row["P/inference_time"], row["P/error"])
    weights = {"size": 1, "train_time": 2, "inference_time": 3, "accuracy": 4}
    assert row["P"] == pytest.approx(performance_score(terms, weights), rel=1e-5)
    assert row["P/raw/size"] == sum(p.numel() for p in new().parameters())
    assert row["P/raw/accuracy"] == row["val_acc"]
    assert row["P/error"] == pytest.approx(1 - row["val_acc"])


def test_raw_is_the_formula_to_the_letter(tmp_path):
    row = scored(tmp_path, reference="raw")[-1]
    by_hand = 0.4 * row["P/raw/size"] + 0.6 * row["P/raw/inference_time_ms"] + 0.1 * (1 - row["val_acc"])
    assert row["P"] == pytest.approx(by_hand, rel=1e-5)


def test_a_users_references_divide(tmp_path):
    row = scored(tmp_path, reference={"size": 1000, "inference_time": 0.5})[-1]
    assert row["P/size"] == pytest.approx(row["P/raw/size"] / 1000)
    assert row["P/inference_time"] == pytest.approx(row["P/raw/inference_time_ms"] / 0.5)


def test_the_baseline_is_the_model_at_fit_start(tmp_path):
    rows = scored(tmp_path)
    assert all(row["P/size"] == 1.0 for row in rows)
    assert all(0.3 < row["P/inference_time"] < 3 for row in rows)  # a clock on a busy machine; the benchmark says more


def test_a_term_of_weight_zero_is_not_measured(tmp_path):
    row = scored(tmp_path, weights={"accuracy": 1.0})[-1]
    assert not {"P/size", "P/train_time", "P/inference_time", "P/raw/inference_time_ms"} & row.keys()
    assert row["P"] == pytest.approx(1 - row["val_acc"])


def test_a_loss_stands_for_the_error(tmp_path):
    row = scored(tmp_path, accuracy="val_loss", mode="loss")[-1]
    assert row["P/error"] == pytest.approx(row["val_loss"], rel=1e-5)


@pytest.mark.parametrize(("size", "expected"), [("parameters", 1.0), ("nonzero", 0.375), ("bits", 1.0)])
def test_sizes(tmp_path, size, expected):
    row = scored(tmp_path, WeightPruning(0.8, end=0.5, every_n_steps=4), size=size)[-1]
    assert row["P/size"] == pytest.approx(expected, abs=0.001)  # (563 - 358) / 547: BatchNorm's 16 biases begin at 0


# The guard.


def test_a_model_is_infeasible_until_the_compression_ended(tmp_path):
    rows = scored(tmp_path, WeightPruning(0.5, start=10, end=17, every_n_steps=4), options={"max_epochs": 4})
    assert [row["P/feasible"] for row in rows] == [0, 0, 1, 1]
    for row in rows[:2]:
        assert row["P"] == pytest.approx(1000 * (row["P/unguarded"] + 1), rel=1e-5)
        assert math.isnan(row["P/shown"])
    assert rows[2]["P"] == rows[2]["P/unguarded"] == rows[2]["P/shown"]
    rows = scored(tmp_path, WeightPruning(0.5, start=10, end=17), until_reached="score")
    assert all(row["P/feasible"] for row in rows)


def test_min_accuracy_and_max_drop(tmp_path):
    assert all(row["P/feasible"] == 0 for row in scored(tmp_path, min_accuracy=1.0))
    assert all(row["P/feasible"] == 1 for row in scored(tmp_path, min_accuracy=0.0))

    class Destroys(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 3:
                with torch.no_grad():
                    self.net[6].weight.mul_(-50)

    rows = scored(
        tmp_path, WeightPruning(0.1, start=17, end=18), max_drop=0.2, module=new(Destroys), options={"max_epochs": 4}
    )
    assert rows[2]["P/feasible"] == 1
    assert rows[3]["val_acc"] < max(row["val_acc"] for row in rows[:2]) - 0.2
    assert rows[3]["P/feasible"] == 0


def test_the_checkpoint_kept_for_p_is_feasible_and_scores_the_same_again(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="P")
    history = History()
    module = new()
    run = fit(tmp_path, module, PerformanceScore(), WeightPruning(0.8, every_n_steps=4), best, history, max_epochs=5)
    rows = [row for row in history.rows if row["P/feasible"]]
    assert len(rows) < 5
    chosen = min(rows, key=lambda row: row["P"])
    assert float(best.best_model_score) == pytest.approx(chosen["P"])
    again = trainer(tmp_path, PerformanceScore(), WeightPruning(0.8), best)
    metrics = again.validate(new(), val_loader(), best.best_model_path, verbose=False, weights_only=True)
    assert metrics[0]["val_acc"] == chosen["val_acc"]
    assert run.callback_metrics["P"] == history.rows[-1]["P"]


# Nothing is changed by measuring.


def test_final_weights_are_the_same_with_and_without_it(tmp_path):
    """With dropout and BatchNorm from the global RNG."""
    plain, measured = new(dropout=0.5), new(dropout=0.5)
    fit(tmp_path, plain)
    fit(tmp_path, measured, PerformanceScore())
    assert_same_state(plain, measured)


def test_an_unchanged_model_scores_the_same_each_epoch(tmp_path):
    """Without its training, P of one model is one number within the noise of the clock."""

    class Wide(Classifier):
        def __init__(self):
            super().__init__(width=256)

    rows = scored(tmp_path, module=new(Wide), weights={"size": 0.4, "inference_time": 0.6}, options={"max_epochs": 6})
    values = torch.tensor([row["P"] for row in rows])
    assert values.std() / values.mean() < 0.1  # the benchmark holds the real bound; here: no drift, no jump


def test_a_resumed_run_keeps_its_baseline(tmp_path):
    words = {"weights": {"size": 1, "train_time": 1, "inference_time": 1, "accuracy": 1}}
    first = PerformanceScore(**words)
    fit(tmp_path, new(), first, WeightPruning(0.5, every_n_steps=4), Files(tmp_path / "files"), max_epochs=4)
    second, module = PerformanceScore(**words), new()
    nn.init.zeros_(module.net[0].weight)
    fit(
        tmp_path,
        module,
        second,
        WeightPruning(0.5, every_n_steps=4),
        ckpt_path=tmp_path / "files" / "1.ckpt",
        max_epochs=4,
    )
    assert second._references == first._references
    assert second._dense_accuracy == first._dense_accuracy
    assert second._epochs == 4


def test_a_new_trainer_takes_a_new_baseline(tmp_path):
    score, module = PerformanceScore(size="nonzero"), new()
    fit(tmp_path, module, score, WeightPruning(0.5, every_n_steps=4))
    dense = score._references["size"]
    fit(tmp_path, module, score, WeightPruning(0.5, every_n_steps=4))
    assert score._references["size"] < dense


# Times.


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until somebody moves it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


class Takes(pl.Callback):
    """Takes time in validation and in every batch."""

    def __init__(self, clock, validation, batch):
        self.clock, self.validation, self.batch = clock, validation, batch

    def on_validation_epoch_start(self, trainer, pl_module):
        self.clock.now += self.validation

    def on_train_batch_end(self, *_):
        self.clock.now += self.batch


def test_training_time_has_no_validation_and_no_events_in_it(tmp_path, clock):
    class SlowPruning(WeightPruning):
        def apply_event(self, trainer, pl_module):
            clock.now += 7
            super().apply_event(trainer, pl_module)

    pruning = SlowPruning(0.5, start=9, end=14, every_n_steps=1)
    rows = scored(tmp_path, Takes(clock, validation=4, batch=0.5), pruning, weights={"train_time": 1.0})
    assert [row["P/raw/train_time_s"] for row in rows] == [4.0, 4.0, 4.0]  # 8 batches
    assert pruning.event_seconds == 42


def test_the_training_time_reference_is_the_second_epoch(tmp_path, clock):
    takes = Takes(clock, validation=0, batch=1)

    class Changes(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            takes.batch = {0: 3.0, 1: 1.0, 2: 0.5}[trainer.current_epoch]

    rows = scored(tmp_path, takes, Changes(), weights={"train_time": 1.0})
    assert [row["P/train_time"] for row in rows] == [1.0, 1.0, 0.5]


def test_the_warm_up_epoch_is_the_reference_when_the_second_has_events(tmp_path, clock):
    rows = scored(tmp_path, Takes(clock, 0, 1), WeightPruning(0.5, start=9, end=10), weights={"train_time": 1.0})
    assert [row["P/train_time"] for row in rows] == [1.0, 1.0, 1.0]


def test_a_warm_up_reference_is_flagged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    scored(tmp_path, weights={"train_time": 1.0}, options={"max_epochs": 1})
    assert any("against the warm-up epoch" in record.message for record in caplog.records)


# When there is a P.


def test_an_epoch_without_validation_has_no_p(tmp_path):
    class Logged(pl.Callback):
        epochs = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.epochs.append("P" in trainer.callback_metrics)

    class First(PerformanceScore):
        logs = 0

        def _log(self, *args):
            self.logs += 1
            super()._log(*args)

    score = First()
    fit(tmp_path, new(), score, check_val_every_n_epoch=2, max_epochs=4)
    assert score.logs == 2
    score = First(every_n_epochs=3)
    fit(tmp_path, new(), score, max_epochs=6)
    assert score.logs == 2


class Expensive(Classifier):
    """Logs its accuracy in the validation of some epochs only."""

    every = 2

    def validation_step(self, batch, batch_idx):
        if self.current_epoch % self.every == 0:
            super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:PerformanceScore.*does not log it in every epoch:UserWarning")
@pytest.mark.parametrize("weights", [{"size": 1.0}, {"size": 1.0, "accuracy": 1.0}])
def test_an_accuracy_of_an_earlier_epoch_gives_no_p_and_no_feasibility(tmp_path, weights):
    rows = scored(tmp_path, module=new(Expensive), weights=weights, options={"max_epochs": 4})
    assert [row["P/feasible"] for row in rows] == [1, 0, 1, 0]
    for name in ("P", "P/unguarded", "P/raw/accuracy", "P/error"):
        assert [math.isnan(row[name]) for row in rows] == [False, True, False, True]
    assert rows[1]["val_acc"] == rows[0]["val_acc"]  # Lightning still shows the old value


def test_an_accuracy_that_is_not_logged_in_every_validation_is_said(tmp_path):
    with pytest.warns(UserWarning, match="does not log it in every epoch.*Log it in every validation"):
        scored(tmp_path, module=new(Expensive), options={"max_epochs": 2})


@pytest.mark.filterwarnings("ignore:PerformanceScore.*does not log it in every epoch:UserWarning")
def test_a_run_resumed_at_an_epoch_without_accuracy_goes_on(tmp_path):
    words = {"weights": {"size": 1.0, "accuracy": 1.0}}
    fit(tmp_path, new(Expensive), PerformanceScore(**words), Files(tmp_path / "files"), max_epochs=1)
    history = History()
    resumed = tmp_path / "files" / "0.ckpt"
    fit(tmp_path, new(Expensive), PerformanceScore(**words), history, ckpt_path=resumed, max_epochs=3)
    assert [row["P/feasible"] for row in history.rows] == [0, 1]


def test_a_metric_logged_only_in_training_is_not_a_held_out_accuracy(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"validation logged val_acc, val_loss\."):
        scored(tmp_path, accuracy="train_loss", mode="loss")


def test_a_model_whose_p_is_nan_is_infeasible(tmp_path):
    class Diverges(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float("inf"))

    with pytest.warns(UserWarning, match="P is inf at epoch 0"):
        rows = scored(tmp_path, accuracy="val_loss", mode="loss", module=new(Diverges), options={"max_epochs": 1})
    assert rows[0]["P/feasible"] == 0


@pytest.mark.parametrize("first", [True, False])
def test_monitors_see_this_epochs_p_in_any_order(tmp_path, first):
    seen = []

    class Sees(EarlyStopping):
        def _run_early_stopping_check(self, trainer):
            seen.append(float(trainer.callback_metrics["P/raw/accuracy"]))
            super()._run_early_stopping_check(trainer)

    history, stop, score = History(), Sees("P", patience=9), PerformanceScore()
    best = ModelCheckpoint(tmp_path / "best", monitor="P", save_top_k=-1)
    fit(tmp_path, new(), *([stop, score] if first else [score, stop]), best, history)
    assert seen == [row["val_acc"] for row in history.rows]


def refused(tmp_path, monitor, message, score=None, **options):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, new(), score or PerformanceScore(), monitor, **options)


def test_monitors_that_could_see_a_stale_p_are_refused_with_the_argument_to_change(tmp_path):
    best = {"monitor": "P", "dirpath": tmp_path / "best"}
    refused(tmp_path, ModelCheckpoint(**best), "val_check_interval=1.0", val_check_interval=0.5)
    words = r"save_on_train_epoch_end=True and every_n_epochs=2"
    refused(tmp_path, ModelCheckpoint(**best), words, check_val_every_n_epoch=2)
    refused(tmp_path, ModelCheckpoint(**best, every_n_epochs=2), words, check_val_every_n_epoch=2)
    words = r"every_n_epochs=6"
    refused(
        tmp_path,
        ModelCheckpoint(**best, every_n_epochs=2, save_on_train_epoch_end=True),
        words,
        PerformanceScore(every_n_epochs=3),
        check_val_every_n_epoch=2,
    )
    refused(tmp_path, EarlyStopping("P"), "check_on_train_epoch_end=True", check_val_every_n_epoch=2)
    fit(
        tmp_path,
        new(),
        PerformanceScore(),
        ModelCheckpoint(**best, every_n_epochs=2, save_on_train_epoch_end=True),
        EarlyStopping("P", check_on_train_epoch_end=True, strict=False),
        check_val_every_n_epoch=2,
        max_epochs=4,
    )
    fit(tmp_path, new(), PerformanceScore(), ModelCheckpoint(tmp_path / "x", monitor="val_acc"), val_check_interval=0.5)


# Inputs.


def test_inputs_are_caught_from_the_step_or_taken_from_the_module(tmp_path):
    class CallsNet(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    assert scored(tmp_path, module=new(CallsNet))[-1]["P/raw/inference_time_ms"] > 0

    class HasExample(Classifier):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(7, 12)

        def forward(self, x):
            if not torch.is_grad_enabled() and len(x) < 16:
                self.seen = len(x)
            return super().forward(x)

    module = new(HasExample)
    scored(tmp_path, module=module, batch_size=3)
    assert module.seen == 3
    module = new(HasExample)
    scored(tmp_path, module=module, example_inputs=torch.zeros(5, 12))
    assert module.seen == 5


def test_a_step_that_calls_two_modules_asks_for_example_inputs(tmp_path):
    class TwoParts(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net[6](self.net[:6](batch[0])), batch[1])

    with pytest.raises(ValueError, match="Pass `example_inputs`"):
        scored(tmp_path, module=new(TwoParts))


# Bad input.


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"weights": {"size": -1}}, ValueError, "non-negative numbers, got size=-1"),
        ({"weights": {"size": 0.0}}, ValueError, "all 0"),
        ({"weights": {"latency": 1}}, ValueError, "no 'latency'; known: size, train_time"),
        ({"mode": "best"}, ValueError, "`mode` must be one of 'max', 'min', 'loss'"),
        ({"reference": "dense"}, ValueError, "`reference` must be one of"),
        ({"reference": 1}, TypeError, "`reference` must be"),
        ({"reference": {"size": 1.0}}, ValueError, "lacks inference_time"),
        ({"reference": {"size": 0.0, "inference_time": 1.0}}, ValueError, "positive"),
        ({"size": "megabytes"}, ValueError, "unknown size 'megabytes'; known: bits, nonzero, parameters"),
        ({"max_drop": 5}, ValueError, "`max_drop` must be a fraction"),
        ({"min_accuracy": -1}, ValueError, "`min_accuracy` must be a fraction"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be a whole number"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs`"),
        ({"until_reached": "never"}, ValueError, "`until_reached`"),
        ({"accuracy": 3}, TypeError, "name of a logged metric"),
    ],
)
def test_bad_arguments_raise_at_once(words, error, message):
    with pytest.raises(error, match=message):
        PerformanceScore(**words)


def test_an_accuracy_that_is_not_logged_names_what_was_before_the_first_step(tmp_path):
    module = new()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"validation logged val_acc, val_loss"):
        scored(tmp_path, module=module, accuracy="accuracy", options={"num_sanity_val_steps": 1})
    assert_same_state(module, before)
    with pytest.raises(MisconfigurationException, match=r"validation logged .*val_acc"):
        scored(tmp_path, accuracy="accuracy")


def test_an_accuracy_in_percent_is_refused(tmp_path):
    class Percent(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 93.5)

    with pytest.raises(ValueError, match=r"an accuracy is in \[0, 1\], got 93.5"):
        scored(tmp_path, module=new(Percent))


def test_an_accuracy_that_is_nan_makes_p_nan_and_warns(tmp_path):
    class Nan(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", float("nan"))

    with pytest.warns(UserWarning, match="P is nan at epoch 0"):
        rows = scored(tmp_path, module=new(Nan), options={"max_epochs": 1})
    assert math.isnan(rows[0]["P"])


def test_barebones_is_refused_with_the_reason(tmp_path):
    with pytest.raises(MisconfigurationException, match="barebones=True\\) logs nothing"):
        fit(tmp_path, new(), PerformanceScore(), barebones=True)


def test_the_final_table_has_baseline_best_and_last(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    scored(tmp_path, WeightPruning(0.5, start=10, end=12), options={"max_epochs": 4})
    table = next(r.message for r in caplog.records if "PerformanceScore, lower is better" in r.message)
    for words in ("baseline", "best", "last", "inference time", "feasible"):
        assert words in table


def test_it_is_released_after_an_exception(tmp_path):
    class Fails(Classifier):
        def validation_step(self, batch, batch_idx):
            raise KeyError("boom")

    score = PerformanceScore()
    module = new(Fails)
    with pytest.raises(KeyError, match="boom"):
        fit(tmp_path, module, score)
    assert score._inference.reference is None
    assert not module._forward_pre_hooks


def test_a_second_fit_works(tmp_path):
    score, module = PerformanceScore(), new()
    run = fit(tmp_path, module, score, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(module, train_loader(), val_loader())
    assert score._epochs == 2


def test_a_run_without_any_validation_says_that_there_was_no_p(tmp_path):
    with pytest.warns(UserWarning, match="PerformanceScore computed no P: no epoch was validated"):
        fit(tmp_path, new(), PerformanceScore(), limit_val_batches=0)


def test_fast_dev_run(tmp_path):
    rows = scored(tmp_path, WeightPruning(0.5), options={"fast_dev_run": True})
    assert rows[0]["P/feasible"] == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    class Cast(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.net[0].weight.dtype)).float()

    best = CompressedCheckpoint(tmp_path / "best", monitor="P")
    score = PerformanceScore(size="bits")
    run = fit(tmp_path, new(Cast), score, WeightPruning(0.5, every_n_steps=4), best, precision=precision)
    assert math.isfinite(run.callback_metrics["P"])
    half = {"bf16-true": 0.5, "64-true": 2.0}.get(precision, 1.0)
    assert run.callback_metrics["P/raw/size"] == 563 * half
    assert best.best_model_path


# What a review found.


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (lambda p: ModelCheckpoint(p, monitor="P", every_n_train_steps=3), "not by every_n_train_steps"),
        (lambda p: ModelCheckpoint(p, monitor="P", save_on_train_epoch_end=False), "save_on_train_epoch_end=True"),
        (lambda p: EarlyStopping("P", check_on_train_epoch_end=False), "check_on_train_epoch_end=True"),
    ],
)
def test_moments_at_which_p_is_stale_are_refused(tmp_path, monitor, message):
    refused(tmp_path, monitor(tmp_path), message)


def test_validation_every_batch_is_refused_beside_a_monitor(tmp_path):
    refused(tmp_path, ModelCheckpoint(tmp_path, monitor="P"), r"val_check_interval=1\.0", val_check_interval=1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_given_inputs_follow_the_precision(tmp_path, precision):
    rows = scored(tmp_path, example_inputs=torch.zeros(1, 12), options={"precision": precision})
    assert math.isfinite(rows[-1]["P"])


def test_buffers_that_forward_writes_and_logs_in_forward_are_left_out_of_it(tmp_path):
    class Counts(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.log("norm", x.norm())
            return super().forward(x)

    plain, measured = new(Counts), new(Counts)
    fit(tmp_path, plain)
    run = fit(tmp_path, measured, PerformanceScore())
    assert_same_state(plain, measured)
    assert run.callback_metrics["P/inference_time"] < 2
    assert "log" not in measured.__dict__


def test_a_nan_accuracy_does_not_lower_the_floor(tmp_path):
    class Sometimes(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", [0.9, float("nan"), 0.5][self.current_epoch])

    with pytest.warns(UserWarning, match="P is nan"):
        rows = scored(tmp_path, max_drop=0.01, module=new(Sometimes))
    assert [row["P/feasible"] for row in rows] == [1, 0, 0]
