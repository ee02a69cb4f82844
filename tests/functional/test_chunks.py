"""Losses of some rows at a time: values and gradients are those of all rows at once."""

import pytest
import torch

from lightning_optim.functional.chunks import RowPlaces, chunk_rows, loss_by_chunks
from lightning_optim.functional.losses import LOSSES
from lightning_optim.functional.rows import rows_of

BY_ROWS = [name for name in sorted(LOSSES) if getattr(LOSSES[name], "by_rows", False)]
LAYOUTS = {"samples": ((9, 5), 1), "sequences": ((3, 4, 5), 2), "images": ((2, 5, 3, 2), 1)}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def made(shape, seed=0):
    return 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(name, layout, size, *, masked, weight=0.7):
    """Value and gradient of all rows at once, and of ``size`` rows at a time."""
    shape, dim = LAYOUTS[layout]
    positions = (*shape[:dim], *shape[dim + 1 :])
    keep = made(positions, 2) > -0.5 if masked else None
    whole, chunked = (made(shape).requires_grad_() for _ in range(2))
    teacher = rows_of(made(shape, 1), keep, dim)
    labels = torch.randint(0, 5, (len(teacher),), generator=torch.Generator().manual_seed(3))
    needs = "targets" in LOSSES[name].needs

    def loss(student, part):
        return LOSSES[name](student, teacher[part], **({"targets": labels[part]} if needs else {}))

    expected = loss(rows_of(whole, keep, dim), slice(None))
    (weight * expected).backward()

    def compare(student, part):
        share = loss(student, part) * len(student) / len(teacher)
        return share, torch.stack([share, 2 * share])

    total, sums = loss_by_chunks(chunked, RowPlaces.of(chunked, dim, keep), size, compare)
    (weight * total).backward()
    return (expected, whole.grad), (total, sums, chunked.grad)


@every_layout
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BY_ROWS)
def test_values_and_gradients_are_those_of_all_rows_at_once(name, layout, masked):
    for size in (1, 4, 100):
        (expected, gradient), (total, sums, own) = both(name, layout, size, masked=masked)
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert sums.tolist() == pytest.approx([total.item(), 2 * total.item()], rel=1e-6)
        assert not sums.requires_grad
        assert (own - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_has_the_dtype_of_the_logits_and_does_not_underflow(dtype):
    """The mean over 100,000 rows has gradients below the smallest number of float16; a scaled loss brings them back."""
    rows, scale = 100_000, 2.0**16
    student, teacher = made((rows, 3)).to(dtype).requires_grad_(), made((rows, 3), 1)

    def compare(own, part):
        share = LOSSES["kd"](own, teacher[part]) * len(own) / rows
        return share, share.detach()[None]

    total, _ = loss_by_chunks(student, RowPlaces.of(student, 1), 30_000, compare)
    (total * scale).backward()
    wide = student.detach().float().requires_grad_()
    (LOSSES["kd"](wide, teacher) * scale).backward()
    assert student.grad.dtype == dtype
    error = (student.grad.float() - wide.grad).norm() / wide.grad.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_the_backward_pass_runs_twice_but_has_no_derivative_of_its_own():
    student, teacher = made((6, 5)).requires_grad_(), made((6, 5), 1)

    def compare(own, part):
        share = LOSSES["kd"](own, teacher[part]) * len(own) / 6
        return share, share.detach()[None]

    total, _ = loss_by_chunks(student, RowPlaces.of(student, 1), 2, compare)
    (once,) = torch.autograd.grad(total, student, retain_graph=True)
    (again,) = torch.autograd.grad(total, student, retain_graph=True)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match=r"no second derivative.*`chunk_size=None`"):
        torch.autograd.grad(total, student, create_graph=True)


def test_without_gradients_only_the_value_is_computed():
    seen = []

    def compare(own, part):
        seen.append((own.requires_grad, torch.is_grad_enabled(), len(own)))
        return own.sum(), own.sum()[None]

    logits = made((5, 3))
    total, _ = loss_by_chunks(logits, RowPlaces.of(logits, 1), 2, compare)
    assert total.item() == pytest.approx(logits.sum().item(), rel=1e-5)
    with torch.no_grad():
        loss_by_chunks(logits.requires_grad_(), RowPlaces.of(logits, 1), 2, compare)
    assert seen == [(False, False, rows) for rows in (2, 2, 1)] * 2


def test_all_at_once_below_64_megabytes_and_then_16():
    assert chunk_rows("auto", 15_999, 1_000) == 15_999
    assert chunk_rows("auto", 16_000, 1_000) == 4_000
    assert chunk_rows("auto", 3, 10**9) == 1
    assert chunk_rows(None, 10**9, 10**9) == 10**9
    assert chunk_rows(5, 3, 2) == 3
    assert chunk_rows("auto", 0, 5) == 0
