"""Models of `transformers`, from tiny configurations without weights."""

import copy

import pytest
import torch

from helpers.marks import cells
from lightning_optim.structured.prune import prune_channels

pytest.importorskip("transformers", reason="the models of transformers: pip install 'transformers==5.24.*'")

IDS = {"input_ids": torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind, config, **words):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**words)).eval()


MODELS = {
    # name: (class, configuration, its words, inputs, inner widths that are halved, attentions that are)
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT, IDS, 2, 2),
    "BERT, tied": ("BertForMaskedLM", "BertConfig", TEXT, IDS, 2, 2),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, IDS, 2, 2),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        | {"image_size": 32, "patch_size": 8},
        PIXELS,
        2,
        2,
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        PIXELS,
        5,
        0,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        PIXELS,
        3,
        0,
    ),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [2, 1], "num_heads": [4, 4], "window_size": 4, "image_size": 32, "patch_size": 4},
        PIXELS,
        3,
        3,
    ),
}
INNER = ("intermediate.dense", "mlp.up_proj", "fc1", "pwconv1", "layer.0.convolution")


@pytest.mark.parametrize("name", cells(list(MODELS), quick=["ViT", "Swin"]))
def test_inner_widths_and_heads_are_halved(name):
    kind, config, words, inputs, widths, attentions = MODELS[name]
    model = build(kind, config, **words)
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(inputs))
    shape = call(model).logits.shape
    report = prune_channels(model, inputs, scope="layer")
    halved = {n: pair for n, pair in report.channels.items() if pair[1] * 2 == pair[0]}
    assert sum(n.endswith(INNER) for n in halved) == widths
    assert sum("attention" in n or "attn" in n for n in halved) == attentions
    model.train()
    logits = call(model).logits
    assert logits.shape == shape
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_heads_of_bert_are_removed_as_if_they_were_zero():
    model = build("BertModel", "BertConfig", **TEXT)
    zeroed = copy.deepcopy(model)
    prune_channels(model, IDS, scope="layer", include=["*.self.*"])
    for small, dense in zip(model.encoder.layer, zeroed.encoder.layer, strict=True):
        attention = small.attention.self
        assert (attention.num_attention_heads, attention.attention_head_size) == (2, 8)
        dense_rows = dense.attention.self.value.weight
        kept = [i for i in range(32) if any(torch.equal(dense_rows[i], row) for row in attention.value.weight)]
        assert len(kept) == 16
        assert len({i // 8 for i in kept}) == 2
        with torch.no_grad():
            dense.attention.output.dense.weight[:, [i for i in range(32) if i not in kept]] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**IDS).last_hidden_state, zeroed(**IDS).last_hidden_state)


def test_a_model_of_other_layers_says_which_it_has():
    words = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    model = build("GPT2LMHeadModel", "GPT2Config", **words, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match=r"can remove nothing: lm_head \(shared with transformer\.wte\.weight\)"):
        prune_channels(model, IDS, exclude=["transformer.h.*"])
