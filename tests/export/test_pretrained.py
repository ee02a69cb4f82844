"""Folders of pruned and quantized models, read by ``from_pretrained``."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.pretrained import IDS, MODELS, TOKENS, narrow
from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    WeightPruning,
    configs,
    export_pretrained,
    factorize,
    load_from_checkpoint,
    prune_channels,
    quantize_post_training,
)
from lightning_optim.functional.gptq import unpack_gptq

transformers = pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")

slow = pytest.mark.slow


def read(folder, kind):
    return getattr(transformers, kind).from_pretrained(folder, local_files_only=True).eval()


def outputs(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return getattr(found, "logits", None) if hasattr(found, "logits") else found.logits_per_image


@pytest.mark.parametrize(
    ("name", "layers", "numbers"),
    [
        ("Llama", "*mlp*", {"intermediate_size": 32}),
        pytest.param("Mistral", "*mlp*", {"intermediate_size": 32}, marks=slow),
        pytest.param("Gemma 3", "*mlp*", {"intermediate_size": 32}, marks=slow),
        ("Phi-3", "*mlp*", {"intermediate_size": 32}),
        pytest.param("GPT-NeoX", "*mlp*", {"intermediate_size": 32}, marks=slow),
        pytest.param("OPT", "*fc1", {"ffn_dim": 32}, marks=slow),
        ("BERT", "*intermediate*", {"intermediate_size": 32}),
        pytest.param("ModernBERT", "*mlp*", {"intermediate_size": 32}, marks=slow),
        ("T5", "*DenseReluDense*", {"d_ff": 32}),
        ("ViT", "*.mlp.fc1", {"intermediate_size": 32}),
        pytest.param("Whisper", "*fc1", {"encoder_ffn_dim": 32, "decoder_ffn_dim": 24}, marks=slow),
        pytest.param(
            "CLIP",
            "*fc1",
            {"text_config.intermediate_size": 32, "vision_config.intermediate_size": 24},
            marks=slow,
        ),
    ],
)
def test_a_pruned_model_is_read_again(name, layers, numbers, tmp_path):
    about = MODELS[name]
    model = about.make()
    prune_channels(model, about.inputs, scope="layer", include=[layers])
    report = export_pretrained(model, tmp_path / "folder")
    assert report.max_difference == 0.0
    loaded = read(tmp_path / "folder", about.kind)
    assert {path: configs.value_at(loaded.config, path) for path in numbers} == numbers
    assert torch.equal(outputs(loaded, about.inputs), outputs(model, about.inputs))
    assert report.parameters == sum(p.numel() for p in loaded.parameters())
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"] == [about.kind]
    assert report.files == {p.name: p.stat().st_size for p in (tmp_path / "folder").iterdir()}
    assert report.bytes == sum(report.files.values())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(tied, tmp_path):
    about = MODELS["GPT-2"]
    model = about.make()
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    report = export_pretrained(model, tmp_path / "folder")
    loaded = read(tmp_path / "folder", about.kind)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    assert torch.equal(outputs(loaded, about.inputs), outputs(model, about.inputs))
    table = 50 * 32 * 4
    others = 4 * sum(
        p.numel() for n, p in model.named_parameters() if n not in ("lm_head.weight", "transformer.wte.weight")
    )
    assert 0 < report.files["model.safetensors"] - others - table * (1 if tied else 2) < 10_000
    assert report.config == ({} if tied else {"tie_word_embeddings": (True, False)})


class Learner(pl.LightningModule):
    """An ordinary LightningModule around a causal model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = MODELS["Llama"].make().train()
        self.head = nn.Linear(2, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), 1e-3)


def fit(module, folder, *callbacks):
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(IDS.repeat(4, 1), 2))
    trainer.save_checkpoint(folder / "last.ckpt")


def test_a_checkpoint_of_pruned_channels_and_weights(tmp_path):
    module = Learner()
    channels = ChannelPruning(0.5, scope="layer", start=1, end=3, events=2, module="model", include=["*mlp*"])
    zeros = WeightPruning(0.5, start=3, end=6, every_n_steps=1, module="model", include=["*mlp*"])
    fit(module, tmp_path, channels, zeros)
    again = load_from_checkpoint(Learner, tmp_path / "last.ckpt")
    assert again.model.config.intermediate_size == 32
    export_pretrained(tmp_path / "last.ckpt", tmp_path / "folder", cls_or_module=Learner)
    loaded = read(tmp_path / "folder", "LlamaForCausalLM")
    module.eval()
    assert torch.equal(outputs(loaded, {"input_ids": IDS}), outputs(module.model, {"input_ids": IDS}))
    weights = torch.cat([p.flatten() for n, p in loaded.named_parameters() if "mlp" in n])
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_quantized_weights_are_written_rounded(tmp_path):
    model = MODELS["Llama"].make()
    quantize_post_training(model, [{"input_ids": IDS}], progress_bar=False)
    report = export_pretrained(model, tmp_path / "folder")
    loaded = read(tmp_path / "folder", "LlamaForCausalLM")
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, layer.quantized_weight())
    assert len(loaded.model.layers[0].mlp.up_proj.weight[0].unique()) < 64
    (note,) = report.notes
    assert note.startswith("Activations of 22 layers are rounded in the module and not in the folder")


@pytest.fixture
def four_bits():
    model = MODELS["Llama"].make()
    options = {"weight_bits": 4, "activation_bits": None, "weight_granularity": "per_group:16"}
    quantize_post_training(
        model, [{"input_ids": IDS}], **options, exclude=["*embed_tokens", "lm_head"], progress_bar=False
    )
    return model


def test_the_gptq_layout_holds_the_integers_of_the_layers(four_bits, tmp_path):
    from safetensors.torch import load_file

    report = export_pretrained(four_bits, tmp_path / "folder", quantization="gptq")
    assert report.packed == 21
    assert report.max_difference == 0.0
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    about = transformers.GPTQConfig(**{k: v for k, v in settings.items() if k != "quant_method"})
    assert (about.bits, about.group_size, about.sym, about.desc_act, about.format) == (4, 16, True, False, "gptq")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        assert f"{name}.weight" not in tensors
        packed = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        ours = four_bits.get_submodule(name).quantized_weight()
        assert torch.equal(unpack_gptq(packed), ours)


def test_a_head_that_shares_the_weight_of_the_table_is_packed_apart(tmp_path):
    from safetensors.torch import load_file

    numbers = {**MODELS["Llama"].make().config.to_dict(), "tie_word_embeddings": True, "vocab_size": 56}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers)).eval()
    options = {"weight_bits": 4, "activation_bits": None, "weight_granularity": "per_group:16"}
    quantize_post_training(model, [{"input_ids": IDS}], **options, progress_bar=False)
    report = export_pretrained(model, tmp_path / "folder", quantization="gptq")
    assert report.packed == 22
    assert report.config == {"tie_word_embeddings": (True, False)}
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    packed = {key: tensors[f"lm_head.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    assert torch.equal(unpack_gptq(packed), model.lm_head.quantized_weight())
    table = model.model.embed_tokens
    assert torch.equal(tensors["model.embed_tokens.weight"], table.quantized_weight())
    assert model.lm_head.weight is table.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 8, "weight_granularity": "per_group:16"}, "q_proj.* its weights have 8 bits"),
        ({"weight_bits": 4}, "its scales are per_channel"),
        ({"weight_bits": 4, "weight_granularity": "per_group:16", "exclude": ["*down_proj"]},
         r"model.layers.0-2.mlp.down_proj: Linear is not quantized"),
        ({"weight_bits": 4, "weight_granularity": "per_group:24"}, "its 32 inputs are no multiple of the group of 24"),
    ],
)  # fmt: skip
def test_layers_without_a_place_in_the_gptq_layout_are_named(options, message, tmp_path):
    model = MODELS["Llama"].make()
    quantize_post_training(model, [{"input_ids": IDS}], activation_bits=None, progress_bar=False, **options)
    with pytest.raises(ValueError, match=message):
        export_pretrained(model, tmp_path / "folder", quantization="gptq")
    assert list(tmp_path.iterdir()) == []


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 50)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def test_tokenizer_and_generation_config_come_along(tmp_path):
    model = MODELS["Llama"].make()
    model.generation_config.max_new_tokens = 7
    tokens = tokenizer()
    export_pretrained(model, tmp_path / "first", tokenizer=tokens)
    export_pretrained(model, tmp_path / "second", tokenizer=tmp_path / "first")
    for name in ("first", "second"):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / name, local_files_only=True)
        assert loaded("w7").input_ids == [7]
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        assert found.generation_config.max_new_tokens == 7
    module = Learner()
    module.tokenizer = tokens
    assert "tokenizer.json" in export_pretrained(module, tmp_path / "third").files


def test_the_student_of_a_distillation_is_exported(tmp_path):
    student = Learner()
    module = DistillationModule(student, MODELS["Llama"].make())
    report = export_pretrained(module, tmp_path / "folder")
    loaded = read(tmp_path / "folder", "LlamaForCausalLM")
    assert report.model == "LlamaForCausalLM"
    assert torch.equal(loaded.lm_head.weight, student.model.lm_head.weight)


def test_half_precision_stays(tmp_path):
    model = MODELS["Llama"].make().bfloat16()
    export_pretrained(model, tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_widths_that_differ_name_the_layers_and_the_way_out(tmp_path):
    model = MODELS["Llama"].make()
    for block, width in zip(model.model.layers, (40, 64, 24), strict=True):
        narrow(block.mlp, width)
    message = r"model\.layers\.0\.mlp\.down_proj, .*: its width differs between blocks \(24, 40, 64\), .*scope='layer'"
    with pytest.raises(ValueError, match=message):
        export_pretrained(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_low_rank_are_named(tmp_path):
    model = MODELS["Llama"].make()
    factorize(model, rank=4, criterion="svd", include=["*up_proj", "*.1.*down_proj"])
    message = (
        r"^model\.layers\.0-2\.mlp\.up_proj, model\.layers\.1\.mlp\.down_proj: each is two layers of low rank, "
        r"and the configuration of LlamaForCausalLM can only state whole ones\. .*export_onnx"
    )
    with pytest.raises(ValueError, match=message):
        export_pretrained(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    model = MODELS["Llama"].make()
    export_pretrained(model, folder)
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.undo()
    export_pretrained(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(read(folder, "LlamaForCausalLM").lm_head.weight, model.lm_head.weight)


def test_what_is_in_neither_weights_nor_configuration_is_noticed(tmp_path):
    model = MODELS["Llama"].make()
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    with pytest.raises(RuntimeError, match="the folder's model gives other answers than the module"):
        export_pretrained(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = MODELS["Llama"].make(), MODELS["GPT-2"].make()


def test_one_of_several_models_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Two holds 2 models: 'left', 'right'. Name one of them: module='left'"):
        export_pretrained(Two(), tmp_path / "folder")
    assert export_pretrained(Two(), tmp_path / "folder", module="right").model == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {}, ValueError, "Linear holds no model of transformers"),
        ("last.ckpt", {}, ValueError, "a checkpoint does not hold its class. Pass it"),
        (nn.Linear(2, 2), {"quantization": "awq"}, ValueError, "must be None or 'gptq', got 'awq'"),
        (nn.Linear(2, 2), {"cls_or_module": Learner}, TypeError, "`cls_or_module` goes with a checkpoint"),
        (7, {}, TypeError, "expected a module or the path of a checkpoint, got 7"),
    ],
)
def test_bad_input(given, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_pretrained(given, tmp_path / "folder", **options)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files and no config\.json"):
        export_pretrained(MODELS["Llama"].make(), tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        export_pretrained(MODELS["Llama"].make(), tmp_path / "notes.txt")


def test_the_report_is_a_table(tmp_path):
    model = MODELS["Llama"].make()
    for block in model.model.layers:
        narrow(block.mlp, 32)
    text = str(export_pretrained(model, tmp_path / "folder"))
    assert "model.safetensors" in text
    assert "The configuration follows the shapes: intermediate_size 64 -> 32." in text
    assert "Read back and compared: largest difference 0." in text


def test_inputs_of_the_user_are_compared(tmp_path):
    model = MODELS["Llama"].make()
    with pytest.raises(ValueError, match="cannot be called with the inputs to compare on"):
        export_pretrained(model, tmp_path / "folder", example_inputs={"images": IDS})
    export_pretrained(model, tmp_path / "folder", example_inputs=[{"input_ids": IDS}, (IDS[:1],)])
    assert TOKENS["pad_token_id"] == read(tmp_path / "folder", "LlamaForCausalLM").config.pad_token_id


def test_the_module_is_not_changed(four_bits, tmp_path):
    state = {name: value.clone() for name, value in four_bits.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    export_pretrained(four_bits, tmp_path / "folder", quantization="gptq")
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, state[name]) for name, value in four_bits.state_dict().items())
    assert four_bits.model.layers[0].mlp.up_proj.quantization_phase == "frozen"
