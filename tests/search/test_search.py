"""A whole search: proposals, objectives, budgets, failures, early stops, and what the report says."""

import json
import re

import optuna
import pytest
import torch
from search_worker import SPACE, Net, accuracy, dataset, make_trainer, run

from lightning_optim import Recipe, compare, search
from lightning_optim.report.columns import ENGINES
from lightning_optim.search import SearchReport, Trial
from lightning_optim.search.objectives import Limit, Objective, objectives_of
from lightning_optim.search.stopping import Rule


@pytest.fixture(scope="module")
def found():
    return run(trials=5, seed=3)


def test_trial_0_is_the_dense_model_and_the_others_are_what_compare_says(found):
    dense, *others = found.trials
    assert dense.dense
    assert dense.recipe == Recipe()
    assert not any(trial.dense for trial in others)
    assert dense.values["nonzero"] == sum(parameter.numel() for parameter in Net().parameters())
    for trial in others:
        model = made_by_hand(trial.recipe)
        assert trial.values["accuracy"] == accuracy(model)
        row = compare({"a": model}, torch.zeros(1, 8), export=False, times=False, progress_bar=False)["a"]
        assert trial.values["nonzero"] == row["nonzero"] == trial.row["nonzero"]


def made_by_hand(recipe):
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    pl.seed_everything(3, workers=True, verbose=False)
    net = Net()
    trainer = make_trainer(recipe.callbacks())
    trainer.fit(net, DataLoader(dataset(), 32, shuffle=True), DataLoader(dataset(), 160))
    return net.eval()


def test_the_same_seed_proposes_the_same(found):
    again = run(trials=5, seed=3)
    assert again.as_plain()["trials"][3]["arguments"] == found.trials[3].arguments
    assert [trial.values for trial in again.trials] == [trial.values for trial in found.trials]
    other = run(trials=3, seed=4)
    assert other.trials[1].arguments != found.trials[1].arguments


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(trials=2)
    assert torch.equal(torch.rand(3), expected)


def test_the_front_and_the_best(found):
    front = found.front
    for one in front:
        for other in found.trials:
            beaten = (
                other.values["accuracy"] >= one.values["accuracy"] and other.values["nonzero"] <= one.values["nonzero"]
            )
            assert not beaten or other.values == one.values
    most = max(trial.values["accuracy"] for trial in found.trials)
    assert found.best(accuracy=f">={most}").values["accuracy"] == most
    assert found.best(nonzero=10**9).values["accuracy"] == most
    smallest = found.best(accuracy=0.0)
    assert smallest.values["nonzero"] == min(trial.values["nonzero"] for trial in found.trials)
    assert found.best(accuracy=0.0, nonzero="<=1e9").values["accuracy"] == most, "the first objective decides"
    with pytest.raises(ValueError, match="accuracy and nonzero are both open"):
        found.best()
    with pytest.raises(ValueError, match=r"no trial has accuracy >= 1\.1; the nearest is"):
        found.best(accuracy=">=1.1")
    with pytest.raises(ValueError, match="no 'latency'; measured: accuracy, nonzero"):
        found.best(latency=1)
    with pytest.raises(ValueError, match="must be a number or a bound"):
        found.best(accuracy="high")


def test_the_report_is_a_table_a_page_and_plain_values(found, tmp_path):
    page = found.to_html(tmp_path / "search.html")
    assert (tmp_path / "search.html").read_text() == page
    assert page.count("<svg") == 3, "front, parallel coordinates, importance"
    chosen = found.chosen()
    assert "<script" not in page
    assert f"The recipe of {chosen.label}" in page
    code = re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]
    assert f"sparsity: {chosen.recipe.weight_pruning['sparsity']}" in code
    assert "front of accuracy and nonzero" in page
    assert "5 trials" in str(found)
    assert "<iframe" in found._repr_html_()
    assert found.plot().axes[0].get_ylabel() == "accuracy"
    again = SearchReport.from_plain(json.loads(json.dumps(found.as_plain())))
    assert again == found
    assert sum(found.importances["nonzero"].values()) == pytest.approx(1)
    found.write(tmp_path)
    assert Recipe.load(tmp_path / "best.yaml") == chosen.recipe
    assert "```yaml" in (tmp_path / "report.md").read_text()


def test_a_second_call_goes_on_and_another_study_is_refused(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    first = run(storage, trials=2)
    second = run(storage, trials=3)
    assert second.trials[:2] == first.trials
    assert len(second.trials) == 3
    other = {"weight_pruning": {"sparsity": (0.2, 0.9)}}
    with pytest.raises(ValueError, match="study 'search' with another space"):
        run(storage, trials=3, space=other)
    with pytest.raises(ValueError, match=r"another objectives|of other objectives"):
        run(storage, trials=3, objectives=("accuracy",))
    assert len(run(storage, trials=1, space=other, name="other").trials) == 1
    foreign = optuna.create_study(storage=storage, study_name="foreign", directions=["minimize"] * 2)
    foreign.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(ValueError, match="that `search` did not make"):
        run(storage, name="foreign", objectives=("nonzero", "bits"))
    with pytest.raises(ValueError, match="must be the URL of a database"):
        run("study.db")
    with pytest.raises(ValueError, match="cannot be opened"):
        run("sqlite:////no/such/folder/study.db")


def test_a_trial_that_raises_is_recorded_and_the_search_goes_on():
    made = 0

    def trainer(callbacks):
        nonlocal made
        made += 1
        if made == 3:
            raise ValueError("no trainer today\nsecond line")
        return make_trainer(callbacks)

    with pytest.warns(UserWarning, match="trial 2 failed and the search goes on: no trainer today"):
        report = run(trainer=trainer, trials=4)
    assert [trial.state for trial in report.trials] == ["complete", "complete", "fail", "complete"]
    assert report.trials[2].error == "ValueError: no trainer today"
    assert report.trials[2].arguments
    assert "trial 2 failed: ValueError: no trainer today" in str(report).replace("\n", " ")


def test_without_the_dense_model_there_is_nothing_to_compare_with():
    def trainer(callbacks):
        raise ValueError("never")

    with pytest.raises(RuntimeError, match=r"the dense model failed.*never"):
        run(trainer=trainer)


def test_one_objective_under_a_budget():
    report = run(objectives=("nonzero",), budget={"accuracy": ">=0.6"}, trials=8)
    best = report.best()
    kept = [trial for trial in report.trials if trial.values["accuracy"] >= 0.6]
    assert best.values["nonzero"] == min(trial.values["nonzero"] for trial in kept)
    assert all(trial.feasible == (trial in kept) for trial in report.trials)
    assert [trial.values["nonzero"] for trial in report.front] == [best.values["nonzero"]]
    assert "accuracy >= 0.6" in str(report)
    assert report.to_html().count("<svg") == 3
    impossible = run(objectives=("nonzero",), budget={"accuracy": ">=1.5"}, trials=1)
    assert impossible.front == []
    with pytest.raises(ValueError, match=r"no trial is complete and keeps the budget accuracy >= 1\.5"):
        impossible.best()


def test_times_come_with_their_ranges(monkeypatch):
    report = run(objectives=("accuracy", "latency"), trials=2, comparison={"engines": ["torch"], "batch_size": None})
    dense, other = report.trials
    assert dense.values["latency"] == 1.0
    low, high = other.intervals["latency"]
    assert low == other.row["torch_low"] <= other.values["latency"] <= other.row["torch_high"] == high
    assert ENGINES["torch"] in report.columns()[3].title


@pytest.mark.slow
def test_files_and_integer_engines_are_objectives_too():
    pytest.importorskip("onnxruntime")
    report = run(
        space={"quantization": [True, {"weight_granularity": "per_tensor"}]},
        objectives=("accuracy", "file", "latency"),
        trials=3,
    )
    assert {trial.state for trial in report.trials} == {"complete"}
    assert report.trials[1].values["file"] == report.trials[1].row["onnx_bytes"] > 0


def test_metrics_of_ones_own_have_a_direction():
    def evaluate(model):
        return {"accuracy": accuracy(model), "error": 1 - accuracy(model), "error_std": 0.1}

    report = run(evaluate=evaluate, objectives={"error": "min", "nonzero": "min"}, trials=2, budget={"accuracy": 0.0})
    trial = report.trials[1]
    assert trial.values["error"] == pytest.approx(1 - trial.values["accuracy"])
    assert trial.intervals["error"] == pytest.approx((trial.values["error"] - 0.1, trial.values["error"] + 0.1))


def trial(number, accuracy, bits, width=0.0):
    intervals = {"accuracy": (accuracy - width, accuracy + width), "bits": (bits, bits)}
    return Trial(number, "complete", {"accuracy": accuracy, "bits": bits}, intervals)


def test_trials_within_the_noise_are_equal_and_the_front_says_so():
    objectives = objectives_of(("accuracy", "bits"), "torch", "accuracy")
    trials = [trial(0, 0.9, 100, 0.01), trial(1, 0.895, 100, 0.01), trial(2, 0.85, 100, 0.01), trial(3, 0.8, 50, 0.01)]
    report = SearchReport(objectives, trials)
    assert [each.number for each in report.front] == [0, 1, 3], "2 is beaten beyond the noise, 1 is not"
    assert [each.number for each in report.equals(trials[0])] == [1]
    assert "2 of 3 trials on the front equal another one" in str(report).replace("\n", " ")
    exact = SearchReport(objectives, [trial(0, 0.9, 100), trial(1, 0.895, 100)])
    assert [each.number for each in exact.front] == [0]


# Early stops.


def finished(curve, size, study):
    row = {"parameters": size, "nonzero": size, "bits": size}
    study.add_trial(
        optuna.trial.create_trial(
            values=[0.0, 0.0], user_attrs={"curve": {str(k): v for k, v in curve.items()}, "row": row}
        )
    )


def test_a_trial_is_judged_by_those_that_are_no_larger():
    study = optuna.create_study(directions=["maximize", "minimize"])
    for place in range(5):
        finished({1: 0.5 + 0.1 * place, 2: 0.5 + 0.1 * place}, 100 + place, study)
    rule = Rule(study, n_startup=5)
    large, small = (
        dict.fromkeys(("parameters", "nonzero", "bits"), 200),
        dict.fromkeys(("parameters", "nonzero", "bits"), 50),
    )
    assert rule.is_hopeless({1: 0.65}, large), "the median is 0.7"
    assert not rule.is_hopeless({1: 0.75}, large)
    assert not rule.is_hopeless({1: 0.1}, small), "nothing so small is known"
    assert Rule(study, n_startup=5, by_size=False).is_hopeless({1: 0.65}, small)
    assert Rule(study, 5, "min", by_size=False).is_hopeless({1: 0.75}, small)
    assert not Rule(study, n_startup=6).is_hopeless({1: 0.65}, large)


@pytest.mark.slow
def test_hopeless_trials_stop_early():
    """Random criterion at the same sparsity: the larger half of the trials by accuracy goes on."""
    epochs = []

    def trainer(callbacks):
        made = make_trainer(callbacks, max_epochs=5)
        epochs.append(made)
        return made

    space = {"weight_pruning": {"sparsity": 0.9, "start": 0.05, "end": [0.1, 0.15, 0.2, 0.25], "criterion": "random"}}
    report = run(trainer=trainer, space=space, trials=9, n_startup=4, stop_early=True)
    stopped = [trial for trial in report.trials if trial.state == "pruned"]
    assert stopped
    for each in stopped:
        assert epochs[each.number].current_epoch < 5
        assert not each.values
    assert "stopped early" in str(report)
    logged = run(trainer=trainer, space=space, trials=9, n_startup=4, stop_early=True, monitor="val_acc")
    assert [each.state for each in logged.trials] == [each.state for each in report.trials], "the same accuracy"


def test_a_monitor_that_nothing_logs_is_named():
    with pytest.raises(RuntimeError, match="`monitor` is 'acc', and validation logged val_acc"):
        run(stop_early=True, monitor="acc", trials=1)


# Loggers, Trainers, teachers.


def test_loggers_get_arguments_and_results(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    loggers = []

    def trainer(callbacks):
        loggers.append(CSVLogger(tmp_path))
        return make_trainer(callbacks, logger=loggers[-1])

    report = run(trainer=trainer, trials=2)
    last = report.trials[1]
    folder = tmp_path / "lightning_logs" / "version_1"
    assert str(last.arguments["weight_pruning.sparsity"]) in (folder / "hparams.yaml").read_text()
    assert f"{last.values['nonzero']}" in (folder / "metrics.csv").read_text()


def test_a_trainer_may_be_made_without_callbacks_and_may_not_drop_them():
    report = run(trainer=lambda: make_trainer([]), trials=2)
    assert report.trials[1].values["nonzero"] < report.trials[0].values["nonzero"]
    with pytest.raises(RuntimeError, match=r"its Trainer has no .*Pass them on"):
        run(trainer=lambda callbacks: make_trainer([]), trials=1)
    with pytest.raises(RuntimeError, match="`make_trainer` must return a Trainer, got NoneType"):
        run(trainer=lambda: None, trials=1)
    with pytest.raises(RuntimeError, match="`make_module` must return a LightningModule, got int"):
        run(make_module=lambda: 1, trials=1)


def test_a_teacher_and_the_checkpoint_of_the_recipe(tmp_path):
    space = {
        "weight_pruning": (0.3, 0.6),
        "distillation": {"alpha": (0.1, 0.9)},
        "checkpoint": {"monitor": "val_acc", "mode": "max", "dirpath": str(tmp_path)},
    }

    def trainer(callbacks):
        return make_trainer(callbacks, enable_checkpointing=True)

    report = run(trainer=trainer, space=space, trials=2, teacher=Net())
    assert report.trials[1].state == "complete", report.trials[1].error
    assert report.trials[1].recipe.distillation["alpha"] == report.trials[1].arguments["distillation.alpha"]
    with pytest.raises(ValueError, match="there is no `teacher`"):
        run(space=space)
    with pytest.raises(ValueError, match="no `distillation`, and a teacher was given"):
        run(teacher=Net())


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objectives": ("accuracy", "speed")}, ValueError, "'speed', which is no column of `compare`"),
        ({"objectives": ()}, ValueError, "`objectives` is empty"),
        ({"objectives": "bits"}, TypeError, "must be a list of names"),
        ({"objectives": ("file", "onnx_bytes")}, ValueError, "names 'file' twice"),
        ({"objectives": {"bits": "max"}}, ValueError, "'bits', which is always minimized"),
        ({"objectives": {"recall": "up"}}, ValueError, "must be"),
        ({"budget": {"speed": 1}}, ValueError, "`budget` has 'speed'"),
        ({"budget": {"latency": "fast"}}, ValueError, "`budget` of latency must be a number or a bound"),
        ({"budget": 3}, TypeError, "`budget` must be a mapping"),
        ({"noise": {"latency": 1}}, ValueError, "'latency', which is not searched for"),
        ({"noise": {"accuracy": -1}}, ValueError, "`noise` of accuracy"),
        ({"trials": 0}, ValueError, "`trials`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"name": ""}, TypeError, "`name`"),
        ({"evaluate": None}, TypeError, "`evaluate` must be a function"),
        ({"comparison": {"reference": "a"}}, ValueError, "`comparison` has no 'reference'"),
        (
            {"comparison": {"export": False}, "objectives": ("file",)},
            ValueError,
            "an objective needs the exported file",
        ),
        ({"datamodule": object()}, ValueError, "not both"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(options, error, message):
    def never(callbacks):
        raise AssertionError

    with pytest.raises(error, match=message) as caught:
        run(trainer=never, **options)
    assert "\n" not in str(caught.value)


def test_without_optuna_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(sys.modules["lightning_optim.search.run"], "_is_installed", lambda package: package != "optuna")
    with pytest.raises(ImportError, match=r"lightning-optim\[search\]"):
        search(space=SPACE, make_module=Net, make_trainer=make_trainer, evaluate=accuracy)


def test_limits_say_by_how_much_they_are_broken():
    objective = Objective("latency", "torch_ratio", "min", "t")
    assert Limit(objective, 0.5, at_least=False).excess(0.7) == pytest.approx(0.2)
    assert Limit(objective, 0.5, at_least=True).excess(0.7) == pytest.approx(-0.2)
