"""Caches of k words and of texts of different lengths: equal to the live teacher, killed and continued, divided."""

import contextlib
import copy
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distillation.killed_worker import BATCH, fit
from distillation.killed_worker import ROWS as KILLED_ROWS
from helpers.distilled import distilled, teacher
from helpers.models import CLASSES, EpochSampler, Files, assert_same_state, data, new, trainer, val_loader
from lightning_optim.distillation import DistillationModule, IndexedCollate, IndexedDataset, LogitCache
from lightning_optim.distillation.cache_file import Identity
from lightning_optim.distillation.cache_parts import Part, join_parts, parts_of, samples_in
from lightning_optim.distillation.cached import CachedTeacher
from lightning_optim.functional.losses import LOSSES, TopK, kd, top_k_of

WORKER = Path(__file__).with_name("killed_worker.py")
ON_TOP_K = sorted(name for name in LOSSES if getattr(LOSSES[name], "top_k", False))
TEXTS, WORDS, PAD = 24, 40, 39


# What is asked.


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(ON_TOP_K)))
def test_losses_that_need_all_logits_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"loss '{name}' needs more than that. .*kd.*leave out `cache_top_k`"):
        distilled(loss={"kd": 1.0, name: 0.5}, cache=tmp_path / "c", cache_top_k=2)


def test_a_callable_says_itself_whether_k_words_will_do(tmp_path):
    def own(student_logits, teacher_logits):
        return kd(student_logits, teacher_logits)

    with pytest.raises(ValueError, match="loss 'own' needs more"):
        distilled(loss=own, cache=tmp_path / "c", cache_top_k=2)
    own.top_k = True
    run(tmp_path, distilled(loss=own, cache=tmp_path / "c", cache_top_k=2), max_epochs=1)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"cache_top_k": 2}, ValueError, "pass its file too"),
        ({"cache": "c", "cache_top_k": 0}, ValueError, "whole number >= 1, got 0"),
        ({"cache": "c", "cache_top_k": 2.0}, ValueError, r"whole number >= 1, got 2\.0"),
        ({"cache": "c", "cache_top_k": True}, ValueError, "whole number >= 1, got True"),
        ({"cache": "c", "cache_top_k": "all"}, ValueError, "whole number >= 1, got 'all'"),
    ],
)
def test_arguments_are_checked_when_the_module_is_made(words, error, message):
    with pytest.raises(error, match=message):
        distilled(**words)


def test_more_words_than_classes_are_refused_at_fit_start(tmp_path):
    with pytest.raises(ValueError, match="`cache_top_k` is 4, and the teacher has 3 classes"):
        run(tmp_path, distilled(cache=tmp_path / "c", cache_top_k=4))
    assert not [path for path in tmp_path.iterdir() if "c" in path.suffixes or path.name.startswith(".c")]


# Classes.


def loader(rows=64):
    return DataLoader(IndexedDataset(data(rows)), 8, sampler=EpochSampler(rows))


def run(tmp_path, module, *callbacks, train=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    fitted = trainer(tmp_path, *callbacks, **options)
    fitted.fit(module, loader() if train is None else train, val_loader(), ckpt_path=ckpt_path)
    return fitted


def parameters(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.student.parameters()])


@pytest.mark.parametrize("name", ON_TOP_K)
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
def test_k_equal_to_the_classes_is_the_live_teacher_within_float16(tmp_path, name, temperature):
    live = distilled(loss=name, temperature=temperature)
    cached = distilled(loss=name, temperature=temperature, cache=tmp_path / "c", cache_top_k=CLASSES)
    one, two = run(tmp_path, live), run(tmp_path, cached)
    metrics = [{n: float(v) for n, v in fitted.callback_metrics.items()} for fitted in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=5e-3)
    start = torch.cat([parameter.detach().flatten() for parameter in new().parameters()])
    moved = (parameters(live) - start).norm()
    assert (parameters(live) - parameters(cached)).norm() < 2e-2 * moved  # Adam divides by the size of small gradients


def test_resumed_is_uninterrupted_and_a_second_fit_needs_no_teacher(tmp_path, caplog):
    path = tmp_path / "c"
    module = distilled(cache=path, cache_top_k=2)
    with caplog.at_level("INFO", "lightning.pytorch"):
        run(tmp_path, module, Files(tmp_path / "files"))
    line = (
        rf"Teacher from '{path}': the 2 likeliest of 3 classes and the rest, 14 bytes a sample, 64 samples, 0\.0 MB\."
    )
    assert re.search(line, caplog.text)
    written_at = path.stat().st_mtime_ns
    for epoch in range(2):
        again = DistillationModule(new(), cache=path, cache_top_k=2)
        run(tmp_path, again, ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)
    fitted = run(tmp_path, again, max_epochs=1)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(again, loader(), val_loader())
    assert path.stat().st_mtime_ns == written_at
    file = torch.load(tmp_path / "files" / "2.ckpt", weights_only=True)
    assert all(name.startswith("student.") for name in file["state_dict"])


def test_several_teachers_and_chosen_classes(tmp_path):
    wide = [(teacher(seed=11, classes=5), 1.0), (teacher(seed=12, classes=5), 3.0)]
    words = {"of": wide, "cache": tmp_path / "c", "cache_top_k": 2, "loss": "kd"}
    live = distilled(of=wide, teacher_classes=[4, 0, 2], loss="kd")
    run(tmp_path, distilled(teacher_classes=[4, 0, 2], **words), max_epochs=1)
    stored = LogitCache(tmp_path / "c").read(torch.arange(64))
    inputs = data(64).tensors[0]
    combined = live.teacher.combine([network(inputs) for network in live.teacher.networks])[:, [4, 0, 2]]
    expected = top_k_of(combined, 2)
    for one, other in zip(stored, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)
    whole = {**words, "cache": tmp_path / "all", "cache_top_k": None}
    run(tmp_path, distilled(teacher_classes=[4, 0, 2], **whole), max_epochs=1)
    run(tmp_path, distilled(teacher_classes=[4, 0, 1], **whole), max_epochs=1)  # the file holds the logits of all
    assert LogitCache(tmp_path / "all").identity.classes == 5
    with pytest.raises(ValueError, match="of another choice of `teacher_classes`"):
        run(tmp_path, distilled(teacher_classes=[4, 0, 1], **words), max_epochs=1)


def test_files_of_another_kind_are_refused_at_fit_start(tmp_path):
    path = tmp_path / "c"
    run(tmp_path, distilled(cache=path, cache_top_k=2), max_epochs=1)
    with pytest.raises(ValueError, match="of another `cache_top_k`: 2, and this run's is 1"):
        run(tmp_path, distilled(cache=path, cache_top_k=1))
    with pytest.raises(ValueError, match="of another `cache_top_k`: 2, and this run's is all classes"):
        run(tmp_path, distilled(cache=path))
    with pytest.raises(ValueError, match="of another teacher"):
        run(tmp_path, distilled(of=teacher(seed=12), cache=path, cache_top_k=2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the checksum of sample 63 .* Delete it"):
        run(tmp_path, DistillationModule(new(), cache=path, cache_top_k=2), max_epochs=1)
    wide = [(torch.arange(64), torch.randn(64, 5))]
    LogitCache.build(path, wide, teacher="me", rows=64, top_k=2, progress=False)
    with pytest.raises(ValueError, match=r"the student has 3 classes, and the cache .* of a teacher with 5"):
        run(tmp_path, DistillationModule(new(), cache=path, cache_top_k=2))


# Texts.


def texts(side="right"):
    """Texts of different lengths with a prompt that is not learned, padded by the batch."""
    random = np.random.default_rng(3)
    lengths = random.integers(3, 12, TEXTS)
    samples = [torch.from_numpy(random.integers(0, PAD, length)) for length in lengths]

    def collate(rows):
        longest = max(map(len, rows))
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, PAD),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for row, ids in enumerate(rows):
            place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
            batch["input_ids"][row, place] = ids
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, place] = torch.cat([torch.full((2,), -100), ids[2:]])
        return batch

    return samples, collate


class Writer(pl.LightningModule):
    """A causal language model of transformers, that nobody here wrote."""

    def __init__(self, width=16, kind="llama"):
        super().__init__()
        import transformers

        torch.manual_seed(width)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
        if kind == "t5":
            config = transformers.T5Config(
                d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=WORDS, dropout_rate=0.0,
                decoder_start_token_id=PAD, eos_token_id=0, pad_token_id=PAD,
            )  # fmt: skip
            self.model = transformers.T5ForConditionalGeneration(config)
        else:
            config = transformers.LlamaConfig(
                hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=WORDS,
                tie_word_embeddings=False, **ends,
            )  # fmt: skip
            self.model = transformers.LlamaForCausalLM(config)
            with torch.no_grad():  # sure of itself, as trained ones are
                self.model.get_output_embeddings().weight.mul_(20.0)

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted_on_texts(tmp_path, kind="llama", side="right", epochs=2, shuffle=True, workers=0, **words):
    samples, collate = texts(side)
    module = DistillationModule(Writer(16, kind), Writer(32, kind), alpha=0.9, temperature=1.0, **words)
    torch.manual_seed(0)
    fitting = trainer(tmp_path, max_epochs=epochs)
    dataset = IndexedDataset(samples)
    fitting.fit(module, DataLoader(dataset, 5, shuffle=shuffle, collate_fn=IndexedCollate(collate)))
    return module, float(fitting.callback_metrics["distillation/kd"])


@pytest.mark.parametrize(("kind", "side"), [("llama", "right"), ("llama", "left"), ("t5", "right")])
def test_texts_of_different_lengths_learn_what_the_live_teacher_says(tmp_path, kind, side):
    live, expected = fitted_on_texts(tmp_path, kind, side)
    start = parameters(DistillationModule(Writer(16, kind)))
    for name, k in (("all", None), ("words", WORDS), ("few", 8)):
        cached, value = fitted_on_texts(tmp_path, kind, side, cache=tmp_path / name, cache_top_k=k)
        distance = (parameters(cached) - parameters(live)).norm() / (parameters(live) - start).norm()
        if k == 8:
            assert 1e-4 < distance < 0.5
            assert 0.5 * expected < value <= 1.001 * expected
        else:
            assert distance < 3e-3
            assert value == pytest.approx(expected, rel=3e-3)


def test_rows_compared_in_chunks_learn_the_same(tmp_path):
    one, value = fitted_on_texts(tmp_path, cache=tmp_path / "c", cache_top_k=8, chunk_size=None)
    other, in_chunks = fitted_on_texts(tmp_path, cache=tmp_path / "c", cache_top_k=8, chunk_size=7)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=1e-5, atol=1e-6)
    assert value == pytest.approx(in_chunks, rel=1e-5)


def test_only_positions_that_count_are_stored(tmp_path):
    samples, _ = texts()
    fitted_on_texts(tmp_path, cache=tmp_path / "c", cache_top_k=8, epochs=1)
    cache = LogitCache(tmp_path / "c")
    # Position 1 predicts the first label, and the last position has one of its own, should the student not shift.
    assert cache.counts(range(TEXTS)).tolist() == [len(ids) - 1 for ids in samples]
    assert cache.bytes_per_row == 6 * 8 + 2
    assert cache.path.stat().st_size == 4096 + 12 * TEXTS + 8 + 50 * sum(len(ids) - 1 for ids in samples)
    kept = cache.read([3])
    assert isinstance(kept, TopK)
    assert kept.words.shape == (len(samples[3]) - 1, 8)
    teacher = Writer(32)
    live = top_k_of(teacher(input_ids=samples[3].unsqueeze(0)).logits[0, 1:], 8)
    assert torch.equal(live.words, kept.words)
    torch.testing.assert_close(live.log_probabilities, kept.log_probabilities, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(live.rest, kept.rest, rtol=2e-3, atol=2e-3)


def test_labels_that_the_step_makes_itself_are_asked_for(tmp_path):
    """The batch does not tell its padding, so the number of rows of a sample would depend on its neighbours."""
    samples, collate = texts()

    class Hides(Writer):
        def training_step(self, ids, batch_idx):
            return self.model(input_ids=ids, labels=ids.masked_fill(ids == PAD, -100)).loss

        def forward(self, ids):
            return self.model(input_ids=ids)

    module = DistillationModule(
        Hides(16), Hides(32).model, logits_from="model", cache=tmp_path / "c", cache_top_k=8, alpha=0.9
    )
    train = DataLoader(
        IndexedDataset(samples), 5, shuffle=True, collate_fn=IndexedCollate(lambda rows: collate(rows)["input_ids"])
    )
    with pytest.raises(ValueError, match=r"holds \d+ rows of sample \d+, and \d+ of its positions count.*`targets"):
        trainer(tmp_path, max_epochs=1).fit(module, train)


# Killed, and gone on.


@pytest.mark.slow
def test_a_killed_build_goes_on_and_writes_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole" / "c", tmp_path / "killed" / "c"
    batches = KILLED_ROWS // BATCH
    assert fit(whole, 2, 0) == batches + 1  # and the proof in the first step
    ended = subprocess.run([sys.executable, str(WORKER), str(killed), "2", "4"], capture_output=True, timeout=500)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not killed.exists()
    (part,) = parts_of(killed)
    part.write_bytes(part.read_bytes()[:-3])  # and the power failed in the middle of the third record
    assert fit(killed, 2, 0) == batches - 2 + 1
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts_of(killed)


def parts(folder, batches, identity=None):
    """Write batches to as many parts as there are lists of them."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    identity = identity or Identity("me", 12, 7, 3)
    logits = [torch.randn(sample % 4, 7) for sample in range(12)]  # texts of 0 to 3 rows
    for rank, own in enumerate(batches):
        part = Part(folder / f".c.part{rank}")
        for batch in own:
            rows = torch.cat([logits[sample] for sample in batch])
            part.add(identity, batch, [len(logits[sample]) for sample in batch], top_k_of(rows, 3))
        part.close()
    return logits


ONE = [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]


@pytest.mark.parametrize(
    "divided",
    [
        [ONE[0][0::2], ONE[0][1::2]],
        [ONE[0][:1], [], ONE[0][1:]],
        [[[11, 3, 0], [7, 2]], [[1, 4, 5, 6], [8, 9, 10]]],  # similar lengths, say
        [ONE[0], ONE[0][1:]],  # twice
    ],
    ids=["two", "three", "another order", "repeated"],
)
def test_parts_of_ranks_join_to_the_bytes_of_one(tmp_path, divided):
    for name, batches in (("one", ONE), ("divided", divided)):
        parts(tmp_path / name, batches)
        join_parts(tmp_path / name / "c", parts_of(tmp_path / name / "c"), 12)
    assert (tmp_path / "one" / "c").read_bytes() == (tmp_path / "divided" / "c").read_bytes()
    cache = LogitCache(tmp_path / "divided" / "c")
    cache.verify()
    assert cache.counts(range(12)).tolist() == [0, 1, 2, 3] * 3


def test_samples_in_any_order_and_without_rows(tmp_path):
    logits = parts(tmp_path, ONE)
    join_parts(tmp_path / "c", parts_of(tmp_path / "c"), 12)
    cache = LogitCache(tmp_path / "c", top_k=3)
    for index in ([7, 0, 2], [5], [0, 4], []):
        expected = top_k_of(torch.cat([logits[sample] for sample in index] or [torch.zeros(0, 7)]), 3)
        stored = copy.deepcopy(cache).read(index)
        assert torch.equal(stored.words, expected.words)
        torch.testing.assert_close(stored.log_probabilities, expected.log_probabilities, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored.rest, expected.rest, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_whole_records_before_a_torn_one_are_held(tmp_path):
    parts(tmp_path, [*ONE, []])
    (part,) = parts_of(tmp_path / "c")
    content = part.read_bytes()
    ends = []
    for end in range(len(content), 0, -1):
        part.write_bytes(content[:end])
        held = int(samples_in([part], 12).sum())
        ends.append(held)
    assert ends[0] == 12
    assert sorted(set(ends)) == [0, 4, 8, 12]
    assert ends == sorted(ends, reverse=True)
    part.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    assert int(samples_in([part], 12).sum()) == 8  # its checksum does not fit
    with pytest.raises(ValueError, match="is of another teacher: me, and this run's is you"):
        samples_in([part], 12, teacher="you")


def test_a_run_that_finds_another_writing_says_so(tmp_path):
    path = tmp_path / "c"
    busy = Part(tmp_path / ".c.part0")
    module = distilled(cache=path, cache_top_k=2)
    busy.add(
        Identity(module.teacher.checksum(), 64, CLASSES, 2, "", -1), [0], [1], top_k_of(torch.randn(1, CLASSES), 2)
    )
    with contextlib.closing(busy), pytest.raises(RuntimeError, match=r"another run is writing .*part0"):
        run(tmp_path, module)
    assert busy.path.exists()


def test_parts_of_another_teacher_are_not_silently_lost(tmp_path):
    parts(tmp_path, ONE)
    with pytest.raises(ValueError, match=r"\.c\.part0' is of another"):
        run(tmp_path, distilled(cache=tmp_path / "c", cache_top_k=2))


# Numbers.


def test_what_float16_cannot_hold(tmp_path):
    def build(logits, k=2):
        return LogitCache.build(
            tmp_path / "c", [(torch.arange(len(logits)), logits)], teacher="me", rows=len(logits), top_k=k,
            progress=False,
        )  # fmt: skip

    excluded = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf], [1e6, 0.0, 0.0, 0.0], [60.0, 0.0, -1.0, -2.0]])
    for k in (1, 2, 3, 4):
        stored = build(excluded, k).read([0, 1, 2])
        assert all(torch.isfinite(tensor.float()).all() for tensor in stored)
        exact = top_k_of(excluded, k)
        torch.testing.assert_close(stored.log_probabilities.exp(), exact.log_probabilities.exp(), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(stored.rest.exp(), exact.rest.exp(), rtol=1e-2, atol=1e-7)
    assert build(excluded, 1).read([2]).rest.item() == pytest.approx(
        -60 + np.log(1 + np.exp(-1) + np.exp(-2)), rel=1e-3
    )
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite, so they cannot be cached"):
            build(torch.tensor([[bad, 0.0, 0.0]]))


def test_a_loop_of_ones_own_stores_the_positions_that_it_counts(tmp_path):
    logits = torch.randn(3, 5, 7)
    counted = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    cache = LogitCache.build(
        tmp_path / "c", [([2, 0, 1], logits, counted)], teacher="me", rows=3, top_k=7, progress=False
    )
    assert cache.counts([0, 1, 2]).tolist() == [4, 0, 2]
    torch.testing.assert_close(
        cache.read([2]).log_probabilities, top_k_of(logits[0, :2], 7).log_probabilities, rtol=1e-3, atol=1e-4
    )


def test_the_head_of_a_teacher_is_called_for_some_rows_at_a_time(tmp_path, monkeypatch):
    fitted_on_texts(tmp_path, cache=tmp_path / "whole", cache_top_k=8)
    heads = []
    attach = Writer.__init__

    def counting(self, width, *args):
        attach(self, width, *args)
        if width == 32:
            self.model.lm_head.register_forward_hook(
                lambda _layer, _args, output: heads.append(output.shape[:-1].numel())
            )

    monkeypatch.setattr(Writer, "__init__", counting)
    monkeypatch.setattr("lightning_optim.distillation.cached.chunk_rows", lambda size, rows, classes: 4)
    monkeypatch.setattr(CachedTeacher, "_prove", lambda *_: None)  # it compares a whole batch
    fitted_on_texts(tmp_path, cache=tmp_path / "parts", cache_top_k=8)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert heads
    assert max(heads) <= 5  # a batch has five samples, of which the forward itself needs one position
