import pytest

from lightning_optim.report import ComparisonReport
from lightning_optim.report.verdict import tells_apart, verdict


def row(name, kind="compressed", **values):
    times = {
        f"onnxruntime{suffix}_{key}": value for suffix, found in values.pop("times", {}).items() for key, value in found
    }
    return {"name": name, "kind": kind, **values, **times}


def time(ratio, differs=True):
    return [("ratio", ratio), ("differs", differs)]


DENSE = row("dense", "dense", accuracy=0.92, onnx_bytes=1000, times={"": time(1.0, False), "_batch": time(1.0, False)})


def report(*rows, **words):
    return ComparisonReport("dense", ["torch", "onnxruntime"], 32, rows=[DENSE, *rows], **words)


def test_smaller_faster_and_within_the_noise():
    small = row("small", accuracy=0.916, onnx_bytes=100, times={"": time(0.5), "_batch": time(0.98, False)})
    assert verdict(report(small, samples=719)) == [
        "small: 10.0 times smaller, 2.0 times faster at one row and as fast at 32 rows in ONNX Runtime, accuracy -0.4 "
        "points (not told apart from that of dense with 719 samples)."
    ]


def test_larger_and_slower_are_called_so():
    worse = row("worse", accuracy=0.5, onnx_bytes=2000, times={"": time(1.5), "_batch": time(3.0)})
    (sentence,) = verdict(report(worse, samples=719))
    assert "2.0 times larger, 1.5 times slower at one row and 3.0 times slower at 32 rows" in sentence
    assert "accuracy -42.0 points (told apart from that of dense with 719 samples)" in sentence


def test_the_spread_over_runs_is_the_noise_where_there_are_several():
    small = row("small", accuracy=0.90, accuracy_std=0.001, onnx_bytes=999)
    dense = {**DENSE, "accuracy_std": 0.001}
    found = ComparisonReport("dense", [], 32, rows=[dense, small], seeds=3, samples=10)
    assert verdict(found) == ["small: as large, accuracy -2.0 points (told apart from that of dense with 3 runs)."]


def test_controls_baselines_and_the_reference_have_none():
    assert verdict(report(row("scratch", "control", accuracy=0.9), row("counts", "baseline", accuracy=0.9))) == []


def test_a_metric_beyond_1_has_no_points():
    rows = [{**DENSE, "loss": 10.0}, row("small", loss=12.5)]
    found = ComparisonReport("dense", [], 32, rows=rows, accuracy="loss", samples=100)
    assert verdict(found) == ["small: loss +2.5."]


@pytest.mark.parametrize(("samples", "apart"), [(None, None), (100, False), (100_000, True)])
def test_more_samples_tell_more_apart(samples, apart):
    assert tells_apart({"a": 0.91}, {"a": 0.92}, "a", seeds=1, samples=samples) is apart


def test_it_comes_first_everywhere():
    small = row("small <b>", accuracy=0.916, onnx_bytes=100)
    found = report(small)
    (sentence,) = found.verdict()
    assert sentence in str(found).replace("\n", " ")
    assert f"**{sentence}**".replace("<b>", "&lt;b&gt;") in found.to_markdown()
    page = found.as_document().to_html()
    assert page.index("small &lt;b&gt;: 10.0 times smaller") < page.index("<table")
    assert "<b>" not in page


def test_p_of_the_deployed_engine_comes_first():
    rows = [{**DENSE, "P": 1.0, "torch_P": 1.0, "onnxruntime_P": 1.0}]
    titles = [column.title for column in ComparisonReport("dense", ["torch", "onnxruntime"], 32, rows=rows).columns()]
    assert titles.index("P by ONNX Runtime") < titles.index("P by PyTorch")
