"""Models of transformers lose blocks: the outputs are those of skipped blocks, and the configuration follows."""

import copy

import pytest
import torch
from torch import nn

from lightning_optim import conform, prune_depth
from lightning_optim.depth.hidden import skipping
from lightning_optim.outputs import output_tensors

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
BOTH = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 4, "decoder_layers": 5, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0,
    "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made(name, config, **numbers):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**numbers)).eval()


def texts(model):
    return {"input_ids": IDS}


def pairs(model):
    return {"input_ids": IDS, "decoder_input_ids": IDS}


NETS = {
    # name: (model, inputs, blocks left of each stack, what of the configuration follows)
    "Llama": (
        lambda: made("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=6, num_key_value_heads=2, **SMALL),
        texts,
        {"model.layers": 3},
        {"num_hidden_layers": 3},
    ),
    "Qwen3 with windows": (
        lambda: made(
            "Qwen3ForCausalLM",
            "Qwen3Config",
            num_hidden_layers=6,
            num_key_value_heads=2,
            head_dim=8,
            use_sliding_window=True,
            max_window_layers=3,
            sliding_window=4,
            **SMALL,
        ),
        texts,
        {"model.layers": 3},
        {"num_hidden_layers": 3},
    ),
    "GPT-2": (
        lambda: made("GPT2LMHeadModel", "GPT2Config", n_layer=5, n_embd=32, n_head=4, n_positions=32, vocab_size=50),
        texts,
        {"transformer.h": 2},
        {"n_layer": 2},
    ),
    "BERT": (
        lambda: made("BertForSequenceClassification", "BertConfig", num_hidden_layers=4, **SMALL),
        texts,
        {"bert.encoder.layer": 2},
        {"num_hidden_layers": 2},
    ),
    "T5": (
        lambda: made(
            "T5ForConditionalGeneration",
            "T5Config",
            num_layers=4,
            num_decoder_layers=6,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            vocab_size=50,
            decoder_start_token_id=0,
        ),
        pairs,
        {"encoder.block": 2, "decoder.block": 3},
        {"num_layers": 2, "num_decoder_layers": 3},
    ),
    "BART": (
        lambda: made("BartForConditionalGeneration", "BartConfig", max_position_embeddings=32, **BOTH),
        pairs,
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        {"encoder_layers": 2, "decoder_layers": 2},
    ),
    "Whisper": (
        lambda: made(
            "WhisperForConditionalGeneration", "WhisperConfig", max_source_positions=16, num_mel_bins=8, **BOTH
        ),
        lambda model: {"input_features": torch.ones(2, 8, 32), "decoder_input_ids": IDS},
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        {"encoder_layers": 2, "decoder_layers": 2},
    ),
    "ViT": (
        lambda: made(
            "ViTForImageClassification",
            "ViTConfig",
            num_hidden_layers=4,
            image_size=32,
            patch_size=8,
            **{key: value for key, value in SMALL.items() if key != "vocab_size"},
        ),
        lambda model: {"pixel_values": IMAGES},
        {"vit.layers": 2},
        {"num_hidden_layers": 2},
    ),
    "Swin": (
        lambda: made(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 4, 2],
            num_heads=[2, 4, 4],
            window_size=4,
        ),
        lambda model: {"pixel_values": IMAGES},
        {"swin.encoder.layers.1.blocks": 2},
        {"depths": [2, 2, 2]},
    ),
}
SLOW = {"BART", "Qwen3 with windows", "Swin", "BERT"}
each_net = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else ()) for name in NETS]
)


def logits(model, inputs):
    with torch.no_grad():
        return output_tensors(model(**inputs))[0]


@each_net
def test_the_outputs_are_those_of_skipped_blocks_and_the_configuration_follows(name):
    make, inputs_of, left, followed = NETS[name]
    model = make()
    shared, whole, inputs = model.config, copy.deepcopy(model), inputs_of(model)
    report = prune_depth(model, inputs, pruning_ratio=0.5)
    assert {stack: after for stack, (_, after) in report.blocks.items()} == left
    with skipping([whole.get_submodule(block) for block in report.removed]):
        expected = logits(whole, inputs)
    assert torch.equal(logits(model, inputs), expected)
    assert {key: getattr(model.config, key) for key in followed} == followed
    assert {key: getattr(shared, key) for key in followed} != followed  # another model may hold it
    for stack in left:
        blocks = model.get_submodule(stack)
        numbers = [getattr(layer, "layer_idx", None) for block in blocks for layer in block.modules()]
        assert sorted({number for number in numbers if number is not None}) in ([], list(range(len(blocks))))
    fresh = make()
    conform(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, inputs), expected)
    assert {key: getattr(fresh.config, key) for key in followed} == followed
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    if name != "Swin":  # its class shifts every other window, which the configuration cannot say of the blocks left
        assert torch.equal(logits(rebuilt, inputs), expected)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BART"])
def test_text_is_generated_with_the_cache_as_without(name):
    make, inputs_of, _, _ = NETS[name]
    model = make()
    prune_depth(model, inputs_of(model), pruning_ratio=2, criterion="random")
    texts = [
        model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


def test_the_first_block_of_t5_holds_the_position_biases_and_stays():
    make, inputs_of, _, _ = NETS["T5"]
    model = make()
    report = prune_depth(model, inputs_of(model), pruning_ratio=3, include=["encoder.block"])
    assert report.removed
    assert "encoder.block.0" not in report.removed
    assert "use more of it than the hidden state" in report.left_out["encoder.block.0"]
    with pytest.raises(ValueError, match=r"of which 4 may be removed: .*block 0 \(other blocks use more"):
        prune_depth(make(), inputs_of(model), pruning_ratio=5, include=["decoder.block.*"], exclude=["decoder.block.5"])


def test_albert_holds_one_block_and_has_no_stack():
    model = made("AlbertForSequenceClassification", "AlbertConfig", num_hidden_layers=6, embedding_size=16, **SMALL)
    with pytest.raises(ValueError, match="no ModuleList or Sequential holds 3 blocks of one class"):
        prune_depth(model, texts(model))


def test_a_backbone_that_returns_outputs_of_certain_blocks_is_refused():
    model = made(
        "Dinov2Backbone", "Dinov2Config", num_hidden_layers=6, hidden_size=32, num_attention_heads=4, image_size=32,
        patch_size=8, out_features=["stage3", "stage6"],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"encoder.layer.* the output has an entry for each block"):
        prune_depth(model, {"pixel_values": IMAGES})


def test_hidden_states_in_the_output_are_fewer():
    make, inputs_of, _, _ = NETS["Llama"]
    model = make()
    model.config.output_hidden_states = True
    prune_depth(model, inputs_of(model), pruning_ratio=2)
    assert len(model(input_ids=IDS).hidden_states) == 4 + 1


def test_the_encoder_of_torch():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 6), nn.Linear(32, 3)).eval()
    inputs = torch.randn(2, 5, 32)
    whole = copy.deepcopy(model)
    report = prune_depth(model, inputs, pruning_ratio=0.5)
    assert model[0].num_layers == len(model[0].layers) == 3
    with torch.no_grad(), skipping([whole.get_submodule(block) for block in report.removed]):
        expected = whole(inputs)
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected, atol=1e-5)
