"""Every result that is printed is shown in a notebook too, and draws itself where there is something to draw."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lightning_optim
from lightning_optim import prune_channels, prune_weights
from lightning_optim.depth.prune import DepthReport
from lightning_optim.export.pretrained_report import PretrainedReport
from lightning_optim.export.report import ExportReport, Mix
from lightning_optim.export.weights import SafetensorsReport
from lightning_optim.measure.latency import LatencyResult
from lightning_optim.structured.prune import PruningReport
from lightning_optim.tables import Listed, Listing

NAME = "<b>net"
INTERNAL = {"ChannelReport", "Report"}
"""The groups of a search for channels, and the document that others are written as."""


def reports():
    for module in pkgutil.walk_packages(lightning_optim.__path__, "lightning_optim."):
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if name.endswith("Report") and cls.__module__ == module.name and name not in INTERNAL:
                yield cls


def test_every_report_is_shown_in_a_notebook():
    found = list(reports())
    assert len(found) >= 10
    assert [cls for cls in found if not hasattr(cls, "_repr_html_")] == []


def mixes():
    times = (LatencyResult(1.0, ratio=0.5, low=0.4, high=0.6, batch_size=1),)
    return Mix("none", (), times, 900), Mix("all", ("a",), times, 1000)


SHOWN = [
    PruningReport({NAME: (8, 4)}, (100, 50), {"head": "last layer"}, {}),
    DepthReport({}, (100, 50), {}, {}, {NAME: (4, 3)}, [f"{NAME}.1"], {}),
    ExportReport(
        Path(NAME),
        "onnxruntime",
        21,
        {},
        (),
        {"a": "float"},
        file_bytes=10,
        float_bytes=20,
        max_difference=0.0,
        mean_difference=0.0,
    ),
    PretrainedReport(Path(NAME), "Llama", 10, files={"config.json": 5}),
    SafetensorsReport(Path(NAME), 1, 2, 3, {}),
]


@pytest.mark.parametrize("report", SHOWN, ids=lambda report: type(report).__name__)
def test_names_are_text_in_html_and_as_they_are_in_a_terminal(report):
    assert "<b>" not in report._repr_html_()
    assert "&lt;b&gt;net" in report._repr_html_()
    assert NAME in str(report)


@pytest.mark.parametrize("report", [r for r in SHOWN if hasattr(r, "plot")], ids=lambda report: type(report).__name__)
def test_a_plot_is_a_figure_and_a_file(report, tmp_path):
    figure = report.plot(tmp_path / "plot.svg")
    assert isinstance(figure, Figure)
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    (axis, *_) = figure.axes
    assert NAME in [label.get_text() for label in axis.get_yticklabels()]


def test_mixes_are_drawn_with_their_times():
    report = ExportReport(Path("a.onnx"), "onnxruntime", 21, {}, (), {}, file_bytes=900, mixes=mixes())
    left, right = report.plot().axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["none", "all"]
    assert right.lines[0].get_xdata().tolist() == [0.5, 0.5]


def test_a_listing_without_a_table_is_its_sentences():
    assert str(Listing((), (), before=["a"], after=["b"])) == "a\nb"
    assert Listing((), (), before=["a & b"]).as_html() == "<p>a &amp; b</p>"


def test_results_of_calls_are_shown():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = [
        prune_channels(net, torch.randn(2, 4), progress=False),
        prune_weights(net, sparsity=0.5, method="magnitude"),
    ]
    assert all(isinstance(each, Listed) and "<table>" in each._repr_html_() for each in found)
