"""compare: what it measures, what it leaves alone, what it refuses."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from helpers.compared import CLASSES, FEATURES, inputs, models, net
from lightning_optim import compare
from lightning_optim.export.runtimes import RUNTIMES
from lightning_optim.functional.score import DEFAULT_WEIGHTS, Terms, performance_score
from lightning_optim.measure.latency import LatencyResult

DENSE_PARAMETERS = 32 * FEATURES + 32 + 64 + 32 * CLASSES + CLASSES


class Unexportable(nn.Module):
    """Calls what torch.export cannot follow."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) if float(x.detach().numpy().sum()) < math.inf else x


def evaluate(module):
    assert not module.training
    assert not torch.is_grad_enabled()
    torch.rand(1)
    return {"accuracy": 0.5, "loss": float(module(inputs()).square().mean())}


@pytest.fixture(scope="module")
def compared():
    nets = {**models(), "odd": Unexportable()}
    nets["dense"][3].eval()  # a flag of its own
    before = {name: ({k: v.clone() for k, v in m.state_dict().items()}, flags(m)) for name, m in nets.items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    report = compare(
        nets,
        inputs(),
        evaluate=evaluate,
        batch_size=8,
        engines=["torch", "onnxruntime", "openvino"],
        controls=["odd"],
        export={"inputs": inputs(), "least_agreement": 0.8},
        progress_bar=False,
    )
    assert torch.equal(torch.get_rng_state(), random)
    return report, nets, before


def flags(module):
    return [layer.training for layer in module.modules()]


@pytest.mark.slow
def test_models_are_left_as_they_were(compared):
    _, nets, before = compared
    for name, (weights, training) in before.items():
        assert flags(nets[name]) == training
        assert all(torch.equal(value, weights[key]) for key, value in nets[name].state_dict().items()), name


def test_counts_sizes_and_operations(compared):
    report, nets, _ = compared
    dense, pruned, rounded = (report[name] for name in ("dense", "pruned", "rounded"))
    assert [row["kind"] for row in report.rows] == ["dense", "compressed", "compressed", "control"]
    assert dense["parameters"] == DENSE_PARAMETERS
    assert pruned["parameters"] == sum(p.numel() for p in nets["pruned"].parameters()) < DENSE_PARAMETERS
    assert dense["macs"] == FEATURES * 32 + 32 * CLASSES  # of one row
    assert rounded["bits"] == pytest.approx(DENSE_PARAMETERS - 0.75 * 32 * (FEATURES + CLASSES))
    assert pruned["size_ratio"] == pruned["parameters"] / DENSE_PARAMETERS
    assert pruned["bytes"] < dense["bytes"]
    assert pruned["onnx_bytes"] < dense["onnx_bytes"]
    assert (dense["integer_kernels"], rounded["integer_kernels"]) == (0, 2)


def test_times_stand_in_every_engine_beside_their_range(compared):
    report, _, _ = compared
    for name in ("dense", "pruned", "rounded"):
        for key in (f"{engine}{part}" for engine in report.engines for part in ("", "_batch")):
            row = {word: report[name][f"{key}_{word}"] for word in ("ms", "ratio", "low", "high", "differs")}
            assert row["ms"] > 0
            assert row["low"] <= row["high"]
            inside = row["low"] <= 1 <= row["high"]
            assert row["differs"] == (abs(row["ratio"] - 1) >= 0.05 and not inside)
    assert all(report["dense"][f"{engine}_ratio"] == 1.0 for engine in report.engines)


@pytest.mark.parametrize(("low", "high", "shown"), [(0.9, 0.95, (0.9, 1.0)), (1.1, 1.2, (1.0, 1.2)), (0.9, 1.1, None)])
def test_the_range_of_the_reference_holds_its_ratio(monkeypatch, low, high, shown):
    time = LatencyResult(1.0, 1.0, ratio=(low + high) / 2, low=low, high=high)
    monkeypatch.setattr(
        "lightning_optim.report.comparison.latencies",
        lambda models, batches, **words: [[time] * len(models)] * len(batches),
    )
    report = quick()
    row = report["a"]
    assert (row["torch_ratio"], row["torch_differs"]) == (1.0, False)
    assert (row["torch_low"], row["torch_high"]) == (shown or (low, high))
    assert (report["b"]["torch_low"], report["b"]["torch_high"]) == (low, high)
    assert any(
        "of the model against itself at another place, widened to include 1" in sentence
        for sentence in report.reading()
    )


def test_p_is_that_of_the_formula_against_the_reference(compared):
    report, _, _ = compared
    assert report["dense"]["P"] == pytest.approx(0.4 + 0.6 + 0.1 * 0.5)
    row = report["pruned"]
    for engine in report.engines:
        terms = Terms(size=row["size_ratio"], inference_time=row[f"{engine}_ratio"], error=0.5)
        assert row[f"{engine}_P"] == pytest.approx(performance_score(terms, DEFAULT_WEIGHTS))
    assert row["P"] == row["torch_P"]


def test_what_cannot_be_exported_is_in_the_notes_with_the_reason(compared):
    report, _, _ = compared
    (note,) = [note for note in report.notes if note.startswith("odd was not exported")]
    assert "numpy" in note
    assert "onnx_bytes" not in report["odd"]
    assert report["odd"]["torch_ms"] > 0
    assert any("timed in float" in note for note in report.notes)


@pytest.mark.slow
def test_a_reference_that_cannot_be_exported_leaves_no_times_in_engines():
    nets = {"odd": Unexportable(), "a": net()}
    report = quick(nets, engines=["torch", "onnxruntime"], export={})
    assert report["a"]["onnx_bytes"] > 0
    assert "onnxruntime_ms" not in report["a"]
    assert report.notes[-1].endswith("The others cannot be compared in engines either.")


@pytest.mark.slow
def test_an_engine_that_refuses_a_file_is_in_the_notes(monkeypatch):
    def refuse(path):
        raise RuntimeError("no kernel for it")

    monkeypatch.setitem(RUNTIMES._functions, "openvino", refuse)
    report = quick(engines=["onnxruntime", "openvino"], export={})
    assert report["a"]["onnxruntime_ms"] > 0
    assert "openvino_ms" not in report["a"]
    assert any("a has no times in openvino, which cannot load its file: no kernel for it" in n for n in report.notes)


def test_layers_say_width_and_bits(compared):
    report, _, _ = compared
    hidden, last = report.layers["pruned"]
    assert (hidden["layer"], hidden["type"], last["layer"]) == ("0", "Linear", "4")
    assert hidden["width"] < 32
    assert last["width"] == CLASSES
    assert [facts["bits"] for facts in report.layers["rounded"]] == [8.0, 8.0]


def quick(nets=None, example=None, **words):
    words = {"engines": ["torch"], "export": False, "progress_bar": False, **words}
    return compare(nets or {"a": net(), "b": net(8)}, inputs() if example is None else example, **words)


def test_without_an_accuracy_there_is_no_p_unless_it_has_no_weight():
    report = quick()
    assert report["b"]["P"] is None
    assert "P includes accuracy: pass `evaluate`, or weights without accuracy." in report.notes
    row = quick(weights={"size": 1.0})["b"]
    assert row["P"] == row["size_ratio"]


def test_another_reference_and_a_size_of_ones_own():
    report = quick(reference="b", size=lambda module: 7.0, weights={"size": 2.0})
    assert (report.reference, report["b"]["kind"], report["a"]["kind"]) == ("b", "dense", "compressed")
    assert report["a"]["P"] == 2.0


@pytest.mark.slow
def test_inputs_by_keyword_and_as_they_are():
    class Named(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = net(width)

        def forward(self, features, shift):
            return self.net(features) + shift.sum()

    example = {"shift": torch.ones(3), "features": inputs()}  # dimension 0 differs: rows cannot be cut
    nets = {"a": Named(32), "b": Named(8)}
    export = {"dynamic_batch": False}
    report = quick(nets, example, batch_size=None, engines=["torch", "onnxruntime"], export=export)
    assert report["b"]["onnxruntime_ms"] > 0
    assert "torch_batch_ms" not in report["b"]


@pytest.mark.slow
def test_a_file_of_one_batch_size_is_timed_with_that():
    report = quick(batch_size=48, engines=["onnxruntime"], export={"dynamic_batch": False})
    assert "onnxruntime_batch_ms" in report["a"]
    assert "onnxruntime_ms" not in report["a"]
    assert report["a"]["P"] is None


def test_the_file_is_weighed_also_where_only_torch_is_timed():
    report = quick(export=None)
    assert report["b"]["onnx_bytes"] < report["a"]["onnx_bytes"]
    assert not any(key.startswith("onnxruntime") for key in report["a"])
    assert any("No model was exported" in note for note in quick().notes)


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"reference": "c"}, ValueError, "`reference` names 'c', which is not a model; the models are a, b"),
        ({"controls": ["c"]}, ValueError, "`controls` names 'c'"),
        ({"engines": ["tensorrt"]}, ValueError, "unknown engine 'tensorrt'; known: torch, onnxruntime, openvino"),
        ({"engines": "torch"}, TypeError, "`engines` must be a list"),
        ({"engines": []}, ValueError, "`engines` is empty"),
        ({"engines": ["openvino"]}, ValueError, "export=False writes none"),
        ({"weights": {"train_time": 1.0}}, ValueError, "compare does not train"),
        ({"weights": {"speed": 1.0}}, ValueError, "has no 'speed'; known: size"),
        ({"weights": {"size": -1.0}}, ValueError, "non-negative numbers, got size=-1.0"),
        ({"evaluate": lambda module: 95.0}, ValueError, r"accuracy of a is 95, .* Divide percent by 100"),
        ({"evaluate": lambda module: {"top1": 0.5}}, ValueError, "returned top1, but P needs the metric"),
        (
            {"evaluate": lambda module: {"accuracy": 0.5, "P": 1}},
            ValueError,
            "returned 'P', which is a column of the report",
        ),
        ({"nets": {"a": 3}}, TypeError, "must be name -> nn.Module, got int for 'a'"),
        ({"size": "weight"}, ValueError, "unknown size 'weight'"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be a whole number >= 1, got 0"),
        ({"batch_size": 2.0}, ValueError, "`batch_size` must be a whole number >= 1, got 2.0"),
        ({"samples": 0}, ValueError, "`samples` must be a whole number >= 1, got 0"),
        ({"samples": 100}, ValueError, "`samples` is the number behind the accuracy that `evaluate` returns"),
        ({"controls": "a"}, TypeError, "`controls` must be a list of names of models, got 'a'"),
        ({"controls": [1]}, TypeError, r"`controls` must be a list of names of models, got \[1\]"),
        ({"nets": [net()]}, TypeError, "`models` must be a mapping of name -> nn.Module"),
        ({"nets": {3: net()}}, TypeError, "`models` must be name -> nn.Module, got the name 3"),
        ({"nets": {"a": nn.Flatten()}}, ValueError, "size of the reference must be above 0, .* got 0 for 'a'"),
        ({"size": lambda module: 0.0}, ValueError, "size of the reference must be above 0"),
        ({"export": {"opset": 17}}, ValueError, "`export` has no 'opset'; known: dynamic_batch, dynamic_dims, verify"),
        ({"export": "onnx"}, TypeError, "`export` must be a mapping of options of export_onnx, a bool or None"),
    ],
)
def test_refuses(words, error, text):
    with pytest.raises(error, match=text):
        quick(**words)


def test_refuses_no_models():
    with pytest.raises(ValueError, match="`models` is empty"):
        compare({}, inputs())


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino"), ("onnx", "onnx")])
def test_a_named_engine_that_is_missing_names_its_extra(monkeypatch, package, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    engine = package if package != "onnx" else "onnxruntime"
    with pytest.raises(ImportError, match=rf'{package} is not installed.*lightning-optim\[{extra}\]"'):
        quick(engines=[engine], export=None)


def test_without_the_exporter_torch_is_measured_and_a_note_says_so(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    report = quick(engines=None, export=None)
    assert report.engines == ["torch"]
    assert any("No model was exported" in note for note in report.notes)
