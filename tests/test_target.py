import dataclasses

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_optim.target import (
    ForwardInputs,
    as_forward_inputs,
    catch_forward_inputs,
    find_target,
    first_rows,
    select_weights,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.gru = nn.GRU(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.encoder[0].weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


def chosen(**words):
    return list(select_weights(Model(), **words).chosen)


def test_default_leaves_norms_biases_embeddings_and_the_last_layer():
    selection = select_weights(Model())
    assert list(selection.chosen) == [
        "encoder.0.weight",
        "encoder.2.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "gru.weight_ih_l0",
        "gru.weight_hh_l0",
    ]
    assert selection.left_out["head.weight"] == "last layer"
    assert selection.left_out["tied.weight"] == "shared with encoder.0.weight"
    assert selection.left_out["emb.weight"] == "Embedding weight"
    assert selection.left_out["scale"] == "Model scale"


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (["head"], ["head.weight"]),
        (["encoder"], ["encoder.0.weight", "encoder.1.weight", "encoder.2.weight"]),
        (["encoder.*"], ["encoder.0.weight", "encoder.1.weight", "encoder.2.weight"]),
        (["encoder.0.weight"], ["encoder.0.weight"]),
        (
            ["*.bias"],
            ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias", "attention.out_proj.bias", "tied.bias", "head.bias"],
        ),
        ([nn.Embedding, nn.LayerNorm], ["emb.weight", "encoder.1.weight"]),
        (["scale"], ["scale"]),
        (["gru"], ["gru.weight_ih_l0", "gru.weight_hh_l0"]),
    ],
)
def test_include_is_exactly_what_is_taken(include, names):
    assert chosen(include=include) == names


def test_exclude_wins_over_include():
    assert chosen(include=["encoder"], exclude=[nn.LayerNorm, "encoder.2"]) == ["encoder.0.weight"]


@pytest.mark.parametrize("word", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["decoder.*", nn.Conv3d])
def test_a_pattern_that_matches_nothing_raises(word, pattern):
    with pytest.raises(ValueError, match=f"{word}: .*matches no layer"):
        select_weights(Model(), **{word: [pattern]})


def test_names_are_those_of_the_whole_module_and_may_be_written_from_the_target():
    parent = nn.ModuleDict({"student": Model()})
    prefix, target = find_target(parent, "student")
    assert prefix == "student."
    assert list(select_weights(target, prefix, include=["head"]).chosen) == ["student.head.weight"]
    assert list(select_weights(target, prefix, include=["student.head"]).chosen) == ["student.head.weight"]


def test_find_target_uses_what_the_module_declares():
    parent = nn.ModuleDict({"student": Model(), "projector": nn.Linear(2, 2)})
    assert find_target(parent) == ("", parent)
    parent.optim_target = parent["student"]
    assert find_target(parent) == ("student.", parent["student"])
    object.__setattr__(parent, "optim_target", nn.Linear(1, 1))
    del parent._modules["optim_target"]
    with pytest.raises(ValueError, match="optim_target"):
        find_target(parent)


def test_an_unknown_module_lists_the_children():
    with pytest.raises(ValueError, match=r"there is no 'decoder' among attention, emb, encoder"):
        find_target(Model(), "decoder.0")


def test_a_dotted_name_sees_through_torch_compile():
    model = Model()
    model.encoder = torch.compile(model.encoder)
    prefix, target = find_target(model, "encoder.0")
    assert isinstance(target, nn.Linear)
    assert prefix == "encoder.0."


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        pytest.param(
            lambda layer: nn.utils.weight_norm(layer),
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
        ),
        lambda layer: nn.utils.spectral_norm(layer),
    ],
)
def test_parametrized_layers_are_left_out_with_the_reason(make):
    model = Model()
    make(model.encoder[2])
    for words in ({}, {"include": ["encoder"]}):
        selection = select_weights(model, **words)
        assert "encoder.0.weight" in selection.chosen
        assert not any(name.startswith("encoder.2") and "bias" not in name for name in selection.chosen)
        assert "computed by a parametrization" in selection.left_out["encoder.2.weight"]
    assert select_weights(model, exclude=["encoder.2"]).left_out["encoder.2.weight"] == "excluded by 'encoder.2'"
    named = [name for name in selection.left_out if name.startswith("encoder.2")]
    assert not any("weight_" in name or "original" in name for name in named)


def test_metrics_are_not_walked():
    class WithNet(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def update(self):
            pass

        def compute(self):
            pass

    model = Model()
    model.metric = WithNet()
    assert not any(name.startswith("metric") for name in select_weights(model).left_out)


def test_catching_takes_the_target_or_the_one_module_called():
    model = Model()
    with catch_forward_inputs(model) as caught:
        model(torch.zeros(6, 4))
    layer, inputs = caught.result()
    assert layer is model
    assert inputs.args[0].shape == (6, 4)
    with catch_forward_inputs(model) as caught:
        model.encoder(torch.zeros(6, 4))
    assert caught.result()[0] is model.encoder
    assert not model._forward_pre_hooks
    assert not model.encoder._forward_pre_hooks


def test_catching_refuses_to_guess_between_two_modules():
    model = Model()
    with catch_forward_inputs(model) as caught:
        model.head(model.encoder(torch.zeros(6, 4)))
    with pytest.raises(ValueError, match=r"calls Sequential, Linear and never Model's own forward"):
        caught.result()


def test_first_rows_cuts_and_repeats():
    inputs = ForwardInputs((torch.arange(3.0)[:, None],), {"mask": torch.ones(3, 2), "scale": torch.tensor(2.0)})
    cut = first_rows(inputs, 5)
    assert cut.args[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert cut.kwargs["mask"].shape == (5, 2)
    assert cut.kwargs["scale"] == 2
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        first_rows(ForwardInputs((torch.ones(3), torch.ones(2))), 1)


def test_example_inputs_are_read_as_lightning_reads_them():
    assert as_forward_inputs(torch.ones(1)).args[0].shape == (1,)
    assert len(as_forward_inputs((1, 2)).args) == 2
    assert as_forward_inputs({"x": 1}).kwargs == {"x": 1}


def test_batches_may_be_dataclasses():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

    cut = first_rows(ForwardInputs((Batch(torch.arange(4.0)),)), 1)
    assert cut.args[0].x.tolist() == [0]
