"""Rows of logits: where the classes are, which label belongs to which position, and what tells that a model shifts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.rows import (
    IGNORED,
    class_dims,
    labels_at,
    labels_of_next,
    rows_of,
    task_cross_entropy,
    tells_shift,
)


def of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("logits", "labels", "dims"),
    [
        ((8, 5), (8,), [1]),
        ((8, 5), None, [1]),
        ((8, 7, 5), None, [2]),
        ((8, 7, 5), (8, 7), [2]),
        ((8, 5, 7), (8, 7), [1]),
        ((8, 5, 5), (8, 5), [1, 2]),
        ((8, 7, 5), (8, 5), [1]),
        ((8, 5, 4, 6), (8, 4, 6), [1]),
        ((8, 4, 6, 5), (8, 4, 6), [3]),
        ((8, 5, 4, 6), (8, 1, 4, 6), [1]),
        ((8, 1, 4, 6), (8, 1, 4, 6), [1]),
        ((8, 1, 4, 6), (8, 4, 6), [1]),
        ((8, 5, 4, 6, 2), (8, 4, 6, 2), [1]),
        ((8, 5, 4, 6), (8, 16, 24), [1]),  # a segmentation model's logits are coarser than its labels
        ((8, 5, 4, 6), (8, 16, 18), []),
        ((8, 5, 4, 6), (8, 4, 7), []),
        ((8, 5, 4, 6), (8,), []),
        ((8, 5, 4, 6), None, []),
        ((8, 7, 5), (8, 7, 5), []),
    ],
)
def test_labels_say_which_dimension_holds_the_classes(logits, labels, dims):
    assert class_dims(logits, labels) == dims


@given(
    dims=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    classes=st.integers(5, 7),
    last=st.booleans(),
)
def test_rows_are_those_of_either_layout(dims, classes, last):
    """Whatever the number of dimensions, both layouts give the same rows and labels."""
    first = of(3, *dims, classes)
    labels = torch.randint(0, classes, (3, *dims), generator=torch.Generator().manual_seed(1))
    given_logits = first if last else first.movedim(-1, 1)
    (dim,) = class_dims(given_logits.shape, labels.shape)
    keep = labels > 1
    assert torch.equal(rows_of(given_logits, None, dim), first.flatten(0, -2))
    assert torch.equal(rows_of(given_logits, keep, dim), first[keep])
    expected = F.cross_entropy(first.flatten(0, -2), labels.flatten())
    assert torch.allclose(task_cross_entropy(given_logits, labels, dim), expected, atol=1e-6)


def test_finer_labels_are_read_at_the_pixels_of_the_logits():
    labels = torch.arange(64).view(1, 8, 8)
    assert labels_at(labels, (1, 5, 2, 2), 1).tolist() == [[[18, 22], [50, 54]]]
    assert labels_at(labels.view(1, 1, 8, 8), (1, 5, 8, 8), 1).shape == (1, 8, 8)


def test_the_label_of_a_causal_position_is_the_next_token():
    labels = torch.tensor([[1, 2, 3], [4, IGNORED, 6]])
    assert labels_of_next(labels).tolist() == [[2, 3, IGNORED], [IGNORED, 6, IGNORED]]


def test_the_loss_tells_whether_a_model_shifts():
    logits, labels = of(4, 6, 9), torch.randint(0, 9, (4, 6))
    labels[:, :2] = IGNORED
    own = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    following = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert tells_shift(logits, labels, own) is False
    assert tells_shift(logits, labels, following) is True
    assert tells_shift(logits, labels, own + 0.1) is None
    constant = torch.zeros(4, 6, 9)
    assert tells_shift(constant, labels, task_cross_entropy(constant, labels, 2)) is None


def test_the_task_of_one_logit_is_binary():
    logits, labels = of(6), torch.tensor([0, 1, 1, 0, IGNORED, 1])
    expected = F.binary_cross_entropy_with_logits(logits[labels >= 0], labels[labels >= 0].float())
    assert torch.allclose(task_cross_entropy(logits.unsqueeze(1), labels, 1), expected)
    soft = of(6, 3, seed=1).softmax(1)
    assert torch.allclose(task_cross_entropy(of(6, 3), soft, 1), F.cross_entropy(of(6, 3), soft))
