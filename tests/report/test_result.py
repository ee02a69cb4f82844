"""ComparisonReport: the forms it is read in, and the mean of several."""

import builtins
import json
import math

import pandas
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from helpers.compared import report
from lightning_optim import ComparisonReport
from lightning_optim.report import document
from lightning_optim.report.columns import Column, markdown_table


def test_a_difference_within_the_noise_is_called_none():
    found = report(ratio=1.02)
    assert "1.02 [1.01, 1.03] no difference" in str(found)
    assert "0.50 [0.49, 0.51]" in str(report(ratio=0.5))
    assert "0.50 [0.49, 0.51] no difference" not in str(report(ratio=0.5))
    assert any("within 0.05 of 1" in sentence for sentence in found.reading())


def test_the_table_is_as_wide_as_the_terminal():
    console = Console(width=70)
    with console.capture() as capture:
        console.print(report())
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 70
    assert sum(" model " in line for line in lines) > 3
    assert sum(line.startswith("Time of a call in PyTorch") for line in lines) == 1
    assert report().table().renderables


def test_markdown_has_a_table_for_each_part_and_the_notes():
    text = report().to_markdown()
    assert text.startswith("# Models compared")
    assert "| half &lt;b&gt; | 0.9000 | 0.500 |" in text
    assert "**Time of a call in PyTorch**" in text
    assert "- one & only" in text
    assert text.count("| word counts |") == 1  # it has no size and no time


def test_json_goes_round(tmp_path):
    found = report()
    found.save(tmp_path / "a.json")
    assert ComparisonReport.load(tmp_path / "a.json") == found
    found.rows[0]["torch_ms"] = float("nan")
    assert json.loads(found.to_json())["rows"][0]["torch_ms"] is None


@pytest.mark.parametrize("text", ["[1]", '{"rows": []}', '{"reference": "a", "engines": [], "rows": [], "more": 1}'])
def test_another_json_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no comparison that ComparisonReport\.save wrote"):
        ComparisonReport.load(path)


def test_dataframe_has_a_row_per_model():
    frame = report().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.set_index("name").loc["dense", "parameters"] == 1000


def test_a_missing_pandas_is_named(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        report().to_dataframe()


def test_mean_of_seeds():
    mean = ComparisonReport.mean([report(0.8, 0.9), report(0.9, 0.7)])
    row = mean["half <b>"]
    assert row["accuracy"] == pytest.approx(0.85)
    assert row["accuracy_std"] == pytest.approx(0.0707, abs=1e-4)
    assert row["torch_ratio"] == pytest.approx(0.8)
    assert (row["torch_low"], row["torch_high"], row["torch_differs"]) == (
        pytest.approx(0.69),
        pytest.approx(0.91),
        True,
    )
    assert mean.seeds == 2
    assert mean.notes == ["one & only"]
    assert mean.layers["half <b>"][0]["width"] == 16
    assert "0.8500 ± 0.071" in str(mean)
    assert mean["word counts"]["accuracy"] == pytest.approx(0.7)
    assert ComparisonReport.mean([report()])["dense"] == report()["dense"]


def test_seeds_that_disagree_about_being_faster_show_no_difference():
    row = ComparisonReport.mean([report(ratio=0.8), report(ratio=1.05)])["half <b>"]
    assert row["torch_ratio"] == pytest.approx(0.925)
    assert row["torch_differs"] is False


def test_mean_refuses_other_rows_and_nothing():
    other = report()
    other.add_row("more", accuracy=0.1)
    with pytest.raises(ValueError, match="reports of the same rows"):
        ComparisonReport.mean([report(), other])
    with pytest.raises(ValueError, match="`reports` is empty"):
        ComparisonReport.mean([])


def test_added_rows_bring_their_metrics():
    found = report()
    found.add_row("other", kind="control", recall=0.3, parameters=3)
    assert found.metrics == ["accuracy", "recall"]
    with pytest.raises(ValueError, match="a row 'other' already"):
        found.add_row("other")
    with pytest.raises(TypeError, match="plain numbers and text, got list for 'x'"):
        found.add_row("third", x=[1])
    with pytest.raises(KeyError, match="no row is called 'absent'; there are dense"):
        found["absent"]


def test_plot_draws_a_scatter_for_size_and_one_for_time():
    figure = report().plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2


def test_files_of_a_report(tmp_path):
    page = report().write(tmp_path / "new")
    assert page == tmp_path / "new" / "report.html"
    assert ComparisonReport.load(tmp_path / "new" / "report.json") == report()
    assert not list((tmp_path / "new").glob(".*"))
    text = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert "(pareto_size.svg)" in text
    assert (tmp_path / "new" / "pareto_size.svg").is_file()


@pytest.mark.parametrize("name", ["a[int8]", "x[/red]", "[bold]x"])
def test_names_with_brackets_are_shown_as_they_are(name):
    found = report()
    found.reference = name
    found.metrics.append(f"{name}!")
    found.engines = [*found.engines, name]
    found.rows[0].update({"name": name, f"{name}!": 0.5, f"{name}_ms": 1.0, f"{name}_ratio": 1.0})
    text = "".join(letter for letter in str(found) if letter not in "\n│ ")
    assert text.count(name) > 4
    assert f"{name}!" in text
    assert f"Timeofacallin{name}" in text


def test_a_row_with_text_or_nothing_in_it_is_shown(tmp_path):
    found = report()
    found.add_row("text", accuracy="n/a", parameters="many", bits=None, torch_ratio="fast", torch_low=0.1, nonzero=None)
    found.add_row("made", kind="compressed", accuracy="n/a", bytes="small", onnx_bytes="small", torch_ratio="fast")
    found.add_row("kernels", kernels=3, integer_kernels=None, accuracy=0.5, accuracy_std="?", torch_ratio=0.5)
    text = found.to_markdown()
    assert "| text | n/a | - |" in text
    assert "| many | - | - |" in text
    assert "| - of 3 |" in text
    assert "0.5000 ± ?" in text
    assert "fast" in str(found)
    found.write(tmp_path)


def test_markdown_cells_hold_neither_tags_nor_line_breaks():
    (line,) = markdown_table([Column("name", "model")], [{"name": "a|b\n<i>c & d"}])[2:]
    assert line == r"| a\|b &lt;i&gt;c &amp; d |"
    found = report()
    found.title = "two\nlines <i>"
    assert found.to_markdown().startswith("# two lines &lt;i&gt;\n")


# Files.


@pytest.mark.usefixtures("empty_pictures")
@pytest.mark.parametrize("broken", ["to_markdown", "to_html"])
def test_a_report_that_cannot_be_made_leaves_the_one_before(tmp_path, monkeypatch, broken):
    report().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self):
        raise RuntimeError("cannot be drawn")

    monkeypatch.setattr(document.Report, broken, fail)
    with pytest.raises(RuntimeError, match="cannot be drawn"):
        report(accuracy=0.1).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("empty_pictures")
def test_json_that_cannot_be_made_leaves_the_report_before(tmp_path, monkeypatch):
    report().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(ComparisonReport, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(accuracy=0.1).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [ComparisonReport.save, ComparisonReport.to_html])
def test_a_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    path.write_text("before")

    def full(self, content):
        open(self, "wb").close()
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr("pathlib.Path.write_text", lambda self, text, **words: full(self, text))
    with pytest.raises(OSError, match="no space left"):
        write(report(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


# Means of what is not whole.


@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_one_seed_lacks_numbers_of_is_averaged_over_the_others(first):
    whole, part = report(0.8, 0.9), report(0.9, 0.7)
    for key in [key for key in part["half <b>"] if key.startswith("torch_") or key == "onnx_bytes"]:
        del part["half <b>"][key]
    part["half <b>"].update({"P": None, "accuracy": math.nan})
    mean = ComparisonReport.mean([whole, part] if first else [part, whole])
    row = mean["half <b>"]
    assert (row["accuracy"], row["P"], row["onnx_bytes"], row["torch_ratio"]) == (0.8, 0.9, 2500, 0.9)
    assert (row["torch_low"], row["torch_high"], row["torch_differs"]) == (0.89, 0.91, True)
    assert "accuracy_std" not in row
    (note,) = [note for note in mean.notes if note.startswith("half <b>: means over 1 of 2 runs")]
    assert all(f" {key}" in note for key in ("accuracy", "P", "onnx_bytes", "torch_ms"))
    assert str(mean)


def test_a_metric_of_one_seed_only_is_kept():
    more = report()
    more["dense"]["recall"] = 0.25
    more.metrics.append("recall")
    mean = ComparisonReport.mean([report(), more])
    assert mean.metrics == ["accuracy", "recall"]
    assert mean["dense"]["recall"] == 0.25
    assert "dense: means over 1 of 2 runs, which alone have it: recall." in mean.notes


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_values_that_are_no_finite_numbers_do_not_stop_a_mean(value):
    runs = [report(), report(), report()]
    for run in runs[:2]:
        run["half <b>"]["accuracy"] = value
    runs[1]["half <b>"]["accuracy"] = -math.inf if value == math.inf else value
    mean = ComparisonReport.mean(runs)["half <b>"]
    assert "accuracy_std" not in mean
    assert mean["accuracy"] == 0.9 or math.isnan(mean["accuracy"])


def test_a_mean_of_means_is_refused():
    mean = ComparisonReport.mean([report(), report()])
    with pytest.raises(ValueError, match=r"of one run each, got a mean over 2\. Pass the single-seed reports"):
        ComparisonReport.mean([mean, report()])


@pytest.mark.parametrize(
    ("name", "value"),
    [("reference", "scratch"), ("engines", ["onnxruntime"]), ("batch_size", None), ("accuracy", "f1"), ("weights", {})],
)
def test_reports_of_other_kinds_are_not_averaged(name, value):
    other = report()
    setattr(other, name, value)
    with pytest.raises(ValueError, match=rf"`reports` must have the same {name}, got .* and .*\. Average"):
        ComparisonReport.mean([report(), other])


@pytest.mark.parametrize("reports", [report(), [report(), "b"]])
def test_a_mean_is_of_a_list_of_reports(reports):
    with pytest.raises(TypeError, match="`reports` must be a list of ComparisonReport"):
        ComparisonReport.mean(reports)
