"""ComparisonReport: the forms it is read in, and the mean of several."""

import builtins
import json

import pandas
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from helpers.compared import report
from lightning_optim import ComparisonReport


def test_a_difference_within_the_noise_is_called_none():
    found = report(ratio=1.02)
    assert "1.02 [1.01, 1.03] no difference" in str(found)
    assert "0.50 [0.49, 0.51]" in str(report(ratio=0.5))
    assert "0.50 [0.49, 0.51] no difference" not in str(report(ratio=0.5))
    assert any("nearer to 1 than 0.05" in sentence for sentence in found.reading())


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
    assert "| half <b> | 0.9000 | 0.500 |" in text
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
