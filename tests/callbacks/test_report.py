"""ReportCallback: what it collects, writes and hands to loggers, whatever stands beside it."""

import importlib.util
import json
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from helpers.models import Classifier, Files, Quiet, fit, new, train_loader, val_loader
from helpers.toy import Narrow
from lightning_optim import ChannelPruning, PerformanceScore, QuantizationAwareTraining, ReportCallback, WeightPruning

pytestmark = pytest.mark.usefixtures("empty_pictures")  # not of the module's run, ``told``


def all_techniques():
    return [
        ChannelPruning(0.5, start=2, end=10, events=2),
        WeightPruning(0.6, start=4, end=16, every_n_steps=6),
        QuantizationAwareTraining(start=12, observe_steps=4, freeze=20),
        PerformanceScore("val_acc"),
    ]


def read(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


TIMED = ("P", "P/unguarded", "P/shown", "P/inference_time", "P/raw/inference_time_ms")


def untimed(found):
    epochs = [{name: value for name, value in epoch.items() if name not in TIMED} for epoch in found["epochs"]]
    return {**found, "epochs": epochs}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The callback stands first: what the others log comes after it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    fit(folder, new(), ReportCallback(folder / "report", title="A <title>"), *all_techniques(), Files(folder))
    return folder


def test_it_reports_target_and_achieved_value(told):
    found = read(told / "report")
    assert [line.split(":")[0] for line in found["asked_and_reached"]] == [
        "ChannelPruning",
        "WeightPruning",
        "QuantizationAwareTraining",
    ]
    for name in ("report.html", "report.md"):
        assert "WeightPruning: asked 60.00% zeros" in (told / "report" / name).read_text(encoding="utf-8")
    page = (told / "report" / "report.html").read_text(encoding="utf-8")
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert {"Layers", "Events", "Logged in the last epoch"} <= {
        part.split("<")[0] for part in page.split('<section class="section"><h2>')[1:]
    }
    assert not list((told / "report").glob(".*"))


def test_every_epoch_has_what_was_logged_behind_it(told):
    epochs = read(told / "report")["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    for epoch in epochs:
        assert {"P", "P/size", "P/error", "val_acc", "train_loss", "channels/parameters"} <= epoch.keys()
    assert epochs[0]["P/size"] == 1.0 or epochs[0]["P/size"] == epochs[0]["channels/parameters"]
    assert epochs[-1]["P/size"] == pytest.approx(epochs[-1]["channels/parameters"])
    assert epochs[-1]["pruning/sparsity"] == pytest.approx(0.6, abs=0.01)


def test_events_have_their_step_and_numbers(told):
    events = read(told / "report")["events"]
    of = {name: [event for event in events if event["callback"] == name] for name in {e["callback"] for e in events}}
    assert [event["step"] for event in of["WeightPruning"]] == [4, 10, 16]
    assert [event["step"] for event in of["ChannelPruning"]] == [2, 6, 10]
    assert [event["step"] for event in of["QuantizationAwareTraining"]] == [12, 16, 20]
    assert [event["quantization/phase"] for event in of["QuantizationAwareTraining"]] == [1, 2, 3]
    asked = [event["pruning/asked"] for event in of["WeightPruning"]]
    assert asked == sorted(asked)
    assert asked[-1] == pytest.approx(0.6)


def test_layers_at_the_end_stand_beside_those_at_the_start(told):
    found = read(told / "report")
    start, end = ({facts["layer"]: facts for facts in found[when]["layers"]} for when in ("start", "end"))
    assert start.keys() == end.keys() == {"net.0", "net.4", "net.6"}
    assert sum(end[name]["width"] for name in ("net.0", "net.4")) == 16  # of 32
    assert [facts["bits"] for facts in end.values()] == [8.0] * 3
    assert {facts["bits"] for facts in start.values()} == {32.0}
    assert end["net.4"]["sparsity"] > 0.3
    assert found["end"]["parameters"] < found["start"]["parameters"]


ELSEWHERE = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning"  # Lightning compares state keys, which hold the folder
)


@ELSEWHERE
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_tells_the_whole_run(told, tmp_path, epoch):
    callbacks = [ReportCallback(tmp_path / "report", title="A <title>"), *all_techniques()]
    fit(tmp_path, new(), *callbacks, ckpt_path=told / f"{epoch}.ckpt")
    assert untimed(read(tmp_path / "report")) == untimed(read(told / "report"))


def test_a_file_from_the_middle_of_an_epoch_goes_on_too(told, tmp_path):
    whole, callbacks = tmp_path / "whole", [ReportCallback(tmp_path / "whole"), *all_techniques()]
    fit(tmp_path, new(), *callbacks, Files(tmp_path, every_n_steps=12))
    state = torch.load(tmp_path / "step12.ckpt", weights_only=True)["callbacks"][callbacks[0].state_key]
    assert [epoch["epoch"] for epoch in state["epochs"]] == [0]
    assert [event["step"] for event in state["events"]] == [2, 4, 6, 10, 10, 12]
    assert untimed(read(whole)) == untimed({**read(told / "report"), "title": "A run of Classifier"})


def test_the_place_in_the_list_does_not_matter(told, tmp_path):
    fit(tmp_path, new(), *all_techniques(), ReportCallback(tmp_path / "report", title="A <title>"))
    assert untimed(read(tmp_path / "report")) == untimed(read(told / "report"))


def test_alone_and_without_validation_it_tells_what_it_can(tmp_path):
    fit(tmp_path, new(), ReportCallback(tmp_path / "report"), limit_val_batches=0)
    found = read(tmp_path / "report")
    assert found["asked_and_reached"] == found["events"] == []
    assert found["start"]["parameters"] == found["end"]["parameters"]
    assert [epoch.keys() for epoch in found["epochs"]] == [{"epoch", "train_loss"}] * 3
    assert (tmp_path / "report" / "report.html").is_file()


def test_an_epoch_has_the_metrics_that_it_logged_itself(tmp_path):
    class Expensive(Classifier):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch != 1:
                super().validation_step(batch, batch_idx)

    fit(tmp_path, new(Expensive), ReportCallback(tmp_path / "report"), WeightPruning(0.5, start=2, end=6))
    epochs = read(tmp_path / "report")["epochs"]
    assert ["val_acc" in epoch for epoch in epochs] == [True, False, True]
    assert [epoch["pruning/asked"] for epoch in epochs] == [0.5] * 3  # of the event in the first: it still holds


def test_an_unknown_technique_is_reported_too(tmp_path):
    fit(tmp_path, new(), Narrow(start=4), ReportCallback(tmp_path / "report"))
    found = read(tmp_path / "report")
    assert found["asked_and_reached"] == ["Narrow: done."]
    assert [event["step"] for event in found["events"]] == [4]


def test_a_second_fit_of_the_same_trainer_goes_on_and_one_of_a_new_trainer_begins(tmp_path):
    module, callback = new(), ReportCallback(tmp_path / "report")
    run = fit(tmp_path, module, callback, WeightPruning(0.5, start=2, end=6), max_epochs=2)
    first = read(tmp_path / "report")
    run.fit_loop.max_epochs = 3
    run.fit(module, train_loader(), val_loader())
    longer = read(tmp_path / "report")
    assert [epoch["epoch"] for epoch in longer["epochs"]] == [0, 1, 2]
    assert longer["start"] == first["start"]
    fit(tmp_path, module, callback, max_epochs=1)
    fresh = read(tmp_path / "report")
    assert [epoch["epoch"] for epoch in fresh["epochs"]] == [0]
    assert fresh["start"]["nonzero"] < first["start"]["nonzero"]


@pytest.mark.filterwarnings("ignore:.*barebones.*:UserWarning")
@pytest.mark.parametrize("words", [{"fast_dev_run": True}, {"barebones": True}])
def test_short_and_bare_runs_do_not_fail(tmp_path, words, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, new(Quiet), ReportCallback(tmp_path / "report"), WeightPruning(0.5), **words)
    assert (tmp_path / "report").exists() == ("barebones" in words)


def test_a_missing_matplotlib_is_said_before_the_run(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_optim.callbacks.report.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r'matplotlib is not installed.*pip install "lightning-optim\[report\]"'):
        fit(tmp_path, new(), ReportCallback(tmp_path / "report"))


def test_it_is_pickled_after_a_fit(tmp_path):
    callback = ReportCallback(tmp_path / "report")
    fit(tmp_path, new(), callback, max_epochs=1)
    assert pickle.loads(pickle.dumps(callback)).state_dict() == callback.state_dict()


def test_an_exception_leaves_no_report_and_the_next_fit_begins_anew(tmp_path):
    class Failing(Classifier):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                raise RuntimeError("stop")

    callback = ReportCallback(tmp_path / "report")
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, new(Failing), callback)
    assert not (tmp_path / "report").exists()
    fit(tmp_path, new(), callback, max_epochs=1)
    assert len(read(tmp_path / "report")["epochs"]) == 1


# Loggers.


class Recorder:
    """Notes which of its methods are called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **words: self.calls.append((name, args, words))

    def named(self, name):
        return [(args, words) for called, args, words in self.calls if called == name]


def fake(cls):
    """Make a logger of a class without its package: everything it is asked to log is noted."""

    class Fake(cls):
        name, version, run_id, save_dir, root_dir, log_dir = "name", "version", "run", None, "root", "logs"

        def __init__(self):
            Logger.__init__(self)
            self.recorder = Recorder()

        experiment = property(lambda self: self.recorder)

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, *args, **words):
            pass

        def log_graph(self, *args, **words):
            pass

        def log_table(self, *args, **words):
            self.recorder.log_table(*args, **words)

        def log_image(self, *args, **words):
            self.recorder.log_image(*args, **words)

        def save(self):
            pass

        def finalize(self, status):
            pass

        def after_save_checkpoint(self, callback):
            pass

    return Fake()


def test_loggers_get_table_and_figures_where_they_have_a_place(tmp_path, caplog):
    board, wandb, mlflow, csv = (fake(cls) for cls in (TensorBoardLogger, WandbLogger, MLFlowLogger, CSVLogger))
    callbacks = [ReportCallback(tmp_path / "report"), PerformanceScore("val_acc"), WeightPruning(0.5, start=2, end=6)]
    with caplog.at_level(logging.DEBUG, logger="lightning_optim.callbacks.report"):
        fit(tmp_path, new(), *callbacks, logger=[board, wandb, mlflow, csv])
    figures = {path.stem for path in (tmp_path / "report").glob("*.svg")}
    assert {"P_unguarded", "P_size", "layers", "sparsity"} <= figures

    ((tag, text, step), _), *_ = board.recorder.named("add_text")
    assert (tag, step) == ("report", 24)
    assert text == (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert {args[0] for args, _ in board.recorder.named("add_figure")} == {f"report/{name}" for name in figures}

    ((args, words),) = wandb.recorder.named("log_table")
    assert args == ("report",)
    assert [row[0] for row in words["data"]] == ["at fit start", "at fit end"]
    assert len(words["columns"]) == len(words["data"][0])
    assert {args[0] for args, _ in wandb.recorder.named("log_image")} == {f"report/{name}" for name in figures}

    assert {args[2] for args, _ in mlflow.recorder.named("log_text")} == {"report/report.md", "report/report.html"}
    assert {args[2] for args, _ in mlflow.recorder.named("log_figure")} == {f"report/{name}.png" for name in figures}
    assert {args[0] for args, _ in mlflow.recorder.named("log_figure")} == {"run"}

    assert csv.recorder.calls == []
    assert "Fake cannot show tables and figures" in caplog.text


def test_log_false_gives_loggers_nothing(tmp_path):
    board = fake(TensorBoardLogger)
    fit(tmp_path, new(), ReportCallback(tmp_path / "report", log=False), logger=board, max_epochs=1)
    assert not board.recorder.named("add_text")


def test_tensorboard_accepts_the_report(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path / "logs")
    fit(tmp_path, new(), ReportCallback(tmp_path / "report"), logger=logger, max_epochs=1)
    assert list((tmp_path / "logs").rglob("events*"))


def test_a_module_without_layers_to_draw_is_reported(tmp_path):
    class Flat(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.ModuleList()
            self.scale = torch.nn.Parameter(torch.ones(12))

        def forward(self, x):
            return (x * self.scale)[:, :3]

    fit(tmp_path, new(Flat), ReportCallback(tmp_path / "report"), max_epochs=1)
    assert read(tmp_path / "report")["end"]["layers"] == []


def test_only_rank_zero_writes(tmp_path):
    callback = ReportCallback(tmp_path / "report")
    run = fit(tmp_path, new(), max_epochs=1)
    other = SimpleNamespace(is_global_zero=False, callbacks=[])
    callback.on_fit_end(other, run.lightning_module)
    assert not (tmp_path / "report").exists()


# Folders.


def test_a_folder_that_cannot_be_one_is_said_before_training(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below" / "it"):
        with pytest.raises(NotADirectoryError, match=r"`dirpath` must be a folder, got .*file.* is a file\. Give"):
            fit(tmp_path, new(Untrained), ReportCallback(folder))
    assert file.read_text() == "mine"


def test_a_folder_that_refuses_is_said_before_training(tmp_path, monkeypatch):
    def refuse(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"can be written to, got .*report.* refuses: .*Permission denied\. Give"):
        fit(tmp_path, new(Untrained), ReportCallback(tmp_path / "new" / "report"))
    ReportCallback(tmp_path / "report").setup(SimpleNamespace(is_global_zero=False), None, "fit")
    ReportCallback(tmp_path / "report").setup(SimpleNamespace(is_global_zero=True), None, "validate")


class Untrained(Classifier):
    """May not be trained."""

    def training_step(self, *args):
        raise AssertionError("it was trained")


def test_a_report_that_cannot_be_made_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    fit(tmp_path, new(), ReportCallback(folder), max_epochs=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(value):
        raise RuntimeError("cannot be told")

    monkeypatch.setattr("lightning_optim.callbacks.report.as_json", fail)
    with pytest.raises(RuntimeError, match="cannot be told"):
        fit(tmp_path, new(), ReportCallback(folder, title="other"), max_epochs=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_reports_of_one_run_are_kept_and_resumed_apart(tmp_path):
    def reports():
        return [ReportCallback(tmp_path / "a" / "report"), ReportCallback(tmp_path / "b" / "report", title="b")]

    fit(tmp_path, new(), *reports(), Files(tmp_path), max_epochs=1)
    assert (read(tmp_path / "a" / "report")["title"], read(tmp_path / "b" / "report")["title"]) == (
        "A run of Classifier",
        "b",
    )
    fit(tmp_path, new(), *reports(), max_epochs=2, ckpt_path=tmp_path / "0.ckpt")
    assert [len(read(tmp_path / name / "report")["epochs"]) for name in "ab"] == [2, 2]


@ELSEWHERE
def test_a_file_from_before_the_key_held_the_folder_is_resumed(tmp_path):
    callback = ReportCallback(tmp_path / "report")
    fit(tmp_path, new(), callback, Files(tmp_path), max_epochs=1)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    saved["callbacks"]["ReportCallback"] = saved["callbacks"].pop(callback.state_key)
    torch.save(saved, tmp_path / "old.ckpt")
    fit(tmp_path, new(), ReportCallback(tmp_path / "new"), max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert [epoch["epoch"] for epoch in read(tmp_path / "new")["epochs"]] == [0, 1]


def test_a_logger_that_raises_is_named_and_the_others_get_theirs(tmp_path):
    broken, board = fake(TensorBoardLogger), fake(TensorBoardLogger)
    broken.recorder.add_text = lambda *args: 1 / 0
    with pytest.warns(
        UserWarning, match=r"Fake did not accept the report \(ZeroDivisionError: division by zero\)\. The"
    ):
        fit(tmp_path, new(), ReportCallback(tmp_path / "report"), logger=[broken, board], max_epochs=1)
    assert (tmp_path / "report" / "report.json").is_file()
    assert board.recorder.named("add_text")


def test_metrics_whose_names_are_alike_in_a_file_have_a_figure_each(tmp_path):
    class Alike(Classifier):
        def on_train_epoch_end(self):
            self.log_dict({"val/a": 1.0, "val_a": 2.0})

    fit(tmp_path, new(Alike), ReportCallback(tmp_path / "report"), max_epochs=1)
    assert {"val_a.svg", "val_a_2.svg"} <= {path.name for path in (tmp_path / "report").iterdir()}
