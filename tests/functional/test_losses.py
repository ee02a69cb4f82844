"""Losses: each against ten lines written from its paper, published identities, and what holds for all."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.functional import losses
from lightning_optim.functional.losses import FEATURE_LOSSES, LOSSES, ensemble_logits

ROWS, CLASSES = 6, 5
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
TEACHER_FREE = [name for name in LOSSES if getattr(LOSSES[name], "teacher_free", False)]


def logits(seed, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype)


def call(name, student, teacher, **words):
    if "targets" in LOSSES[name].needs:
        words["targets"] = TARGETS
    return LOSSES[name](student, teacher, **words)


every_loss = pytest.mark.parametrize("name", sorted(LOSSES))
every_teaching_loss = pytest.mark.parametrize("name", sorted(set(LOSSES) - set(TEACHER_FREE)))
every_feature_loss = pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))


# What holds for all.


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_loss_is_a_float32_scalar_with_a_gradient_to_the_student_alone(name, dtype):
    student, teacher = logits(0, dtype=dtype).requires_grad_(), logits(1, dtype=dtype)
    loss = call(name, student, teacher)
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0


@every_teaching_loss
def test_every_loss_is_zero_for_equal_logits_and_positive_otherwise(name):
    assert call(name, logits(0), logits(0)).item() == pytest.approx(0.0, abs=1e-6)
    assert call(name, logits(0), logits(1)).item() > 0.01


@every_loss
@pytest.mark.parametrize("gap", [110.0, 1e4])
def test_every_loss_stays_finite_at_extreme_logits(name, gap):
    student = torch.zeros(ROWS, CLASSES)
    student[:, 0] = gap
    student.requires_grad_()
    loss = call(name, student, logits(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@every_teaching_loss
def test_shapes_must_agree(name):
    with pytest.raises(ValueError, match="same shape"):
        call(name, logits(0), logits(1)[:, :3])


@pytest.mark.parametrize("name", [name for name in sorted(LOSSES) if name not in ("mse", "cosine", "label_smoothing")])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(name, temperature):
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        call(name, logits(0), logits(1), temperature=temperature)


@every_feature_loss
def test_every_feature_loss_is_zero_for_equal_features_and_positive_otherwise(name):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2))
    assert FEATURE_LOSSES[name](one, one).item() == pytest.approx(0.0, abs=1e-6)
    assert FEATURE_LOSSES[name](one, other).item() > 1e-4
    halves = FEATURE_LOSSES[name](one.bfloat16().requires_grad_(), other.bfloat16())
    assert halves.dtype == torch.float32
    halves.backward()


@every_feature_loss
def test_feature_losses_take_another_resolution_or_width_where_they_say_so(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 3, 4, 4, generator=generator), torch.randn(4, 3, 8, 8, generator=generator)
    assert torch.isfinite(FEATURE_LOSSES[name](student, teacher))
    if name != "hint":
        assert torch.isfinite(FEATURE_LOSSES[name](student[:, :2], teacher))


# Ten lines from each paper.


def plain_kd(s, t, temperature):
    p, q = F.softmax(t / temperature, 1), F.softmax(s / temperature, 1)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def plain_logit_std(s, t, temperature):
    s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (s, t))
    return plain_kd(s, t, temperature)


def plain_dkd(s, t, temperature, alpha=1.0, beta=8.0):
    total = 0.0
    for row, true in enumerate(TARGETS.tolist()):
        p, q = F.softmax(t[row] / temperature, 0), F.softmax(s[row] / temperature, 0)
        rest = [c for c in range(CLASSES) if c != true]
        target = p[true] * (p[true] / q[true]).log() + (1 - p[true]) * ((1 - p[true]) / (1 - q[true])).log()
        p, q = p[rest] / (1 - p[true]), q[rest] / (1 - q[true])
        total += alpha * target + beta * (p * (p / q).log()).sum()
    return temperature**2 * total / ROWS


def plain_dist(s, t, temperature):
    p, q = F.softmax(t / temperature, 1), F.softmax(s / temperature, 1)
    rows = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p, q, strict=True)]).mean()
    columns = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p.t(), q.t(), strict=True)])
    return temperature**2 * (2 - rows - columns.mean())


def plain_bce(s, t, temperature):
    p = torch.sigmoid(t / temperature)
    cross = F.binary_cross_entropy_with_logits(s / temperature, p)
    return temperature**2 * (cross - F.binary_cross_entropy(p, p))


def plain_reverse_kd(s, t, temperature):
    return plain_kd(t, s, temperature)


def plain_jsd(s, t, temperature, beta=0.5):
    p, q = F.softmax(t / temperature, 1), F.softmax(s / temperature, 1)
    m = beta * p + (1 - beta) * q
    both = beta * (p * (p / m).log()).sum(1) + (1 - beta) * (q * (q / m).log()).sum(1)
    return temperature**2 * both.mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("kd", plain_kd),
        ("reverse_kd", plain_reverse_kd),
        ("jsd", plain_jsd),
        ("listwise", plain_kd),
        ("logit_std", plain_logit_std),
        ("dkd", plain_dkd),
        ("dist", plain_dist),
        ("bce", plain_bce),
    ],
)
def test_losses_with_temperature(name, plain, temperature):
    student, teacher = logits(0).double(), logits(1).double()
    expected = plain(student, teacher, temperature).item()
    assert call(name, student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_losses_without_temperature():
    s, t = logits(0), logits(1)
    assert losses.mse(s, t).item() == pytest.approx(((s - t) ** 2).sum().item() / (ROWS * CLASSES))
    angles = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(s, t, strict=True)]
    assert losses.cosine(s, t).item() == pytest.approx(1 - sum(angles) / ROWS, rel=1e-5)
    smooth = 0.9 * F.one_hot(TARGETS, CLASSES) + 0.1 / CLASSES
    expected = -(smooth * F.log_softmax(s, 1)).sum(1).mean()
    assert losses.label_smoothing(s, targets=TARGETS).item() == pytest.approx(expected.item())


def test_feature_losses():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(4, 6, 2, 2, generator=generator)
    maps = [(x**2).mean(1).flatten(1) for x in (s, t)]
    maps = [x / x.norm(dim=1, keepdim=True) for x in maps]
    assert losses.attention_transfer(s, t).item() == pytest.approx(((maps[0] - maps[1]) ** 2).mean().item(), rel=1e-5)
    grams = [x.flatten(1) @ x.flatten(1).t() for x in (s, t)]
    grams = [x / x.norm(dim=1, keepdim=True) for x in grams]
    expected = ((grams[0] - grams[1]) ** 2).sum() / 4**2
    assert losses.similarity_preserving(s, t).item() == pytest.approx(expected.item(), rel=1e-5)
    distances = []
    for x in (s.flatten(1), t.flatten(1)):
        pairs = torch.stack([(x[i] - x[j]).norm() for i in range(4) for j in range(i + 1, 4)])
        distances.append(pairs / pairs.mean())
    expected = F.smooth_l1_loss(*distances)
    assert losses.rkd(s, t).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.hint(s, s + 2.0).item() == pytest.approx(4.0)


# Published identities.


def test_kd_by_hand():
    """Teacher (0.8, 0.2), student (0.5, 0.5): 0.8 ln 1.6 + 0.2 ln 0.4."""
    teacher = torch.tensor([[0.8, 0.2]]).log()
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert losses.kd(torch.zeros(1, 2), teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_reverse_kd_by_hand():
    """Student (0.8, 0.2), teacher (0.5, 0.5): the same sum as for kd, with the two exchanged."""
    student = torch.tensor([[0.8, 0.2]]).log()
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert losses.reverse_kd(student, torch.zeros(1, 2)).item() == pytest.approx(expected, rel=1e-6)
    assert losses.kd(student, torch.zeros(1, 2), temperature=1.0).item() != pytest.approx(expected, rel=1e-2)


def test_jsd_by_hand():
    """Teacher (0.8, 0.2), student (0.4, 0.6), beta 0.25: the mixture is (0.5, 0.5)."""
    teacher, student = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()
    to_teacher = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    to_student = 0.4 * math.log(0.8) + 0.6 * math.log(1.2)
    expected = 0.25 * to_teacher + 0.75 * to_student
    assert losses.jsd(student, teacher, beta=0.25).item() == pytest.approx(expected, rel=1e-6)


def test_jsd_is_between_kd_and_reverse_kd():
    """Agarwal et al.: divided by beta it tends to KL(teacher || student) at 0, by 1 - beta to the reverse at 1."""
    student, teacher = logits(0), logits(1)
    near_kd, near_reverse = losses.jsd(student, teacher, beta=1e-4), losses.jsd(student, teacher, beta=1 - 1e-4)
    assert near_kd.item() / 1e-4 == pytest.approx(losses.kd(student, teacher, temperature=1.0).item(), rel=1e-2)
    assert near_reverse.item() / 1e-4 == pytest.approx(losses.reverse_kd(student, teacher).item(), rel=1e-2)
    assert losses.jsd(student, teacher).item() == pytest.approx(losses.jsd(teacher, student).item(), rel=1e-5)
    for beta, instead in ((0.0, "loss='kd'"), (1.0, "loss='reverse_kd'"), (-0.1, "got -0.1"), (math.nan, "got nan")):
        with pytest.raises(ValueError, match=instead):
            losses.jsd(student, teacher, beta=beta)


@pytest.mark.parametrize("name", ["kd", "reverse_kd", "jsd", "listwise"])
@pytest.mark.parametrize("both", [False, True])
def test_excluded_classes_have_no_gradient(name, both):
    """A class at -inf counts as absent; where only the teacher excludes it, the reverse divergence is infinite."""
    student, teacher = logits(0), logits(1)
    teacher[:, 0] = -torch.inf
    if both:
        student[:, 0] = -torch.inf
    loss = call(name, student.requires_grad_(), teacher)
    if name == "reverse_kd" and not both:
        assert loss.item() == math.inf
        return
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    if both:
        assert loss.item() == pytest.approx(call(name, logits(0)[:, 1:], logits(1)[:, 1:]).item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in sorted(LOSSES) if getattr(LOSSES[name], "by_rows", False)])
def test_losses_by_rows_are_means_of_one_value_a_row(name):
    targets = {"targets": TARGETS} if "targets" in LOSSES[name].needs else {}
    rows = [
        LOSSES[name](logits(0)[row, None], logits(1)[row, None], **{key: x[row, None] for key, x in targets.items()})
        for row in range(ROWS)
    ]
    assert call(name, logits(0), logits(1)).item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)


def test_every_loss_but_those_over_the_batch_goes_by_rows():
    assert {name for name in LOSSES if not getattr(LOSSES[name], "by_rows", False)} == {"dist"}


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 8.0))
def test_dkd_puts_kd_together_again(seed, temperature):
    """Zhao et al., equation 5: KD = TCKD + (1 - p of the true class) * NCKD, row by row."""
    student, teacher = logits(seed).double(), logits(seed + 1).double()
    others = (1 - F.softmax(teacher / temperature, 1).gather(1, TARGETS[:, None])).squeeze(1)
    total = 0.0
    for row in range(ROWS):
        words = {"targets": TARGETS[row : row + 1], "temperature": temperature}
        pair = student[row : row + 1], teacher[row : row + 1]
        target = losses.dkd(*pair, **words, target_weight=1.0, other_weight=0.0)
        other = losses.dkd(*pair, **words, target_weight=0.0, other_weight=1.0)
        total += (target + others[row] * other).item() / ROWS
    assert losses.kd(student, teacher, temperature=temperature).item() == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_kd_at_high_temperature_is_matching_centred_logits():
    """Hinton et al., section 2.1: at T -> infinity the loss is the squared difference of centred logits / (2 C)."""
    student, teacher = logits(0), logits(1)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    expected = (centred[0] - centred[1]).square().sum(1).mean() / (2 * CLASSES)
    assert losses.kd(student, teacher, temperature=200.0).item() == pytest.approx(expected.item(), rel=2e-2)


@settings(deadline=None, max_examples=25)
@given(shift=st.floats(-5, 5), scale=st.floats(0.2, 5))
def test_logit_std_and_dist_forgive_shift_and_scale(shift, scale):
    teacher = logits(1)
    assert losses.logit_std(scale * teacher + shift, teacher).item() == pytest.approx(0.0, abs=1e-5)
    assert losses.kd(teacher + shift, teacher).item() == pytest.approx(0.0, abs=1e-5)


def test_a_list_cut_to_the_best_items_keeps_the_others_as_negatives():
    student, teacher = logits(0), logits(1)
    best = teacher.topk(2, 1)
    p = F.softmax(best.values, 1)
    q = F.log_softmax(student, 1).gather(1, best.indices)
    expected = (p * (p.log() - q)).sum(1).mean()
    assert losses.listwise(student, teacher, top_k=2).item() == pytest.approx(expected.item(), rel=1e-5)
    teacher[:, 0] = -torch.inf  # an item that must not be shown
    assert torch.isfinite(losses.listwise(student, teacher))
    with pytest.raises(ValueError, match="top_k"):
        losses.listwise(student, teacher, top_k=9)


def test_an_ensemble_is_the_log_of_the_mean_probability():
    one, other = logits(0), logits(1)
    expected = (0.25 * F.softmax(one, 1) + 0.75 * F.softmax(other, 1)).log()
    assert torch.allclose(ensemble_logits([one, other], [1.0, 3.0]), expected, atol=1e-6)
    assert torch.equal(ensemble_logits([one], [5.0]), one)
    with pytest.raises(ValueError, match="agree in shape"):
        ensemble_logits([one, other[:, :2]], [1.0, 1.0])


def test_an_ensemble_of_binary_answers_is_the_mean_of_each_ones_probability():
    one, other = logits(0), logits(1)
    expected = 0.25 * one.sigmoid() + 0.75 * other.sigmoid()
    assert torch.allclose(ensemble_logits([one, other], [1.0, 3.0], binary=True).sigmoid(), expected, atol=1e-6)
    extreme = ensemble_logits([torch.tensor([200.0]), torch.tensor([-200.0])], [1.0, 1.0], binary=True)
    assert extreme.sigmoid().item() == pytest.approx(0.5)
    images = [x.t().reshape(1, CLASSES, ROWS) for x in (one, other)]
    expected = ensemble_logits([one, other], [1.0, 3.0]).t().reshape(1, CLASSES, ROWS)
    assert torch.allclose(ensemble_logits(images, [1.0, 3.0], dim=1), expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"bce", "mse"}))
def test_losses_over_classes_refuse_one_logit_a_row(name):
    words = {"targets": torch.zeros(ROWS).long()} if "targets" in LOSSES[name].needs else {}
    with pytest.raises(ValueError, match="at least 2"):
        LOSSES[name](logits(0)[:, :1], logits(1)[:, :1], **words)


@pytest.mark.parametrize("name", [name for name in sorted(LOSSES) if "targets" in LOSSES[name].needs])
def test_labels_that_are_no_classes_are_named(name):
    for wrong, sentence in (
        (TARGETS + 1, "from 0 to 4, got 5"),
        (TARGETS - 1, "got -1"),
        (TARGETS[:2], "one class per r"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LOSSES[name](logits(0), logits(1), targets=wrong)


def test_what_cannot_be_computed_says_so():
    with pytest.raises(ValueError, match="at least 2 rows"):
        losses.dist(logits(0)[:1], logits(1)[:1])
    with pytest.raises(ValueError, match="at least 2"):
        losses.rkd(logits(0)[:1], logits(1)[:1])
    with pytest.raises(ValueError, match="one class per row"):
        losses.dkd(logits(0), logits(1), targets=TARGETS[:2])
    with pytest.raises(ValueError, match="smoothing"):
        losses.label_smoothing(logits(0), targets=TARGETS, smoothing=2.0)
    with pytest.raises(ValueError, match="attention_transfer"):
        losses.attention_transfer(logits(0), logits(1))
    with pytest.raises(ValueError, match="same rows"):
        losses.similarity_preserving(logits(0), logits(1)[:2])
