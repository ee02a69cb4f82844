"""The digits example as a user runs it, in its short form."""

import json

import pytest

import digits
from lightning_optim.demo import DigitsData
from lightning_optim.export.session import ExportedModel


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return digits.main(["--fast", "--report", str(folder)]), folder


@pytest.mark.slow
def test_every_stage_makes_it_smaller_and_it_still_reads(run):
    report, _ = run
    names = [digits.TEACHER, "distilled", "+ channels", "+ weights", "+ int8"]
    large, distilled, channels, weights, deployed = (report[name] for name in names)
    assert distilled["parameters"] < large["parameters"]
    assert channels["parameters"] < 0.6 * distilled["parameters"]
    assert weights["parameters"] == channels["parameters"]
    assert weights["nonzero"] < 0.7 * channels["nonzero"]
    assert deployed["nonzero"] == weights["nonzero"]
    assert deployed["integer_kernels"] == deployed["kernels"] == 7
    assert large["integer_kernels"] == 0
    assert deployed["onnx_bytes"] < weights["onnx_bytes"] == channels["onnx_bytes"] < large["onnx_bytes"]
    assert deployed["bits"] < 0.3 * weights["bits"]
    assert all(row["accuracy"] > 0.85 for row in report.rows)
    assert all(row["onnx_agreement"] >= 0.99 for row in report.rows)


@pytest.mark.slow
def test_the_controls_are_there(run):
    report, _ = run
    assert [row["name"] for row in report.rows if row["kind"] == "control"] == [
        digits.SCRATCH,
        digits.RANDOM,
        digits.SAME_SIZE,
    ]
    assert report[digits.SCRATCH]["parameters"] == report["distilled"]["parameters"]
    assert report[digits.SAME_SIZE]["parameters"] == pytest.approx(report["+ int8"]["parameters"], rel=0.2)
    assert report[digits.RANDOM]["nonzero"] == pytest.approx(report["+ int8"]["nonzero"], rel=0.2)


@pytest.mark.slow
def test_the_report_and_the_deployed_file_are_written(run):
    report, folder = run
    page = (folder / "report.html").read_text()
    assert "from a large net to a small int8 file" in page
    for row in report.rows:
        assert row["name"] in page
    assert json.loads((folder / "report.json").read_text())["reference"] == digits.TEACHER
    assert (
        "PerformanceScore" in (folder / "run" / "report.md").read_text() or (folder / "run" / "report.html").is_file()
    )
    images, labels = DigitsData().splits["test"][:]
    scores = ExportedModel(folder / "digits.onnx")(images)
    assert float((scores.argmax(1) == labels).float().mean()) == pytest.approx(report["+ int8"]["accuracy"], abs=0.01)


@pytest.mark.slow
def test_seeds_are_averaged(tmp_path):
    report = digits.main(["--fast", "--seeds", "2", "--report", str(tmp_path)])
    assert all(0 <= row["accuracy_std"] < 0.2 for row in report.rows)
    assert "±" in (tmp_path / "report.md").read_text()
