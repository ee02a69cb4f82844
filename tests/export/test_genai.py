"""A 4-bit folder in ONNX Runtime GenAI: the builder takes over its integers, the engine gives the answers."""

import json
import subprocess
import sys

import pytest
import torch

from lightning_optim import export_pretrained, quantize_post_training

transformers = pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")
engine = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai onnx-ir")
WORDS = 64


@pytest.fixture(scope="module", params=[False, True], ids=["head in float", "packed head and table"])
def model(request):
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # else all answers are nearly the same
    return quantize_post_training(
        made,
        weight_bits=4,
        activation_bits=None,
        weight_granularity="per_group:32",
        exclude=[] if request.param else ["*embed_tokens", "lm_head"],
        progress_bar=False,
    )


def tokenizer():
    """The builder copies one, and the engine reads it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    ends = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def logits(folder, ids):
    model = engine.Model(str(folder))
    options = engine.GeneratorParams(model)
    options.set_search_options(max_length=32)
    generator = engine.Generator(model, options)
    generator.append_tokens(ids.int().numpy())
    return torch.from_numpy(generator.get_output("logits").copy())


def rows_of_table(path):
    """Give scales and zero points of a packed table the rank that its operator asks for; they are written flat."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input[2:] if node.op_type == "GatherBlockQuantized" else ():
            (number,) = tensors[name].dims
            tensors[name].dims[:] = [WORDS, number // WORDS]
    onnx.save(model, path)


@pytest.mark.parametrize(("level", "most"), [(1, 1e-5), (4, 0.1)])
def test_the_engine_gives_the_answers_of_the_rounded_model(model, tmp_path, level, most):
    """At level 4, its default, the engine rounds the inputs of each product too."""
    export_pretrained(model, tmp_path / "folder", quantization="gptq", tokenizer=tokenizer())
    built = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "name", "-i", str(tmp_path / "folder")]
    built += ["-o", str(tmp_path / "engine"), "-p", "int4", "-e", "cpu", "-c", str(tmp_path / "cache")]
    if model.config.tie_word_embeddings:  # to other readers they are two weights
        config = tmp_path / "folder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    head = "shared_embeddings=true" if model.config.tie_word_embeddings else "nodes_to_exclude=/lm_head/MatMul"
    options = ["--extra_options", head, f"accuracy_level={level}"]
    ended = subprocess.run([*built, *options], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows_of_table(tmp_path / "engine" / "model.onnx")
    ids = torch.tensor([[5, 9, 33, 7, 60]])
    with torch.no_grad():
        expected = model(ids).logits
    assert (logits(tmp_path / "engine", ids) - expected).abs().max() < most
