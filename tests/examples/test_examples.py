"""The example scripts as a user runs them, in their short form."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import digits
import recommender
from reporting import Column, Report

MEASURED = {"milliseconds", "latency", "latency_low", "latency_high", "P", "onnx_ms", "onnx_latency", "onnx_P"}
"""What a clock has a part in; all else repeats."""


def repeatable(rows):
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def check_report(folder: Path, rows, figures: int):
    """One self-contained page, and Markdown whose figures lie beside it."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == figures
    assert set(re.findall(r'(?:src|href)="([^":;,]*)', page)) == {"data"}
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(links) == figures
    assert all((folder / link).is_file() for link in links)
    for row in rows:
        assert f"<td>{row['name']}</td>" in page
        assert f"| {row['name']} |" in markdown


@pytest.fixture(scope="module")
def digits_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return digits.main(["--fast", "--report", str(folder)]), folder


def test_digits_prunes_what_it_says_and_says_that_masks_give_no_speed(digits_rows):
    rows, folder = digits_rows
    dense, eighty, ninety, two_of_four, at_random = rows[:5]
    selected = 13 * 9 * (1 + 13 + 13) + 26 * 9 * (13 + 26 + 26)  # all convolutions; not norms, nor the last layer
    others = dense["parameters"] - selected
    for row, kept in ((eighty, 0.2), (ninety, 0.1)):
        assert row["nonzero"] == pytest.approx(kept * selected + others, abs=1)
    padded = 13 * 3  # of nine weights the last stands in a group of its own in the first layer's rows, and so on
    assert two_of_four["nonzero"] == pytest.approx(0.5 * selected + others, abs=10 * padded)
    assert {row["parameters"] for row in (eighty, ninety, two_of_four, at_random)} == {dense["parameters"]}
    assert dense["accuracy"] > 0.95
    assert ninety["bytes"] < eighty["bytes"] < two_of_four["bytes"] < dense["bytes"]
    assert ninety["P"] < eighty["P"] < dense["P"]
    check_report(folder, rows, figures=6)
    assert "Masks give no speed on dense kernels" in (folder / "report.md").read_text(encoding="utf-8")


def test_digits_loses_channels_for_real_and_trains_a_control_of_the_same_size(digits_rows):
    rows, folder = digits_rows
    dense, halved, small = rows[0], rows[5], rows[6]
    assert (halved["kind"], small["kind"]) == ("pruned", "control")
    # Of 13 + 13 + 26 + 26 channels half are gone, wherever they rank lowest: all layers halved leave 5,432.
    assert 0.2 * dense["parameters"] < halved["parameters"] < 0.4 * dense["parameters"]
    assert halved["nonzero"] == halved["parameters"]
    assert small["parameters"] == pytest.approx(halved["parameters"], rel=0.15)
    assert halved["accuracy"] > 0.85
    assert halved["P"] < dense["P"]
    expected = 0.4 * small["nonzero"] / dense["nonzero"] + 0.6 * small["latency"] + 0.1 * (1 - small["val_acc"])
    assert small["P"] == pytest.approx(expected)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert f"the nets that lost some take {halved['latency']:.2f} times as long" in markdown


def test_digits_exports_integers_that_answer_the_same(digits_rows):
    rows, folder = digits_rows
    by_name = {row["name"]: row for row in rows}
    integers = [row for row in rows if row["kind"] == "integer"]
    assert len(integers) == 3
    for row in integers:
        assert row["integer_kernels"] == row["kernels"] == 7
        assert row["onnx_agreement"] >= 0.995
    assert by_name["dense"]["integer_kernels"] == 0
    assert by_name["int8, after training"]["accuracy"] == pytest.approx(by_name["dense"]["accuracy"], abs=0.01)
    assert by_name["int8, after training"]["onnx_bytes"] < 0.75 * by_name["dense"]["onnx_bytes"]
    assert "Rounding to 8 bits after training moved" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_digits_gives_the_same_numbers_again(digits_rows, tmp_path):
    rows, _ = digits_rows
    assert repeatable(digits.main(["--fast", "--report", str(tmp_path)])) == repeatable(rows)


@pytest.mark.slow
def test_digits_averages_over_seeds(tmp_path):
    rows = digits.main(["--fast", "--seeds", "2", "--report", str(tmp_path)])
    assert all(0 <= row["accuracy_std"] < 0.2 for row in rows)
    assert "±" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shop_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    return recommender.main(["--synthetic", "--report", str(folder)]), folder


def test_recommender_learns_the_structure_of_the_generated_shop(shop_rows):
    rows, folder = shop_rows
    by_name = {row["name"]: row for row in rows}
    popular = by_name["popularity, last 30 days"]
    for name in ("small", "small, 80 % zeros", "small, half of every width"):
        assert by_name[name]["recall"] > 2 * popular["recall"]
        assert by_name[name]["new_recall"] > 3 * popular["new_recall"]
    dense, pruned = by_name["small"], by_name["small, 80 % zeros"]
    assert pruned["new_recall"] > 1.2 * by_name["small, 80 % at random"]["new_recall"]
    assert dense["feasible"] == 1
    width, hidden, items = 64, 128, (dense["parameters"] - 64 * 128 * 2 - 128 - 64 - 128 - 9) // 129
    selected = 2 * width * items + 2 * width * hidden  # both tables and both matrices; not biases, norm and terms
    assert pruned["nonzero"] == pytest.approx(0.2 * selected + dense["parameters"] - selected, abs=1 + hidden)
    assert pruned["P"] < dense["P"]
    check_report(folder, rows, figures=8)


def test_recommender_loses_the_same_channels_in_every_layer_of_a_group(shop_rows):
    rows, _ = shop_rows
    by_name = {row["name"]: row for row in rows}
    dense, halved = by_name["small"], by_name["small, half of every width"]
    scratch = by_name["the same shape from scratch"]
    items = (dense["parameters"] - 64 * 128 * 2 - 128 - 64 - 128 - 9) // 129
    # Both tables, the biases of the items, both matrices with their biases, the norm, the three added terms.
    assert halved["parameters"] == 2 * 32 * items + items + 2 * 32 * 64 + 64 + 32 + 2 * 32 + 9
    assert halved["nonzero"] > 0.99 * halved["parameters"]
    assert scratch["parameters"] == halved["parameters"]
    assert halved["P"] < dense["P"]


def check_rounded(by_name):
    """Integer rows rank like the float row each was made from, in PyTorch and in the file."""
    for name, source in (
        ("small, int8 tables", "small"),
        ("small, half of every width, int8", "small, half of every width"),
    ):
        rounded, of = by_name[name], by_name[source]
        assert rounded["kind"] == "integer"
        for metric in ("recall", "ndcg", "new_recall", "new_ndcg", "val_new_recall"):
            assert rounded[metric] == pytest.approx(of[metric], abs=0.01), (name, metric)
        assert rounded["onnx_agreement"] >= 0.99
        assert rounded["onnx_bytes"] < 0.5 * of["onnx_bytes"]
        expected = 0.6 * rounded["onnx_latency"] + 0.1 * (1 - rounded["val_new_recall"])
        assert rounded["onnx_P"] - expected < of["onnx_P"] - 0.6 * of["onnx_latency"]  # fewer bits


def test_recommender_exports_integers_that_rank_the_same(shop_rows):
    rows, folder = shop_rows
    by_name = {row["name"]: row for row in rows}
    check_rounded(by_name)
    dense, halved = by_name["small"], by_name["small, half of every width"]
    tables, everything = by_name["small, int8 tables"], by_name["small, half of every width, int8"]
    assert [row["integer_kernels"] for row in (dense, halved, tables)] == [0, 0, 0]
    assert (everything["integer_kernels"], everything["kernels"]) == (3, 4)  # float: the factors of the added terms
    assert everything["onnx_bytes"] <= 0.40 * halved["onnx_bytes"]
    width, items = 64, (dense["parameters"] - 64 * 128 * 2 - 128 - 64 - 128 - 9) // 129
    saved = 2 * items * (3 * width - 4)  # of two tables, less one scale for each row
    assert dense["onnx_bytes"] - tables["onnx_bytes"] == pytest.approx(saved, rel=0.05)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Rounded after training, each against the float32 row it was made from. small, int8 tables: recall" in text
    assert "small, 4-bit" not in text


def test_a_taught_recommender_is_the_small_one_and_not_its_teacher(shop_rows):
    rows, _ = shop_rows
    by_name = {row["name"]: row for row in rows}
    taught, scratch = by_name["the same shape, taught by small"], by_name["the same shape from scratch"]
    assert taught["kind"] == "distilled"
    assert taught["parameters"] == scratch["parameters"]
    assert taught["recall"] != scratch["recall"]
    assert taught["recall"] > 0.95 * scratch["recall"]


@pytest.mark.slow
def test_recommender_gives_the_same_numbers_again(shop_rows, tmp_path):
    rows, _ = shop_rows
    assert repeatable(recommender.main(["--synthetic", "--report", str(tmp_path)])) == repeatable(rows)


@pytest.mark.slow
def test_recommender_runs_on_some_customers_of_the_real_file(retail_file, tmp_path):
    rows = recommender.main(["--fast", "--data", str(retail_file), "--report", str(tmp_path)])
    by_name = {row["name"]: row for row in rows}
    dense, popular = by_name["small"], by_name["popularity, last 30 days"]
    assert dense["recall"] > 2 * popular["recall"]
    assert dense["new_recall"] > popular["new_recall"]
    assert by_name["small, 80 % zeros"]["recall"] > 0.95 * dense["recall"]
    check_rounded(by_name)
    check_report(tmp_path, rows, figures=8)


def test_a_missing_file_ends_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["recommender.py", "--data", str(tmp_path / "absent.csv")])
    with pytest.raises(SystemExit, match=r"^error: there is no Online Retail file at .*doi:10\.24432/C5BW33.*--synth"):
        runpy.run_path(recommender.__file__, run_name="__main__")


def test_data_and_synthetic_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        recommender.main(["--synthetic", "--data", "x.csv"])
    assert "exclude each other" in capsys.readouterr().err


def test_a_wide_table_is_printed_in_parts_that_begin_with_the_name(capsys):
    keys = [f"c{n:02}" for n in range(30)]
    columns = [Column("name", "model"), *(Column(key, f"title of {key}", begins_part=key == "c05") for key in keys)]
    some = {"name": "some", "kind": "dense", **dict.fromkeys(keys, 123_456)}
    few = {"name": "few", "kind": "baseline", "c00": 1}

    def printed(count):
        Report("title", "summary", columns[: count + 1], [some, few]).print()
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 200
        return " ".join(lines)

    wide, narrow = printed(30), printed(10)
    assert [wide.count(f" {key} ") for key in keys] == [1] * 30
    assert wide.count(" model ") == wide.count(" some ") == 3  # broken before c05, and where the width ends
    assert wide.count(" few ") == 1  # it has nothing in the other parts
    assert narrow.count(" model ") == 1


def test_a_report_escapes_what_it_is_given():
    row = {"name": "<b>", "kind": "dense"}
    page = Report("a & b", "c < d", [Column("name", "model"), Column("P", "P")], [row], ["e > f"]).to_html()
    for text in ("a &amp; b", "c &lt; d", "e &gt; f", "<td>&lt;b&gt;</td><td>-</td>"):
        assert text in page
