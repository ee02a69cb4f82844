"""Heads, experts and residual widths of the architectures that people train, from tiny configurations."""

import copy

import pytest
import torch
from torch import nn

from helpers.marks import cells
from helpers.nets import Net
from lightning_optim import conform, prune_channels
from lightning_optim.structured import check
from lightning_optim.structured.events import find_prunable, known_groups
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import as_forward_calls

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 16,
}
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VIT = {k: LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
BART = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}

HEADS = {
    # name: (class, configuration, its arguments, inputs, last part of the output layer's name, attentions)
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_key_value_heads": 4}, IDS, "o_proj", 2),
    "Llama, few keys": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_key_value_heads": 2}, IDS, "o_proj", 2),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "num_key_value_heads": 4}, IDS, "o_proj", 2),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "num_key_value_heads": 4, "head_dim": 8}, IDS, "o_proj", 2),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "num_key_value_heads": 8}, IDS, "o_proj", 2),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "num_key_value_heads": 1, "head_dim": 4}, IDS, "o_proj", 2),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 4},
        IDS,
        "o_proj",
        2,
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", LLAMA, IDS, "attn.dense", 2),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", LLAMA, IDS, "o_proj", 2),
    "NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA, IDS, "attention.dense", 2),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
        IDS,
        "attn.c_proj",
        2,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        SEQ2SEQ,
        "Attention.o",
        6,
    ),
    "ModernBERT": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**LLAMA, "sep_token_id": 2, "cls_token_id": 1},
        IDS,
        "attn.Wo",
        2,
    ),
    "BERT": ("BertForSequenceClassification", "BertConfig", LLAMA, IDS, "attention.output.dense", 2),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},
        IDS,
        "out_proj",
        2,
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART, SEQ2SEQ, "out_proj", 5),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": IDS},
        "out_proj",
        5,
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**VIT, "image_size": 16, "patch_size": 8}, PIXELS, "o_proj", 2),
    "DeBERTa": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**LLAMA, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        IDS,
        "attention.output.dense",
        2,
    ),
    "Falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**LLAMA, "num_kv_heads": 4, "new_decoder_architecture": True},
        IDS,
        "attention.dense",
        2,
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA, "num_key_value_heads": 4, "num_local_experts": 2},
        IDS,
        "o_proj",
        2,
    ),
    "GPT-J": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**TEXT, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 16},
        IDS,
        "out_proj",
        1,
    ),
    "gpt-oss, sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
        IDS,
        "o_proj",
        2,
    ),
}


def build(kind, config, arguments):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()


def logits_of(model, inputs):
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output.logits


def inputs_first(layer):
    return type(layer).__name__ == "Conv1D"


def rows_of_inputs(layer):
    """Return what a layer's weight holds for each input, ``[inputs, outputs]``."""
    weight = layer.weight.detach()
    return weight if inputs_first(layer) else weight.t()


@pytest.mark.parametrize(
    "name",
    cells(
        list(HEADS),
        quick=["Llama, few keys", "GPT-2"],
    ),
)
def test_without_some_heads_a_model_equals_one_whose_heads_are_zero(name):
    kind, config, arguments, inputs, writer, attentions = HEADS[name]
    model = build(kind, config, arguments)
    exact = "experts" not in str(model)  # they are multiplied by a kernel without float64
    model = model.double() if exact else model
    if isinstance(inputs, dict):
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    elif inputs.is_floating_point() and exact:
        inputs = inputs.double()
    zeroed = copy.deepcopy(model)
    writers = [key for key, layer in model.named_modules() if key.endswith(writer) and hasattr(layer, "weight")]
    assert len(writers) == attentions
    found = find_prunable(model, as_forward_calls(inputs), *select_roots(model, "", None, None))
    mine = [key for key, group in found.groups.items() if group.proposed and group.layers & set(writers)]
    assert {layer for key in mine for layer in found.groups[key].layers} >= set(writers), found.left_out
    prune_channels(model, inputs, scope="layer", include=sorted({*_outputs(found, mine)}))
    for key in writers:
        small, dense = model.get_submodule(key), zeroed.get_submodule(key)
        kept = [any(torch.equal(row, other) for other in rows_of_inputs(small)) for row in rows_of_inputs(dense)]
        assert 0 < sum(kept) < len(kept)
        with torch.no_grad():
            rows_of_inputs(dense)[[not stays for stays in kept]] = 0
    wanted = {} if exact else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits_of(model, inputs), logits_of(zeroed, inputs), **wanted)


def test_norms_over_all_heads_lose_their_entries():
    """OLMo 2 norms all queries together: what stays is normed over what stays."""
    model = build("Olmo2ForCausalLM", "Olmo2Config", {**LLAMA, "num_key_value_heads": 4})
    prune_channels(model, IDS, scope="layer", include=["*self_attn.[qkv]_proj"])
    attention = model.model.layers[1].self_attn
    assert (attention.q_norm.weight.shape, attention.k_norm.weight.shape) == ((16,), (8,))
    assert model.config.num_attention_heads == 4
    logits_of(model, IDS)


@pytest.mark.parametrize("name", cells(["T5", "Llama", "Llama, few keys", "Phi-3", "Mixtral"], quick=["Phi-3"]))
def test_heads_are_found_again(name):
    """A later event, and a resumed run, know the names alone."""
    kind, config, arguments, inputs, _, _ = HEADS[name]
    model = build(kind, config, arguments)
    found = find_prunable(model, as_forward_calls(inputs), *select_roots(model, "", None, None)).groups
    again = known_groups(model, as_forward_calls(inputs), found).groups
    assert again.keys() == found.keys()
    for key, group in found.items():
        assert (again[key].unit, again[key].counts) == (group.unit, group.counts)
        assert set(again[key].members) == set(group.members)


def _outputs(found, names):
    tables = (nn.Embedding,)
    return [layer for name in names for layer in found.groups[name].outputs if not isinstance(layer, tables)]


@pytest.mark.parametrize(
    ("kind", "config", "more"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 8}),
        (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {
                "num_experts": 4,
                "num_key_value_heads": 8,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 48,
            },
        ),
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 8},
        ),
    ],
)
def test_experts_lose_the_same_inner_channels(kind, config, more):
    model = build(kind, config, {**LLAMA, **more})
    zeroed = copy.deepcopy(model)
    prune_channels(model, IDS, scope="layer", include=["*mlp.experts"])
    for small, dense in zip(model.model.layers, zeroed.model.layers, strict=True):
        small, dense = small.mlp.experts.down_proj.detach(), dense.mlp.experts.down_proj.detach()
        inner = small.shape.index(24, 1)
        assert small.shape[0] == dense.shape[0]
        for place in range(48):
            row = dense.select(inner, place)
            if not any(torch.equal(row, small.select(inner, other)) for other in range(24)):
                row.zero_()
    torch.testing.assert_close(logits_of(model, IDS), logits_of(zeroed, IDS), atol=1e-5, rtol=1e-4)


WIDTHS = ("Llama", "Qwen3", "Gemma", "Phi", "Phi-3", "NeoX", "ModernBERT", "BERT", "OPT", "GPT-2", "Mixtral")
WIDTHS += ("gpt-oss, sinks", "T5", "BART")  # experts; an encoder and a decoder that share their table


@pytest.mark.parametrize("name", cells(list(WIDTHS), quick=["Llama", "GPT-2", "BERT"]))
def test_the_residual_width_is_removed_where_the_table_is_included(name):
    kind, config, arguments, inputs, _, _ = HEADS[name]
    model = build(kind, config, arguments)
    fresh = copy.deepcopy(model)
    report = prune_channels(model, inputs, pruning_ratio=0.25, include=[nn.Embedding])
    assert list(report.channels.values()) == [(32, 24)]
    assert model.get_input_embeddings().weight.shape == (50, 24)
    conform(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, inputs), logits_of(fresh, inputs))


def test_widths_that_share_a_table_leave_together():
    """The head of a masked language model reads the table that its encoder reads, after a layer of its own."""
    model = build("BertForMaskedLM", "BertConfig", LLAMA)
    report = prune_channels(model, IDS, pruning_ratio=0.25, include=[nn.Embedding])
    assert list(report.channels.values()) == [(32, 24)]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.transform.dense.weight.shape == (24, 24)


def test_a_gate_of_one_number_does_not_keep_the_residual_width():
    model = build(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**LLAMA, "num_experts": 4, "num_key_value_heads": 8, "moe_intermediate_size": 48}
        | {"shared_expert_intermediate_size": 48},
    )
    report = prune_channels(model, IDS, pruning_ratio=0.25, include=[nn.Embedding])
    assert list(report.channels.values()) == [(32, 24)]
    block = model.model.layers[0].mlp
    assert (block.experts.hidden_dim, block.gate.hidden_dim, block.shared_expert_gate.weight.shape) == (24, 24, (1, 24))
    logits_of(model, IDS)


def test_an_excluded_layer_keeps_the_residual_width():
    model = build(*HEADS["Llama"][:3])
    with pytest.raises(ValueError, match=r"coupled with model\.layers\.0\.self_attn\.o_proj \(excluded by"):
        prune_channels(model, IDS, include=[nn.Embedding], exclude=["model.layers.0.self_attn.o_proj"])


def test_the_configuration_follows_and_another_model_that_holds_it_does_not():
    kind, config, arguments, inputs, _, _ = HEADS["Llama"]
    model = build(kind, config, arguments)
    before = model.config
    report = prune_channels(model, inputs, scope="layer")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert model.config.intermediate_size == 24
    assert (before.num_attention_heads, before.intermediate_size) == (8, 48)
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(made, inputs), logits_of(model, inputs))
    again = build(kind, config, arguments)
    conform(again, report.plan)
    assert again.config.to_dict() == model.config.to_dict()


def test_one_number_for_all_blocks_keeps_their_heads_equally_many():
    """The forward of Phi-3 reads the number of heads in the configuration."""
    kind, config, arguments, inputs, _, _ = HEADS["Phi-3"]
    model = build(kind, config, arguments)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)  # a global ranking would take all from here
        model.model.layers[0].self_attn.qkv_proj.weight.mul_(1e-3)
    prune_channels(model, inputs, pruning_ratio=0.25, include=["*qkv_proj"])
    shapes = {layer.self_attn.o_proj.weight.shape for layer in model.model.layers}
    assert shapes == {torch.Size([32, 24])}
    assert model.config.num_attention_heads == 6


@pytest.mark.slow
def test_the_work_grows_with_the_number_of_blocks(monkeypatch):
    """Copies are of the parts that hold a group's layers; the whole model is copied for the trace alone."""
    copied = []
    monkeypatch.setattr(check, "copy_module", lambda module, **how: copied.append(module) or _copy(module, **how))

    def parameters_copied(blocks):
        copied.clear()
        model = build("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": blocks})
        prune_channels(model, IDS, scope="layer")
        return sum(parameter.numel() for module in copied for parameter in module.parameters())

    two, four, eight = (parameters_copied(blocks) for blocks in (2, 4, 8))
    assert (eight - four) == pytest.approx(2 * (four - two), rel=0.3)


_copy = check.copy_module


def test_a_part_is_as_large_as_the_use_of_its_parameters():
    """A weight that the module around a block reads too is checked there."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(self.up(x).relu())

    inside = Net(lambda s, x: s.head(s.part(x)), part=Part(), head=nn.Linear(8, 3))
    outside = Net(lambda s, x: s.head(s.part(x) + s.part.up.weight.flatten().norm()), part=Part(), head=nn.Linear(8, 3))
    for model, expected in ((inside, "part"), (outside, "")):
        traced = TracedModel(model, as_forward_calls(torch.randn(2, 8)))
        group = next(group for group in traced.groups() if group.name == "part.up")
        assert traced.around(group)[-1] == expected
