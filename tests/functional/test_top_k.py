"""Losses on k words and the rest: exact at k = classes, a lower bound at fewer, gradients as written out."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.functional.losses import LOSSES, TopK, over_top_k, top_k, top_k_of

ON_TOP_K = sorted(name for name in LOSSES if getattr(LOSSES[name], "top_k", False))
every_loss = pytest.mark.parametrize("name", ON_TOP_K)

ROWS, CLASSES = 6, 9


def logits(seed, scale=3.0, rows=ROWS, classes=CLASSES):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def written_out(student, teacher, k, temperature):
    """KL of k + 1 probabilities at a temperature, from the definition, in float64."""
    total = 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):
        words = t.argsort(descending=True)[:k]
        coarse = []
        for p in (s.softmax(-1), t.softmax(-1)):
            coarse.append(torch.cat([p[words], p.sum(-1, keepdim=True) - p[words].sum(-1, keepdim=True)]))
        p, q = ((x ** (1 / temperature)) / (x ** (1 / temperature)).sum() for x in coarse)
        total = total + (q * (q / p).log()).sum()
    return temperature**2 * total / len(student)


def test_kd_and_listwise_have_a_form_on_k_words():
    assert {"kd", "listwise"} <= set(ON_TOP_K)
    assert not {"mse", "cosine", "dkd", "dist", "bce", "logit_std", "label_smoothing"} & set(ON_TOP_K)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, CLASSES - 1])
def test_value_and_gradient_are_those_of_the_definition(k, temperature):
    student, teacher = logits(0), logits(1)
    ours, theirs = student.clone().requires_grad_(), student.clone().double().requires_grad_()
    loss = LOSSES["kd"](*over_top_k(ours, top_k_of(teacher, k)), temperature=temperature)
    expected = written_out(theirs, teacher, k, temperature)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@every_loss
@pytest.mark.parametrize("k", [CLASSES - 1, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_all_words_or_one_less_it_is_the_loss_of_all_classes(name, k, temperature):
    both = [logits(0).requires_grad_() for _ in range(2)]
    losses = [
        LOSSES[name](both[0], logits(1), temperature=temperature),
        LOSSES[name](*over_top_k(both[1], top_k_of(logits(1), k)), temperature=temperature),
    ]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    torch.testing.assert_close(both[1].grad, both[0].grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_at_temperature_1_more_words_see_more_up_to_all(seed, scale):
    student, teacher = logits(seed, scale), logits(seed + 1, scale)
    seen = [
        LOSSES["kd"](*over_top_k(student, top_k_of(teacher, k)), temperature=1.0).item() for k in range(1, CLASSES + 1)
    ]
    assert all(low <= high + 1e-4 * (1 + high) for low, high in pairwise(seen))
    assert seen[-1] == pytest.approx(LOSSES["kd"](student, teacher, temperature=1.0).item(), rel=1e-4, abs=1e-5)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_zero_for_a_student_that_differs_within_the_rest_alone(name, temperature):
    teacher = logits(1)
    kept = top_k_of(teacher, 3)
    student = teacher.clone()
    for row, words in zip(student, kept.words, strict=True):
        others = torch.ones(CLASSES, dtype=torch.bool)
        others[words] = False
        row[others] = row[others].flip(0)  # the same mass, otherwise divided
    assert LOSSES[name](*over_top_k(student + 5.0, kept), temperature=temperature).item() == pytest.approx(0, abs=1e-5)
    assert LOSSES[name](*over_top_k(logits(2), kept), temperature=temperature).item() > 0.01


def test_a_tiny_rest_keeps_its_digits():
    """1 - sum of the k probabilities would be 0 here."""
    row = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    kept = top_k_of(row, 1)
    assert kept.rest.item() == pytest.approx(float(torch.tensor(3.0).log()) - 30.0, rel=1e-5)
    student = row.clone().requires_grad_()
    ours, _ = over_top_k(student, kept)
    ours.log_softmax(-1)[0, 1].backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1.0, 1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_float32_and_a_gradient_of_their_own(dtype):
    student = logits(0).to(dtype).requires_grad_()
    ours, theirs = over_top_k(student, top_k_of(logits(1).to(dtype), 4))
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.float32)
    LOSSES["kd"](ours, theirs).backward()
    assert student.grad.dtype == dtype
    exact = student.detach().float().requires_grad_()
    LOSSES["kd"](*over_top_k(exact, top_k_of(logits(1).to(dtype), 4))).backward()
    torch.testing.assert_close(student.grad.float(), exact.grad, rtol=2e-2, atol=2e-3)


def test_excluded_words_of_the_teacher_and_the_student():
    """A teacher that excludes all of the rest, and words among the k: no NaN, neither in value nor in gradient."""
    teacher = logits(1)
    teacher[:, 2:] = -torch.inf
    for k in (1, 2, 5, CLASSES):
        student = logits(0).requires_grad_()
        loss = LOSSES["kd"](*over_top_k(student, top_k_of(teacher, k)), temperature=2.0)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
    both = logits(0)
    both[:, 2:] = -torch.inf
    both.requires_grad_()
    ours, _ = over_top_k(both, top_k_of(teacher, 2))
    F.cross_entropy(ours, torch.zeros(ROWS, dtype=torch.long)).backward()
    assert torch.isfinite(both.grad).all()


def test_blocks_of_rows_and_rows_at_once_are_the_same(monkeypatch):
    results = []
    for size in (1, 2 * CLASSES, 1 << 20):
        monkeypatch.setattr(top_k, "_BLOCK", {"cpu": size})
        student = logits(0).requires_grad_()
        kept = top_k_of(logits(1), 3)
        LOSSES["kd"](*over_top_k(student, kept)).backward()
        results.append((*kept, student.grad))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_chunks_of_rows_add_up_to_all_rows():
    student, teacher = logits(0), top_k_of(logits(1), 3)
    whole = LOSSES["kd"](*over_top_k(student, teacher))
    parts = [LOSSES["kd"](*over_top_k(student[part], teacher.rows(part))) for part in (slice(0, 2), slice(2, 6))]
    assert (2 * parts[0] + 4 * parts[1]).item() / ROWS == pytest.approx(whole.item())
    assert LOSSES["kd"](*over_top_k(student[:0], teacher.rows(slice(0, 0)))).isnan()  # the mean of nothing


def test_no_other_tensor_of_the_size_of_the_logits_is_made(monkeypatch):
    monkeypatch.setattr(top_k, "_BLOCK", {"cpu": 1 << 14})
    rows, classes = 256, 4096
    teacher = logits(1, rows=rows, classes=classes)
    student = logits(0, rows=rows, classes=classes).requires_grad_()
    made = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                made[storage.data_ptr()] = storage.nbytes() // 4
            return result

    with Watch():
        kept = top_k_of(teacher, 32)
        ours, theirs = over_top_k(student, kept)
        loss = LOSSES["kd"](ours, theirs)
    given = {teacher.data_ptr(), student.data_ptr()}
    assert max(size for storage, size in made.items() if storage not in given) <= 2 * rows * 33
    made.clear()
    with Watch():
        loss.backward()
    assert [storage for storage, size in made.items() if size >= rows * classes and storage not in given] == [
        student.grad.data_ptr()
    ]


@pytest.mark.parametrize("rows", [[0, 2, 5], [4], [5, 0, 1, 2, 3, 4], []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_are_those_of_an_index(rows, dtype, monkeypatch):
    monkeypatch.setattr(top_k, "_BLOCK", {"cpu": 2 * CLASSES})
    rows = torch.tensor(rows, dtype=torch.long)
    both = [logits(0).to(dtype).requires_grad_() for _ in range(2)]
    kept = top_k_of(logits(1)[rows], 3)
    pairs = [over_top_k(both[0], kept, rows=rows), over_top_k(both[1][rows], kept)]
    for ours, theirs in pairs:
        (ours.log_softmax(-1) * theirs.exp()).sum().backward()
    assert torch.equal(pairs[0][0], pairs[1][0])
    torch.testing.assert_close(both[0].grad, both[1].grad)
    absent = [row for row in range(ROWS) if row not in rows.tolist()]
    assert not both[0].grad[absent].any()


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_k_beyond_the_classes_is_rejected(k):
    with pytest.raises(ValueError, match=f"from 1 to the 9 classes, got {k}"):
        top_k_of(logits(0), k)


def test_other_rows_or_fewer_classes_are_rejected():
    kept = top_k_of(logits(0), 4)
    for student in (logits(0)[:3], logits(0)[:, :3]):
        with pytest.raises(ValueError, match="the teacher has 6 rows of 4 words"):
            over_top_k(student, kept)
    with pytest.raises(ValueError, match="at least 2"):
        over_top_k(logits(0)[:, :1], TopK(torch.zeros(6, 1), torch.zeros(6, 1), torch.zeros(6)))
