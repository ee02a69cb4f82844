"""Small models of `transformers` with random weights, and inputs for them; nothing is downloaded."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.tensor([[5, 17, 8, 9, 41, 3, 30, 12], [6, 7, 33, 4, 11, 22, 10, 25]])
TOKENS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**TOKENS, **SIZES}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Model:
    """A class of `transformers`, the numbers of its configuration, and inputs of forward."""

    kind: str
    config: str
    numbers: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=lambda: {"input_ids": IDS})

    def configuration(self) -> Any:
        import transformers

        return getattr(transformers, self.config)(**copy.deepcopy(self.numbers))

    def make(self, config: Any = None) -> nn.Module:
        """Make it with seeded weights."""
        import transformers

        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, self.kind)(self.configuration() if config is None else config)
        return model.eval()


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SPEECH = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
SEQUENCES = {"input_ids": IDS, "decoder_input_ids": IDS}

MODELS = {
    "Llama": Model("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": Model("MistralForCausalLM", "MistralConfig", GROUPED),
    "Qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": Model("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "Gemma": Model("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    "Gemma 3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "Gemma 2": Model("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}),
    "OLMo 2": Model("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "Mixtral": Model("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "Qwen2-MoE": Model(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    ),
    "gpt-oss": Model(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "Falcon": Model(
        "FalconForCausalLM",
        "FalconConfig",
        {**TEXT, "num_attention_heads": 8, "num_kv_heads": 4, "new_decoder_architecture": True},
    ),
    "Phi": Model("PhiForCausalLM", "PhiConfig", TEXT),
    "Phi-3": Model("Phi3ForCausalLM", "Phi3Config", TEXT),
    "GPT-NeoX": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "GPT-J": Model(
        "GPTJForCausalLM", "GPTJConfig", {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
    ),
    "GPT-2": Model("GPT2LMHeadModel", "GPT2Config", {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "OPT": Model(
        "OPTForCausalLM",
        "OPTConfig",
        {**TOKENS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "max_position_embeddings": 16},
    ),
    "BERT": Model("BertForMaskedLM", "BertConfig", {**TEXT, "max_position_embeddings": 16}),
    "DeBERTa-v2": Model(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    ),
    "ModernBERT": Model(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "num_labels": 3, "local_attention": 4},
    ),
    "T5": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2}
        | {"num_heads": 4, "decoder_start_token_id": 0},
        SEQUENCES,
    ),
    "BART": Model(
        "BartForConditionalGeneration",
        "BartConfig",
        {**TOKENS, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2},
        SEQUENCES,
    ),
    "ViT": Model("ViTForImageClassification", "ViTConfig", {**SIZES, **IMAGE}, {"pixel_values": PIXELS}),
    "Swin": Model(
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [4, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 16, "patch_size": 2},
        {"pixel_values": PIXELS},
    ),
    "Whisper": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**TOKENS, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
        | {"max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1},
        {"input_features": SPEECH, "decoder_input_ids": IDS},
    ),
    "CLIP": Model(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TEXT, "max_position_embeddings": 16},
            "vision_config": {**SIZES, **IMAGE, "intermediate_size": 48},
            "projection_dim": 16,
        },
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
}


def narrow(mlp: nn.Module, width: int) -> None:
    """Keep the first channels of a gated MLP, as pruning does."""
    for name, place in (("up_proj", 0), ("gate_proj", 0), ("down_proj", 1)):
        layer = mlp.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().narrow(place, 0, width).clone())
        layer.out_features, layer.in_features = layer.weight.shape
