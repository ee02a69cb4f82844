"""Patterns: names, globs, regular expressions, layer classes and functions select the same for all techniques."""

import functools

import pytest
import torch
from torch import nn

from helpers.models import Classifier, fit, new
from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    QuantizationAwareTraining,
    Recipe,
    WeightPruning,
    prune_channels,
    quantize_post_training,
    sensitivity,
)
from lightning_optim.patterns import check_pattern, check_patterns, matches, pattern_name
from lightning_optim.quantization.prepare import select_layers
from lightning_optim.target import find_target, select_weights


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.decoder = nn.ModuleList([nn.Linear(4, 4), nn.Embedding(5, 4)])
        self.head = nn.Linear(4, 2)


def is_wide(name, layer):
    return isinstance(layer, nn.Linear) and layer.out_features > 3


class Above:
    """A function that is an instance."""

    def __call__(self, name, layer):
        return name.startswith("encoder")


def name_of(value):
    """Return a test id without an address: every process must collect the same."""
    return getattr(value, "__name__", value if isinstance(value, str) else None)


EVERY = ["encoder.0", "encoder.2", "decoder.0", "decoder.1", "head"]
SELECTED = [
    ("re:encoder\\.[02]", ["encoder.0", "encoder.2"]),
    ("re:(?!encoder).*", ["decoder.0", "decoder.1", "head"]),
    ("re:.*\\.0", ["encoder.0", "decoder.0"]),
    ("re:(?i)HEAD", ["head"]),
    (is_wide, ["encoder.0", "encoder.2", "decoder.0"]),
    (lambda name, layer: name == "head", ["head"]),
    (functools.partial(lambda start, name, layer: name.startswith(start), "dec"), ["decoder.0", "decoder.1"]),
    (nn.Embedding, ["decoder.1"]),
]


@pytest.mark.parametrize(("pattern", "names"), SELECTED, ids=name_of)
@pytest.mark.parametrize("prefix", ["", "student.", "_orig_mod.net."])
def test_weights_and_rounding_select_the_same_layers_wherever_the_model_is(pattern, names, prefix):
    model = Layers()
    taken = [f"{prefix}{name}" for name in names]
    assert list(select_weights(model, prefix, include=[pattern]).chosen) == [f"{name}.weight" for name in taken]
    assert list(select_layers(model, prefix, include=[pattern]).chosen) == taken
    left = [f"{prefix}{name}" for name in EVERY if name not in names]
    assert list(select_layers(model, prefix, exclude=[pattern]).chosen) == left


def test_a_regular_expression_must_match_the_whole_name():
    with pytest.raises(ValueError, match=r"include: 're:encoder' matches no layer\. Names look like: encoder\.0"):
        select_weights(Layers(), include=["re:encoder"])


def test_a_bias_is_selected_only_by_its_name():
    biases = select_weights(Layers(), include=[r"re:encoder\.\d\.bias"]).chosen
    assert list(biases) == ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias"]
    assert not any("bias" in name for name in select_weights(Layers(), include=["re:.*"]).chosen)


def test_a_function_sees_each_layer_by_its_name_in_the_target():
    seen = {}
    module = DistillationModule(Classifier(), Classifier())
    prefix, target = find_target(module)
    select_layers(target, prefix, include=[lambda name, layer: seen.update({name: layer}) or True])
    assert seen["net.0"] is module.student.net[0]


CALLS = {
    "weights": lambda **words: WeightPruning(0.5, **words),
    "channels": lambda **words: ChannelPruning(0.5, **words),
    "integers": lambda **words: QuantizationAwareTraining(**words),
    "channels, once": lambda **words: prune_channels(new(), torch.zeros(2, 12), **words),
    "sensitivity": lambda **words: sensitivity(new(), lambda model: 1.0, torch.zeros(2, 12), **words),
    "integers, once": lambda **words: quantize_post_training(new(), [torch.zeros(2, 12)], **words),
    "a recipe": lambda **words: Recipe(weight_pruning={"sparsity": 0.5, **words}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("re:[", "is not a valid regular expression: unterminated character set.*leave out 're:'"),
        (3, "takes names, glob patterns.*got 3"),
        (int, "takes names, glob patterns.*got <class 'int'>"),
        ("", "takes names, glob patterns.*got ''"),
    ],
    ids=str,
)
def test_what_is_no_pattern_is_rejected_before_anything_runs(call, argument, pattern, error):
    with pytest.raises((TypeError, ValueError), match=f"`{argument}`.*{error}"):
        call(**{argument: [pattern]})


def test_a_list_is_expected():
    with pytest.raises(TypeError, match="must be a list of names, patterns or layer classes, got 'net'"):
        check_patterns("include", "net")
    assert check_patterns("include", None) is None
    check_pattern("include", Above())


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("encoder.*", "encoder.*"),
        (nn.Linear, "Linear"),
        (is_wide, "test_patterns.is_wide"),
        (Above(), "test_patterns.Above"),
    ],
    ids=name_of,
)
def test_how_a_pattern_is_named(pattern, name):
    assert pattern_name(pattern) == name


def test_a_parameter_of_the_users_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 3))

    own = Own()
    assert matches("table", "block.table", own, "block.")
    assert matches(Own, "block.table", own, "block.")
    assert matches("re:table", "block.table", own, "block.")
    assert matches(lambda name, layer: name == "", "block.table", own, "block.")


@pytest.mark.parametrize("pattern", ["re:net\\.[04]", is_wide], ids=name_of)
def test_a_run_by_a_pattern(tmp_path, pattern):
    """Class and file say what was asked, and the file loads with ``weights_only=True``."""
    callback = WeightPruning(0.5, start=1, end=4, every_n_steps=1, include=[pattern])
    assert repr([pattern_name(pattern)]) in callback.state_key
    module = new()
    pattern_run = fit(tmp_path, module, callback, max_epochs=1)
    zeros = [float((module.net[place].weight == 0).float().mean()) for place in (0, 4, 6)]
    assert zeros[2] == 0
    assert 0.4 < zeros[0] + zeros[1] < 1.1
    pattern_run.save_checkpoint(tmp_path / "file.ckpt")
    torch.load(tmp_path / "file.ckpt", weights_only=True)


def test_a_recipe_keeps_expressions_and_names_functions(tmp_path):
    recipe = Recipe(weight_pruning={"sparsity": 0.5, "include": ["re:net.*", is_wide]})
    (callback,) = recipe.callbacks()
    assert callback.include == ["re:net.*", is_wide]
    assert recipe.as_plain()["weight_pruning"]["include"] == ["re:net.*", "test_patterns.is_wide"]


@pytest.mark.parametrize("pattern", [r"re:net\.0", lambda name, layer: name == "net.0", nn.Linear], ids=name_of)
@pytest.mark.parametrize("argument", ["sparsity", "pruning_ratio", "bits"])
def test_keys_of_a_dict_are_patterns(tmp_path, argument, pattern):
    window = {"start": 1, "end": 3}
    callback = {
        "sparsity": lambda by: WeightPruning(by, every_n_steps=1, **window),
        "pruning_ratio": lambda by: ChannelPruning(by, events=1, example_inputs=torch.zeros(2, 12), **window),
        "bits": lambda by: QuantizationAwareTraining(bits=by, start=1, freeze=3),
    }[argument]({pattern: 4 if argument == "bits" else 0.5})
    module = new()
    run = fit(tmp_path, module, callback, max_epochs=1)
    assert {
        "sparsity": lambda layer: float((layer.weight == 0).float().mean()) > 0.2,
        "pruning_ratio": lambda layer: layer.out_features == 8,
        "bits": lambda layer: layer.weight_bits == 4,
    }[argument](module.net[0])
    run.save_checkpoint(tmp_path / "file.ckpt")
    torch.load(tmp_path / "file.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda key: WeightPruning({key: 0.5}),
        lambda key: ChannelPruning({key: 0.5}),
        lambda key: QuantizationAwareTraining(bits={key: 4}),
        lambda key: prune_channels(new(), torch.zeros(2, 12), pruning_ratio={key: 0.5}),
        lambda key: quantize_post_training(new(), [torch.zeros(2, 12)], bits={key: 4}),
    ],
)
def test_wrong_keys_of_a_dict_are_rejected(call):
    with pytest.raises(ValueError, match="'re:\\(', which is not a valid regular expression"):
        call("re:(")
    with pytest.raises(TypeError, match="takes names, glob patterns"):
        call(3)


def test_classes_are_keys_in_a_recipe_too():
    recipe = Recipe(weight_pruning={"sparsity": {"torch.nn.Linear": 0.5, "re:x": 0.1}})
    assert recipe.callbacks()[0].sparsity == {nn.Linear: 0.5, "re:x": 0.1}
    assert recipe.as_plain()["weight_pruning"]["sparsity"] == {"torch.nn.Linear": 0.5, "re:x": 0.1}
