"""Numbers of a configuration are found from the shapes of a live model alone."""

import copy

import pytest
import torch
from torch import nn

from helpers.pretrained import MODELS, narrow
from lightning_optim import configs, prune_channels

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

slow = pytest.mark.slow

CHANGED = [
    ("Llama", {"num_hidden_layers": 2}),
    ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Llama", {"head_dim": 4}),
    pytest.param(
        "Llama",
        {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20},
        marks=slow,
    ),
    pytest.param("Mistral", {"num_attention_heads": 2, "num_hidden_layers": 1}, marks=slow),
    pytest.param("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}, marks=slow),
    pytest.param("Qwen3", {"head_dim": 8, "hidden_size": 24}, marks=slow),
    pytest.param("Gemma", {"num_attention_heads": 2, "intermediate_size": 20}, marks=slow),
    ("Gemma 3", {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}),
    pytest.param("Phi", {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}, marks=slow),
    ("Phi-3", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20}),
    ("GPT-NeoX", {"hidden_size": 24, "num_attention_heads": 3}),
    ("GPT-2", {"n_inner": 50}),
    pytest.param("GPT-2", {"n_embd": 24, "n_head": 3, "n_inner": 50, "n_layer": 2}, marks=slow),
    pytest.param("OPT", {"ffn_dim": 20, "num_hidden_layers": 2}, marks=slow),
    ("BERT", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20}),
    pytest.param("ModernBERT", {"intermediate_size": 20, "num_hidden_layers": 2}, marks=slow),
    ("T5", {"num_heads": 2, "num_decoder_layers": 1}),
    pytest.param("T5", {"d_kv": 4, "d_model": 24, "d_ff": 20}, marks=slow),
    ("ViT", {"num_attention_heads": 2, "head_dim": 8}),
    pytest.param("ViT", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20}, marks=slow),
    ("Swin", {"depths.0": 1, "mlp_ratio": 2.5}),
    pytest.param("Whisper", {"encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 20}, marks=slow),
    pytest.param(
        "CLIP", {"text_config.intermediate_size": 20, "vision_config.num_hidden_layers": 1}, marks=slow
    ),
]  # fmt: skip


def changed_model(name, values):
    """Build a model from a changed configuration, and give it the configuration before."""
    config = MODELS[name].configuration()
    if "num_hidden_layers" in values and hasattr(config, "layer_types"):
        values = {**values, "layer_types": config.layer_types[: values["num_hidden_layers"]]}
    model = MODELS[name].make(configs.config_with(config, values))
    model.config = config
    return model, values


@pytest.mark.parametrize(("name", "values"), CHANGED)
def test_changed_numbers_are_found(name, values):
    model, values = changed_model(name, values)
    solution = configs.solve(model)
    assert solution.unstated == {}
    assert solution.values == values


@pytest.mark.parametrize("name", ["Llama", "BERT", "T5"])
def test_an_unchanged_model_keeps_its_numbers(name):
    assert configs.solve(MODELS[name].make()) == configs.Solution({})


def test_config_follows_a_model_that_was_cut():
    model = MODELS["Llama"].make()
    inner, inputs = model.config, MODELS["Llama"].inputs
    for block in model.model.layers:
        narrow(block.mlp, 32)
    assert configs.follow(nn.ModuleDict({"net": model})) == {"net": configs.Solution({"intermediate_size": 32})}
    assert inner.intermediate_size == 64  # a teacher may hold it too
    assert all(layer.mlp.config is model.config for layer in model.model.layers)
    fresh = MODELS["Llama"].make(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert configs.solve(model) == configs.Solution({})


@pytest.mark.parametrize(
    ("name", "layers", "path"),
    [
        ("Phi-3", "*mlp*", "intermediate_size"),
        ("T5", "*DenseReluDense*", "d_ff"),
        pytest.param("CLIP", "vision*fc1", "vision_config.intermediate_size", marks=slow),
    ],
)
def test_config_follows_pruned_channels(name, layers, path):
    model = MODELS[name].make()
    before = configs.value_at(model.config, path)
    prune_channels(model, MODELS[name].inputs, scope="layer", include=[layers])
    assert configs.value_at(model.config, path) * 2 == before
    assert configs.solve(model) == configs.Solution({})
    held = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    leaf = path.rpartition(".")[2]
    assert all(
        config.to_dict().get(leaf, before // 2) == before // 2 for config in held if "text" not in config.model_type
    )


def test_several_items_of_a_list_follow():
    model = MODELS["Swin"].make()
    swin = model.swin.encoder.layers
    swin[0].blocks = nn.ModuleList([swin[0].blocks[0]])
    configs.apply(model, configs.solve(model).values)
    assert model.config.depths == [1, 1]
    configs.apply(model, {"num_heads.0": 1, "num_heads.1": 2})
    assert model.config.num_heads == [1, 2]


def test_numbers_on_modules_follow():
    model, values = changed_model("BERT", {"hidden_size": 24, "num_attention_heads": 3})
    for layer in model.bert.encoder.layer:
        layer.attention.self.num_attention_heads = 4  # as if no technique had set it
    changes = configs.changes(model, values)
    assert changes["bert.encoder.layer.1.attention.self"] == {"num_attention_heads": 3}
    configs.apply(model, values)
    assert model.bert.encoder.layer[1].attention.self.num_attention_heads == 3
    assert model.bert.config.num_attention_heads == 3


def test_lists_of_blocks_keep_the_items_of_those_that_are_left():
    model = MODELS["Gemma 3"].make(configs.config_with(MODELS["Gemma 3"].configuration(), {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
    }))  # fmt: skip
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    wanted = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "sliding_attention"]}
    assert configs.solve(model).values == wanted
    assert configs.solve(model, kept={"model.layers": [1, 2]}).values["layer_types"] == [
        "full_attention",
        "sliding_attention",
    ]


def test_widths_that_differ_between_blocks_are_named():
    model = MODELS["Llama"].make()
    narrow(model.model.layers[1].mlp, 48)
    solution = configs.solve(model)
    assert solution.values == {}
    assert set(solution.unstated) == {f"model.layers.1.mlp.{name}_proj" for name in ("up", "gate", "down")}
    reason = solution.unstated["model.layers.1.mlp.up_proj"]
    assert reason == (
        "its width differs between blocks (48, 64), and LlamaConfig has one number for all of them; prune with "
        "scope='layer', which keeps them equal"
    )


def test_heads_alone_have_no_number_in_bert():
    model = MODELS["BERT"].make()
    prune_channels(model, MODELS["BERT"].inputs, scope="layer", include=["*.self.*"])
    unstated = configs.solve(model).unstated
    assert unstated["bert.encoder.layer.0.attention.self.query"] == (
        "no number of BertConfig states dimension 0 of bias, 16 instead of 32"
    )


def test_other_layers_are_named():
    model = MODELS["Llama"].make()
    model.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    del model.model.layers[1].mlp
    unstated = configs.solve(model).unstated
    assert unstated["model.layers.0.self_attn.q_proj.0"].startswith("LlamaForCausalLM makes no ")
    assert unstated["model.layers.1.mlp.up_proj"].endswith("from its configuration, and the model has none")


def test_weights_that_are_no_longer_tied_turn_the_switch():
    model = MODELS["GPT-2"].make()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert configs.solve(model).values == {"tie_word_embeddings": False}


def test_counts_say_what_each_number_counts():
    counts = configs.counts(MODELS["Phi-3"].make())
    inner = counts["intermediate_size"]
    assert inner.dimensions["model.layers.0.mlp.gate_up_proj.weight", 0] == 2
    assert inner.dimensions["model.layers.0.mlp.down_proj.weight", 1] == 1
    assert counts["num_hidden_layers"].stacks == {"model.layers": 1}
    assert "max_position_embeddings" not in counts or not counts["max_position_embeddings"].dimensions


def test_models_are_found_by_what_they_have():
    model = MODELS["T5"].make()
    assert configs.config_models(nn.ModuleDict({"a": model, "b": nn.Linear(2, 2)})) == {"a": model}
    assert configs.config_models(nn.Linear(2, 2)) == {}
    assert configs.follow(nn.Linear(2, 2)) == {}


def test_random_state_is_left_alone():
    model, _ = changed_model("Llama", {"num_attention_heads": 2})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    configs.solve(copy.deepcopy(model))
    assert torch.equal(torch.rand(3), expected)
