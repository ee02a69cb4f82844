"""Free dimensions: their names in the file, the limits of a module's code, and what is said where code fixes one."""

import tempfile

import pytest
import torch
from torch import nn

from lightning_optim import prune_channels
from lightning_optim.export import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

LENGTH = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
SIZES = {"vocab_size": 40, "pad_token_id": 0}
NAMED = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}
# Model -> its sizes, and the longest text that its positions allow (None: any).
TEXT_MODELS = {
    "Bert": (NAMED, 24),
    "DistilBert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 24}, 24),
    "Electra": ({**NAMED, "embedding_size": 8}, 24),
    "Albert": ({**NAMED, "embedding_size": 8}, 24),
    "GPT2": ({"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}, None),
    "Llama": ({**NAMED, "num_key_value_heads": 1}, None),
}


def text_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **TEXT_MODELS[name][0])
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def texts(length):
    ids = torch.randint(5, 40, (3, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def dimensions(path):
    """Sizes and names of the dimensions of each input and output of a file."""
    graph = onnx.load(str(path)).graph
    return {
        put.name: [size.dim_param or size.dim_value for size in put.type.tensor_type.shape.dim]
        for put in (*graph.input, *graph.output)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n == "Bert" else pytest.param(n, marks=pytest.mark.slow) for n in TEXT_MODELS])
def test_the_length_of_a_text_model_is_free_up_to_its_positions(name, tmp_path):
    path, longest = tmp_path / "text.onnx", TEXT_MODELS[name][1]
    report = export_onnx(text_model(name), path, texts(7), dynamic_dims=LENGTH, inputs=[texts(24), texts(3)])
    assert report.inputs["input_ids"] == ("batch", "length")
    assert dimensions(path)["input_ids"] == dimensions(path)["attention_mask"] == ["batch", "length"]
    assert dimensions(path)["logits"] == ["batch", 2]
    assert report.max_difference < 1e-4
    assert (f"length is at most {longest} in this file, as in the module." in report.notes) == (longest is not None)


@pytest.mark.slow
def test_sizes_that_the_exporter_does_not_know_are_not_called_equal(tmp_path):
    """The runtime reuses the memory of one for another: blocks with different numbers of heads ran into each other."""
    torch.manual_seed(0)
    sizes = {**NAMED, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**SIZES, **sizes)
    model, ids = transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(5, 40, (3, 6))}
    prune_channels(model, ids, include=["model.layers.0.self_attn.*"], progress=False)
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [16, 32]
    report = export_onnx(model, tmp_path / "uneven.onnx", ids, inputs=ids)
    values = onnx.load(str(tmp_path / "uneven.onnx")).graph.value_info
    names = {size.dim_param for value in values for size in value.type.tensor_type.shape.dim}
    assert names - {""}
    assert "None" not in names
    assert report.max_difference < 1e-4


class Products(nn.Module):
    """Outputs whose sizes are made of those of two inputs."""

    def forward(self, left, right):
        return torch.cat([left, right], 1), (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def test_names_of_free_dimensions_are_in_every_size_that_is_made_of_them(tmp_path):
    free = {"left": {1: "rows"}, "right": {1: "columns"}}
    inputs = (torch.randn(3, 4), torch.randn(3, 5))
    export_onnx(Products(), tmp_path / "net.onnx", inputs, dynamic_dims=free, output_names=["all", "pairs"])
    found = dimensions(tmp_path / "net.onnx")
    assert found["left"] == ["batch", "rows"]
    assert found["right"] == ["batch", "columns"]
    assert sorted(found["all"][1].replace(" ", "").split("+")) == ["columns", "rows"]
    assert sorted(found["pairs"][1].replace(" ", "").split("*")) == ["columns", "rows"]


class FixedLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 8))
        self.table = nn.Embedding(40, 8)

    def forward(self, ids):
        return (self.table(ids) + self.positions).mean(1)


def test_a_length_that_the_code_fixes_is_named_and_not_the_batch(tmp_path):
    ids = torch.randint(40, (4, 12))
    with pytest.raises(ValueError, match=r"FixedLength fixes dimension 1 of 'ids' \('length'\) at 12") as raised:
        export_onnx(FixedLength(), tmp_path / "net.onnx", ids, dynamic_dims={"ids": {1: "length"}})
    assert "batch" not in str(raised.value)


@pytest.mark.slow
def test_a_mixture_of_experts_names_the_operator_that_onnx_lacks(tmp_path, monkeypatch):
    (tmp_path / "details").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "details"))
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, **NAMED, num_key_value_heads=1, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(5, 40, (3, 7)), "use_cache": False}
    with pytest.raises(ValueError, match=r"MixtralForCausalLM .*ONNX has no operator for .*grouped_mm") as raised:
        export_onnx(model, tmp_path / "net.onnx", inputs)
    assert "batch size" not in str(raised.value)
    (details,) = (tmp_path / "details").iterdir()
    assert f"Details: {details}" in str(raised.value)
    model.set_experts_implementation("batched_mm")  # what the sentence says
    assert export_onnx(model, tmp_path / "net.onnx", inputs).max_difference < 1e-4
