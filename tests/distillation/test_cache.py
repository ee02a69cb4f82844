"""Cached teacher logits: the live run within float16, never another teacher's, never half a file."""

import copy
import pickle
import re
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, WeightedRandomSampler

from helpers.distilled import HINT, Teacher, distilled, teacher
from helpers.models import (
    FEATURES,
    EpochSampler,
    Files,
    assert_same_state,
    data,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim.distillation import (
    DistillationModule,
    Indexed,
    IndexedCollate,
    IndexedDataset,
    LogitCache,
    cached,
)
from lightning_optim.distillation.indexed import batches_once, reading

ROWS = 64


def loader(collate=None, rows=ROWS, dataset=None):
    dataset = IndexedDataset(data(rows)) if dataset is None else dataset
    return DataLoader(dataset, 8, sampler=EpochSampler(rows), collate_fn=collate)


def run(tmp_path, module, *callbacks, train=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    fitted = trainer(tmp_path, *callbacks, **options)
    fitted.fit(module, loader() if train is None else train, val_loader(), ckpt_path=ckpt_path)
    return fitted


def answers(rows=4, classes=3):
    return [(torch.arange(rows), torch.arange(rows * classes).view(rows, classes).float())]


def written(path, rows=4, teacher="me"):
    return LogitCache.build(path, answers(rows), teacher=teacher, rows=rows, progress=False)


# The file.


def test_what_is_written_is_read(tmp_path):
    cache = written(tmp_path / "deep" / "logits.cache")
    assert torch.equal(cache.read(torch.tensor([2, 0])), torch.tensor([[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]]))
    assert len(cache) == 4
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["logits.cache"]
    assert pickle.loads(pickle.dumps(cache)).read(3).tolist() == [[9.0, 10.0, 11.0]]
    assert copy.deepcopy(cache) is cache
    for index in (-1, 4):
        with pytest.raises(IndexError, match="outside the 4 rows"):
            cache.read(index)


def test_another_teacher_length_or_k_is_refused(tmp_path):
    path = tmp_path / "logits.cache"
    written(path)
    with pytest.raises(ValueError, match="of another teacher: me, and this run's is you"):
        LogitCache(path, teacher="you")
    with pytest.raises(ValueError, match="of another dataset length: 4, and this run's is 5"):
        LogitCache(path, rows=5)
    with pytest.raises(ValueError, match="of another `cache_top_k`: all classes, and this run's is 2"):
        LogitCache(path, top_k=2)


def test_a_file_of_0_1_is_refused(tmp_path):
    path = tmp_path / "logits.cache"
    path.write_bytes(b"LODISTL1" + bytes(100))
    with pytest.raises(ValueError, match=r"written by lightning_optim 0\.1.*Delete it, and it is computed again"):
        LogitCache(path)


@pytest.mark.parametrize("place", [9, 14, 40, 4096 + 3, 4096 + 8 * 5 + 2, -1, -7])
def test_a_damaged_file_is_refused(tmp_path, place):
    path = tmp_path / "logits.cache"
    written(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*[Dd]elete it, and it is computed again|another"):
        LogitCache(path, rows=4, teacher="me").verify()
    if place < 0:  # one sample: the others can be read
        LogitCache(path).read([0])
        with pytest.raises(ValueError, match=r"damaged: the checksum of sample [23]"):
            LogitCache(path).read([0, 2, 3])


@pytest.mark.parametrize("left", [0, 4, 10, 40, 4096, -1])
def test_a_truncated_file_is_refused(tmp_path, left):
    path = tmp_path / "logits.cache"
    written(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="truncated"):
        LogitCache(path)
    with pytest.raises(FileNotFoundError):
        LogitCache(tmp_path / "none")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_build_that_dies_leaves_nothing(tmp_path, failure):
    def dying():
        yield torch.arange(2), torch.zeros(2, 3)
        raise failure

    with pytest.raises(failure):
        LogitCache.build(tmp_path / "logits.cache", dying(), teacher="me", rows=4, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_cached_is_refused(tmp_path):
    def build(batches, rows=4):
        LogitCache.build(tmp_path / "logits.cache", batches, teacher="me", rows=rows, progress=False)

    with pytest.raises(ValueError, match="1 of 5 samples got no teacher logits"):
        build(answers(4), rows=5)
    with pytest.raises(ValueError, match="beyond float16"):
        build([(torch.arange(4), torch.full((4, 3), 1e6))])
    with pytest.raises(ValueError, match="rows of one kind"):
        build([(torch.arange(2), torch.zeros(2, 3)), (torch.arange(2, 4), torch.zeros(2, 5))])
    assert not list(tmp_path.iterdir())


def test_indexed_samples():
    dataset = IndexedDataset(data())
    assert len(dataset) == ROWS
    assert dataset[5].index == 5
    batch = next(iter(DataLoader(dataset, 4)))
    assert isinstance(batch, Indexed)
    assert batch.index.tolist() == [0, 1, 2, 3]
    own = next(iter(DataLoader(dataset, 4, collate_fn=IndexedCollate(lambda rows: len(rows)))))
    assert own.item == 4
    with pytest.raises(TypeError, match="must have a length"):
        IndexedDataset(iter([]))


# Batches fetched at once.


class Fetching(Dataset):
    """A dataset with ``__getitems__``, which notes what it was asked for."""

    def __init__(self, kind: type = list) -> None:
        self.kind, self.asked = kind, []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        raise AssertionError("one sample at a time")

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        rows = [data()[index] for index in indices]
        return rows if self.kind is list else self.kind(torch.stack(column) for column in zip(*rows, strict=True))


def same(batch):
    return batch


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("kind", "collate"), [(list, None), (list, IndexedCollate()), (tuple, IndexedCollate(same))])
def test_a_batch_is_fetched_at_once_where_the_dataset_can(kind, collate, workers):
    dataset = Fetching(kind)
    order = [[5, 2, 9], [1], [63, 0]]
    batches = list(DataLoader(IndexedDataset(dataset), batch_sampler=order, collate_fn=collate, num_workers=workers))
    assert [batch.index.tolist() for batch in batches] == order
    for (x, y), index in batches:
        assert torch.equal(x, data().tensors[0][index])
        assert torch.equal(y, data().tensors[1][index])
    assert workers or dataset.asked == order


def test_subsets_are_fetched_at_once_with_their_own_places():
    batch = next(iter(DataLoader(IndexedDataset(Subset(Fetching(), [7, 8, 9])), 2)))
    assert batch.index.tolist() == [0, 1]
    assert torch.equal(batch.item[0], data().tensors[0][[7, 8]])


def test_a_dataset_that_cannot_fetch_a_batch_has_no_such_method():
    dataset = IndexedDataset(data())
    assert not hasattr(dataset, "__getitems__")
    with pytest.raises(AttributeError, match="TensorDataset has no `__getitems__`"):
        dataset.__getitems__([0])
    assert hasattr(pickle.loads(pickle.dumps(IndexedDataset(Subset(data(), [0])))), "__getitems__")


def test_a_list_of_another_length_than_the_indices_is_rejected():
    class Columns(Fetching):
        def __getitems__(self, indices):
            return [torch.zeros(len(indices), 2), torch.zeros(len(indices))]

    with pytest.raises(ValueError, match=r"Columns returned a list of 2 for 3 indices.*tuple or dict"):
        next(iter(DataLoader(IndexedDataset(Columns()), 3, collate_fn=IndexedCollate(same))))


# The batches of the build.


class Similar(BatchSampler):
    """Batches of samples of similar length, shuffled by a generator of its own."""

    def __init__(self, rows=ROWS, size=6):
        self.rows, self.size = rows, size
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return -(-self.rows // self.size)

    def __iter__(self):
        order = sorted(range(self.rows), key=lambda row: row % 7)
        batches = [order[start : start + self.size] for start in range(0, self.rows, self.size)]
        return iter([batches[i] for i in torch.randperm(len(batches), generator=self.generator)])


def test_the_build_takes_the_batches_of_a_sampler_of_ones_own_and_training_gets_the_same(tmp_path):
    asked = []

    class Noting(Teacher):
        def forward(self, x):
            asked.append(x)
            return super().forward(x)

    def fitted():
        module = distilled(of=teacher(Noting), cache=tmp_path / "logits.cache")
        run(tmp_path, module, train=DataLoader(IndexedDataset(data()), batch_sampler=Similar()))
        return module

    module = fitted()
    built = [x[0, 0].item() for x in asked[: len(Similar())]]
    assert [len(x) for x in asked[: len(Similar())]].count(6) == ROWS // 6
    assert sorted(built) == sorted(data().tensors[0][rows[0], 0].item() for rows in Similar())
    assert_same_state(module, fitted())  # the second finds the file


def once(sampler, dataset=None):
    """Batches of indices that a build makes of a sampler's, and their loader's dataset."""
    dataset = IndexedDataset(data()) if dataset is None else dataset
    read = DataLoader(dataset, batch_sampler=sampler)
    return [batch.index.tolist() for batch in reading(read, batches_once(read))]


def in_order(size):
    return [list(range(ROWS))[start : start + size] for start in range(0, ROWS, size)]


class Endless:
    def __iter__(self):
        while True:
            yield [0, 1]


@pytest.mark.parametrize(
    ("sampler", "size"),
    [
        (BatchSampler(range(ROWS), 5, drop_last=True), 5),
        (BatchSampler(WeightedRandomSampler(torch.ones(ROWS), ROWS), 6, drop_last=False), 6),
        (BatchSampler(range(0, ROWS, 2), 4, drop_last=False), 4),  # one rank's share
        (BatchSampler([], 3, drop_last=False), 3),
        (Endless(), 2),
    ],
    ids=["drops the last", "repeats", "sharded", "empty", "endless"],
)
def test_a_sampler_that_misses_or_repeats_samples_does_not_make_the_batches(sampler, size, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert once(sampler) == in_order(size)
    assert f"{type(sampler).__name__} does not yield each of 64 samples once" in caplog.text
    assert f"in the dataset's order, {size} at a time" in caplog.text


def test_a_sampler_that_cannot_be_copied_does_not_make_the_batches(caplog):
    sampler = Similar()
    sampler.source = iter(lambda: 0, 1), (row for row in ())
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert once(sampler) == in_order(64)
    assert "Similar cannot be copied" in caplog.text


def test_the_dataset_is_not_copied_with_a_sampler_that_holds_it(caplog):
    class Heavy(Fetching):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    inner = Heavy()
    outer = IndexedDataset(inner)
    for held in (inner, outer):
        found = once(BatchSampler(RandomSampler(held, generator=torch.Generator()), 8, False), outer)
        assert sorted(chain.from_iterable(found)) == list(range(ROWS))
        assert found != in_order(8)


# Before a run.


def docs_block():
    page = Path(__file__).parents[2] / "docs" / "distillation.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "LogitCache.build" in block)
    return block


@pytest.mark.parametrize("seeds", [[11], [11, 12]])
def test_the_block_of_the_docs_writes_the_file_that_a_run_would(tmp_path, monkeypatch, seeds):
    monkeypatch.chdir(tmp_path)
    asked = []

    class Counting(Teacher):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    given = [(teacher(Counting, seed), 1.0 + place) for place, seed in enumerate(seeds)]
    exec(docs_block(), {"teacher": given, "train_set": data()})
    assert sum(asked) == ROWS * len(seeds)
    run(tmp_path, distilled(of=given, cache="teacher_logits.bin"))
    assert sum(asked) == (ROWS + 8) * len(seeds)  # no build, and the first batch is compared
    run(tmp_path, distilled(of=given, cache="direct.bin"))
    rows = [LogitCache(name).read(torch.arange(ROWS)) for name in ("teacher_logits.bin", "direct.bin")]
    torch.testing.assert_close(*rows, atol=2e-3, rtol=2e-3)  # float16, and other batches


# Runs.


def test_a_cached_run_is_a_live_run_within_float16(tmp_path):
    live, cached = distilled(), distilled(cache=tmp_path / "logits.cache")
    one = run(tmp_path, live, train=train_loader())
    two = run(tmp_path, cached)
    metrics = [{n: float(v) for n, v in each.callback_metrics.items()} for each in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=2e-2)
    rows = live.teacher.networks[0](data().tensors[0])
    stored = LogitCache(tmp_path / "logits.cache").read(torch.arange(ROWS))
    assert torch.allclose(rows, stored, atol=5e-3)


def test_the_teacher_is_asked_once_a_sample_and_resume_is_bitwise(tmp_path):
    calls = []

    class Counting(Teacher):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    path = tmp_path / "logits.cache"
    module = distilled(of=teacher(Counting), cache=path)
    run(tmp_path, module, Files(tmp_path / "files"))
    assert sum(calls) == ROWS + 8  # and the first batch once more: is it what was cached?
    written_at = path.stat().st_mtime_ns
    for epoch in range(2):
        again = distilled(cache=path)
        run(tmp_path, again, ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)
    without = DistillationModule(new(), cache=path)  # the file is enough
    run(tmp_path, without)
    assert_same_state(module, without)
    assert path.stat().st_mtime_ns == written_at


def test_caches_of_others_are_refused_at_fit_start(tmp_path):
    path = tmp_path / "logits.cache"
    run(tmp_path, distilled(cache=path), max_epochs=1)
    with pytest.raises(ValueError, match="of another teacher"):
        run(tmp_path, distilled(of=teacher(seed=12), cache=path))
    with pytest.raises(ValueError, match="of another dataset length: 64, and this run's is 32"):
        run(tmp_path, distilled(cache=path), train=loader(rows=32))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        run(tmp_path, distilled(cache=path))


def test_a_batch_without_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="IndexedDataset"):
        run(tmp_path, distilled(cache=tmp_path / "logits.cache"), train=train_loader())
    assert not list(tmp_path.glob("*.cache"))


def test_an_augmented_dataset_is_found_at_the_first_step(tmp_path):
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            x, y = data()[index]
            return x + np.random.default_rng().normal(), y

    with pytest.raises(ValueError, match="no augmentation"):
        run(tmp_path, distilled(cache=tmp_path / "logits.cache"), train=loader(dataset=IndexedDataset(Augmented())))


def test_dicts_with_an_index_and_a_collate_of_ones_own(tmp_path):
    class Dicts(DistillationModule):
        pass

    def collate(rows):
        x, y = torch.utils.data.default_collate(rows)
        return [x, y]

    module = Dicts(new(), teacher(), cache=tmp_path / "logits.cache")
    run(tmp_path, module, train=loader(IndexedCollate(collate)), max_epochs=1)
    assert module.sample_index({"index": 3}) == 3


def test_teacher_inputs_gets_the_batch_without_its_index(tmp_path):
    seen = []

    class Reads(DistillationModule):
        def teacher_inputs(self, batch):
            seen.append(type(batch))
            return batch[0]

    module = Reads(new(), teacher(), cache=tmp_path / "logits.cache")
    run(tmp_path, module, max_epochs=1)
    assert seen == [list] * (ROWS // 8 + 1)  # the build's, and the first step's that is compared


def test_teacher_inputs_gets_a_batch_too_where_projectors_are_sized_by_an_example(tmp_path):
    class Reads(DistillationModule):
        def teacher_inputs(self, batch):
            assert isinstance(batch, list)
            return batch[0]

    def module():
        return Reads(new(), teacher(), features=HINT, example_inputs=torch.zeros(2, FEATURES))

    run(tmp_path, module(), max_epochs=1)
    with pytest.raises(ValueError, match="overrides `teacher_inputs` needs a run's batch"):
        module().match_features()


def test_features_and_a_cache_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="Pass one of the two"):
        distilled(cache=tmp_path / "c", features=[("net.2", "body.2")])


def test_validation_needs_no_index(tmp_path):
    module = distilled(cache=tmp_path / "logits.cache")
    run(tmp_path, module, max_epochs=1)
    indexed = trainer(tmp_path).validate(module, DataLoader(IndexedDataset(data()), 16), verbose=False)
    assert indexed == trainer(tmp_path).validate(module, val_loader(), verbose=False)


def test_a_progress_bar_where_the_trainer_has_one(tmp_path, monkeypatch):
    log = []

    @contextmanager
    def bar(title, total, *, shown):
        log.append((title, total, shown))
        yield lambda: log.append("step")

    monkeypatch.setattr(cached, "progress_bar", bar)
    run(tmp_path, distilled(cache=tmp_path / "a.cache"), max_epochs=1)
    run(tmp_path, distilled(cache=tmp_path / "b.cache"), max_epochs=1, enable_progress_bar=True)
    run(tmp_path, distilled(cache=tmp_path / "b.cache"), max_epochs=1, enable_progress_bar=True)  # it is there
    steps = ["step"] * (ROWS // 8)
    assert log == [
        ("teacher logits -> a.cache", 8, False),
        *steps,
        ("teacher logits -> b.cache", 8, True),
        *steps,
    ]
