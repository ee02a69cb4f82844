"""Fronts, styles, and which figures there are."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.compared import layers, report, row
from lightning_optim.report.figures import (
    comparison_figures,
    layer_figure,
    layer_sections,
    pareto_front,
    score_figures,
    sparsity_figure,
)
from lightning_optim.report.layers import against_reference
from lightning_optim.report.styles import DARK, INK, KINDS, styles_of

points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1)


@given(points, st.booleans())
def test_nothing_beats_the_front_and_all_else_is_beaten(found, higher):
    front = pareto_front(found, higher=higher)
    sign = 1 if higher else -1

    def beats(one, other):
        return one != other and one[0] <= other[0] and sign * one[1] >= sign * other[1]

    assert not any(beats(one, other) for one in found for other in front)
    assert all(any(beats(one, other) for one in front) for other in set(found) - set(front))


def test_every_colour_has_a_dark_one_and_stands_for_one_thing():
    colours = {colour for kind in KINDS.values() for colour in kind.colours} | set(INK.values())
    assert colours == DARK.keys()
    assert len(set(DARK.values())) == len(DARK)


def test_rows_of_kinds_that_share_colours_look_different():
    rows = [row("a", "compressed", 0, 1, 1), row("b", "pruned", 0, 1, 1), row("c", "unknown", 0, 1, 1)]
    assert len({style["color"] for style in styles_of(rows).values()}) == 3


def test_figures_of_a_comparison():
    names = [name for name, _, _ in comparison_figures(report())]
    assert names == ["pareto_size", "pareto_torch", "P_unguarded", "P_error"]


def test_without_accuracies_size_is_drawn_against_time():
    found = report()
    found.metrics = []
    ((name, _, figure), *_) = comparison_figures(found)
    assert name == "pareto_size"
    assert "one call in PyTorch / dense" in figure.axes[0].get_xlabel()


def test_nothing_to_draw_is_said():
    found = report()
    found.metrics, found.engines = [], []
    with pytest.raises(ValueError, match="neither an accuracy nor a time to draw"):
        found.plot()


def test_bars_show_what_changed():
    assert layer_figure(against_reference(layers(32), layers(32))) is None
    figure = layer_figure(against_reference(layers(16, bits=8.0), layers(32)))
    assert [axis.get_title() for axis in figure.axes] == ["width kept", "bits"]
    (section,) = layer_sections(report())
    assert [caption for _, caption, _ in section.figures] == [
        "half <b>, against dense: width kept, zeros and bits of each layer.",
        "scratch, against dense: width kept of each layer.",
    ]
    assert section.rows[0] | {"model": "half <b>", "kept": 0.5} == section.rows[0]
    assert [entry["layer"] for entry in section.rows] == ["net.0-2", "net.0-2"]  # three equal layers are one row


def test_large_models_show_their_largest_layers_and_long_names_their_end():
    many = [{**layers(16)[0], "layer": f"block.{n}.attention.projection.output", "parameters": n} for n in range(60)]
    figure = layer_figure(against_reference(many, [{**facts, "width": 32} for facts in many]))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 40
    assert all(name.startswith("…") and name.endswith("projection.output") for name in names)


def test_a_metric_that_no_run_logged_has_no_figure():
    rows = [row("a", "dense", 0, 1, 1)]
    assert score_figures(rows, {"a": [{"P/size": None}, {}]}) == []


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_names_that_look_like_formulas_or_hidden_are_drawn_as_they_are(tmp_path):
    found = report()
    name, metric, other = r"$\\nope{$", "$x_{$", "_hidden"
    found.reference, found.accuracy, found.metrics = name, metric, [metric]
    found.layers = {name: layers(32), other: [{**facts, "layer": r"$\\no{$"} for facts in layers(16, bits=8.0)]}
    found.histories = {name: [{"P/size": 1.0}], other: [{"P/size": 0.5}]}
    for line, called in zip(found.rows, (name, other, "scratch", "words"), strict=True):
        line.update({"name": called, metric: line.pop("accuracy")})
    found.write(tmp_path)
    figures = {name: figure for name, _, figure in comparison_figures(found)}
    assert legend_of(figures["pareto_size"]) == [name, other, "scratch"]
    assert legend_of(figures["P_size"]) == [name, other]
    assert legend_of(found.plot()) == [name, other, "scratch"]
    pruned = sparsity_figure(found.rows, {each: [(1, 0.5, 0.5)] for each in (name, other)})
    assert legend_of(pruned) == [name, other]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f">{each}</text>" in text for each in (name, other, metric))


def test_names_of_figures_are_safe_and_each_its_own():
    names = ["val/acc", "val_acc", "val/ACC", 'val/../x y"><b>', "val" * 200]
    panels = [(name, name, True, name) for name in names]
    drawn = score_figures([row("a", "dense", 0, 1, 1)], {"a": [dict.fromkeys(names, 1.0)]}, panels)
    found = [name for name, _, _ in drawn]
    assert found[:3] == ["val_acc", "val_acc_2", "val_ACC_3"]
    assert len({name.lower() for name in found}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,110}", name) for name in found)


def test_a_control_is_on_the_front_and_a_row_without_a_file_is_not():
    found = report(accuracy=0.7)  # the control of the same size has 0.8
    found["word counts"]["accuracy"] = 0.99
    (_, _, figure), *_ = comparison_figures(found)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[2.5, 0.8], [5.0, 0.95]]
