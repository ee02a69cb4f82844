"""A search space: what is open, what Optuna is asked, and what is refused in one sentence."""

import optuna
import pytest

from lightning_optim.search.space import Choice, Range, Space


def proposed(space, count=40):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_ranges_and_choices_are_told_apart_from_values():
    space = Space(
        {
            "channel_pruning": {"pruning_ratio": (0.2, 0.7), "criterion": ["magnitude", "random"], "exclude": ["head"]},
            "quantization": {"weight_bits": (4, 8)},
            "distillation": {"alpha": (0.1, 0.9), "temperature": (1, 8, "log")},
        }
    )
    assert space.leaves == {
        "channel_pruning.pruning_ratio": Range(0.2, 0.7),
        "channel_pruning.criterion": Choice(("magnitude", "random")),
        "quantization.weight_bits": Range(4, 8),
        "distillation.alpha": Range(0.1, 0.9),
        "distillation.temperature": Range(1, 8, log=True),
    }
    points = proposed(space)
    assert {type(point["quantization.weight_bits"]) for point in points} == {int}
    assert {point["quantization.weight_bits"] for point in points} == {4, 5, 6, 7, 8}
    assert all(0.2 <= point["channel_pruning.pruning_ratio"] <= 0.7 for point in points)
    recipe = space.recipe(points[0])
    assert recipe.channel_pruning["exclude"] == ["head"], "a list of names is a value"
    assert recipe.channel_pruning["pruning_ratio"] == points[0]["channel_pruning.pruning_ratio"]


def test_a_technique_may_be_left_out_and_its_arguments_open_only_where_it_is_taken():
    space = Space({"weight_pruning": [None, {"sparsity": (0.5, 0.9)}, 0.3], "quantization": [True, False]})
    points = proposed(space)
    for point in points:
        recipe = space.recipe(point)
        taken = "weight_pruning[1].sparsity" in point
        assert taken == (recipe.weight_pruning is not None and recipe.weight_pruning["sparsity"] != 0.3)
        assert (recipe.quantization is None) == (point["quantization"] is False)
    assert {len(point) for point in points} == {2, 3}


def test_a_list_of_lists_opens_an_argument_that_is_a_list():
    space = Space({"weight_pruning": {"sparsity": 0.5, "exclude": [["head"], ["head", "stem"]]}})
    assert {tuple(space.recipe(point).weight_pruning["exclude"]) for point in proposed(space)} == {
        ("head",),
        ("head", "stem"),
    }


def test_yaml_says_the_same(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("weight_pruning: {sparsity: {low: 0.5, high: 0.9}, criterion: [magnitude, random]}\n")
    same = Space({"weight_pruning": {"sparsity": (0.5, 0.9), "criterion": ["magnitude", "random"]}})
    assert Space(path).as_plain() == same.as_plain()
    assert Space(str(path)).leaves == same.leaves


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "leaves nothing open"),
        ({"weight_pruning": 0.5}, "leaves nothing open"),
        ({"pruning": (0.1, 0.5)}, "unknown keys 'pruning'"),
        ({"weight_pruning": {"sparsty": (0.1, 0.5)}}, "no argument 'sparsty'"),
        ({"weight_pruning": {"criterion": ["magnitude", "magnitud"]}}, "weight_pruning.criterion = 'magnitud'"),
        ({"weight_pruning": (0.5, 1.5)}, "weight_pruning = 1.5"),
        ({"weight_pruning": [None, {"sparsity": (0.5, 1.5)}]}, r"weight_pruning\[1\].sparsity = 1.5"),
        ({"weight_pruning": (0.9, 0.5)}, "`space` at weight_pruning: a range is .* low < high"),
        ({"weight_pruning": {"sparsity": (0.9, 0.5)}}, "`space` at weight_pruning.sparsity: a range"),
        ({"weight_pruning": (0.0, 0.5, "log")}, "a logarithmic range begins above 0"),
        ({"weight_pruning": (0.1, 0.2, 0.3)}, "a range is"),
        ({"weight_pruning": []}, "a choice needs at least one value"),
        ({"weight_pruning": [0.5, 0.5]}, "each value once"),
    ],
)
def test_refused_in_one_sentence(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        Space(content)
    assert "\n" not in str(caught.value)


def test_windows_may_overlap_in_some_corners_only():
    start, end = (0.1, 0.5), (0.4, 0.9)
    space = Space({"weight_pruning": {"sparsity": 0.5, "start": start, "end": end}})
    assert len(space.leaves) == 2


@pytest.mark.parametrize("content", [3, None, ["weight_pruning"]])
def test_what_is_no_recipe_is_refused(content):
    with pytest.raises(TypeError, match="a recipe with open arguments"):
        Space(content)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no space file"):
        Space(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        Space(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must be a mapping"):
        Space(tmp_path / "list.yaml")
