"""Safetensors files: the weights as they are deployed, tied ones once, read back by the library's own functions."""

import json

import pytest
import torch
from torch import nn

from lightning_optim import prune_channels, quantize_post_training
from lightning_optim.export import export_pretrained, export_safetensors

safetensors = pytest.importorskip("safetensors.torch", reason="the files are written by safetensors")


class Tied(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 8)
        self.first, self.norm, self.second = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, ids):
        return self.head(self.second(self.norm(self.first(self.table(ids)).relu())) * self.scale)


IDS = torch.arange(12)


def test_a_pruned_model_reads_its_file_and_answers_the_same(tmp_path):
    model = Tied().eval()
    prune_channels(model, IDS, pruning_ratio=0.5)
    report = export_safetensors(model, tmp_path / "m.safetensors", metadata={"note": "ours"})
    assert report.tied == {"head.weight": "table.weight"}
    width = model.first.out_features
    again = Tied(width).eval()
    assert safetensors.load_model(again, tmp_path / "m.safetensors") == (set(), [])
    assert torch.equal(again(IDS), model(IDS))
    assert report.parameters == 8 * 12 + (8 + 1 + 4 + 8) * width + 1 + 8 + 1
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
        assert "scratch" not in file.keys()  # noqa: SIM118 - it is no mapping
    assert metadata["note"] == "ours"
    assert json.loads(metadata["lightning_optim"])["model"].endswith("Tied")


def test_quantized_weights_are_rounded_and_ranges_left_out(tmp_path):
    model = Tied().eval()
    quantize_post_training(model, [IDS], weight_bits=3)
    export_safetensors(model, tmp_path / "m.safetensors")
    state = safetensors.load_file(tmp_path / "m.safetensors")
    assert state.keys() <= Tied().state_dict().keys()
    rows = state["first.weight"] / state["first.weight"].abs().amax(1, keepdim=True) * 3
    torch.testing.assert_close(rows, rows.round(), rtol=0, atol=1e-5)
    assert torch.equal(state["first.weight"], model.first.quantized_weight())


def test_a_tensor_of_a_larger_one_is_written_alone(tmp_path):
    model = nn.Linear(2, 2)
    whole = torch.arange(100.0)
    model.weight = nn.Parameter(whole[:4].view(2, 2))
    model.bias = nn.Parameter(whole[10:12])
    assert export_safetensors(model, tmp_path / "m.safetensors").bytes < 1000
    assert torch.equal(safetensors.load_file(tmp_path / "m.safetensors")["bias"], torch.tensor([10.0, 11.0]))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "m.safetensors"
    export_safetensors(nn.Linear(1, 1), file)
    before = file.read_bytes()
    with pytest.raises(TypeError, match=r"holds strings only, got \{'seed': 3\}"):
        export_safetensors(nn.Linear(2, 2), file, metadata={"seed": 3})
    with pytest.raises(ValueError, match="Identity has no weights to write"):
        export_safetensors(nn.Identity(), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_experts_are_rounded_in_every_file(tmp_path, bits):
    """A folder held the experts' float weights, and was refused because its answers differed."""
    pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 8))
    quantize_post_training(model, weight_bits=bits, activation_bits=None)
    export_safetensors(model, tmp_path / "m.safetensors")
    export_pretrained(model, tmp_path / "folder")
    file = MixtralForCausalLM(config).eval()
    safetensors.load_model(file, tmp_path / "m.safetensors")
    folder = MixtralForCausalLM.from_pretrained(tmp_path / "folder").eval()
    for read in (file, folder):
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
