"""Which rows are distilled: every layout of logits, labels and masks, and models of Hugging Face as they are."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from helpers.distilled import distilled
from helpers.models import FEATURES, Quiet, data, fit, new, trainer
from lightning_optim.distillation import DistillationModule
from lightning_optim.distillation.positions import Positions, find_labels, find_logits
from lightning_optim.functional import losses
from lightning_optim.functional.losses import LOSSES

adam = partial(torch.optim.Adam, lr=1e-2)
CONTROL = partial(losses.label_smoothing, smoothing=0.0)


class Noted(DistillationModule):
    """Notes the rows that are compared."""

    def kd_loss(self, student_logits, teacher_logits, **words):
        self.__dict__["noted"] = (student_logits.detach(), teacher_logits.detach(), words)
        return super().kd_loss(student_logits, teacher_logits, **words)


def step(module, batch):
    module.eval()
    return module.training_step(batch, 0)


def plain(student, teacher, batch, cls=Noted, **words):
    """A distillation of plain modules after one step, and the step's loss."""
    module = cls(student, teacher, optimizer=adam, **{"alpha": 1.0, **words})
    return module, step(module, batch)


def made(cls, seed, *args):
    torch.manual_seed(seed)
    return cls(*args)


# Layouts.


def segmentation(width, classes=5):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, classes, 1))


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAPS = torch.randint(0, 5, (4, 6, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_pixels_are_compared_over_their_classes(name):
    student, teacher = made(segmentation, 0, 4), made(segmentation, 1, 8)
    labels = MAPS.clone()
    labels[:, :2] = -100
    _, loss = plain(student, teacher, (IMAGES, labels), loss=name)
    keep = labels != -100
    s, t = (net(IMAGES).movedim(1, -1)[keep] for net in (student, teacher))
    words = {"targets": labels[keep]} if "targets" in LOSSES[name].needs else {}
    assert loss.item() == pytest.approx(LOSSES[name](s, t, **words).item(), rel=1e-5)


def test_an_ensemble_of_segmenters_answers_over_its_classes():
    student, one, other = (made(segmentation, seed, 4) for seed in range(3))
    _, loss = plain(student, [one, other], (IMAGES, MAPS), temperature=1.0)
    rows = [net(IMAGES).movedim(1, -1).flatten(0, -2) for net in (student, one, other)]
    mean = (0.5 * rows[1].softmax(1) + 0.5 * rows[2].softmax(1)).log()
    assert loss.item() == pytest.approx(losses.kd(rows[0], mean, temperature=1.0).item(), rel=1e-5)


def test_a_segmenter_with_more_classes_teaches_those_of_the_student():
    student, teacher = made(segmentation, 0, 4), made(segmentation, 1, 4, 7)
    module, _ = plain(student, teacher, (IMAGES, MAPS), teacher_classes=[6, 0, 2, 3, 1])
    expected = teacher(IMAGES)[:, [6, 0, 2, 3, 1]].movedim(1, -1).flatten(0, -2)
    assert torch.allclose(module.noted[1], expected)


def test_images_without_labels_need_to_be_told_where_the_classes_are():
    student, teacher = made(segmentation, 0, 4), made(segmentation, 1, 4)
    with pytest.raises(ValueError, match=r"no labels tell which dimension holds the classes.*`class_dim`"):
        plain(student, teacher, IMAGES)

    class Told(Noted):
        class_dim = 1

    module, _ = plain(student, teacher, IMAGES, Told)
    assert module.noted[0].shape == (4 * 36, 5)
    labelled, _ = plain(student, teacher, (IMAGES, MAPS))
    step(labelled, IMAGES)  # an earlier batch has told it
    assert torch.equal(labelled.noted[0], module.noted[0])


@pytest.mark.parametrize("labels", [MAPS[:, :4, :4], MAPS[:, 0, 0], torch.rand(4, 5, 6, 6)], ids=lambda x: x.ndim)
def test_labels_of_another_layout_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels \(4.*\) do not tell which dimension holds the classes"):
        plain(made(segmentation, 0, 4), made(segmentation, 1, 4), (IMAGES, labels))


def test_as_many_positions_as_classes_are_read_as_the_batch_before():
    sequences, images = Positions(), Positions()
    assert sequences.dim_of(torch.zeros(2, 5, 5), torch.zeros(2, 5)) == 2
    assert images.dim_of(torch.zeros(2, 5, 5, 5), torch.zeros(2, 5, 5)) == 1
    assert sequences.dim_of(torch.zeros(2, 5, 7), torch.zeros(2, 7)) == 1
    assert sequences.dim_of(torch.zeros(2, 5, 5), torch.zeros(2, 5)) == 1
    assert images.dim_of(torch.zeros(2, 5, 5, 5), torch.zeros(2, 5, 5), told=-1) == 3


def test_a_mask_tells_the_layout_where_labels_do_not():
    positions = Positions()
    assert positions.dim_of(torch.zeros(2, 5, 4, 4), None, mask=torch.ones(2, 4, 4)) == 1


# One logit a row.


class Binary(Quiet):
    """One logit a row, as ``BCEWithLogitsLoss`` takes it."""

    def __init__(self, squeeze=True):
        super().__init__()
        self.net[-1] = nn.Linear(16, 1)
        self.squeeze = squeeze

    def forward(self, x):
        logits = self.net(x)
        return logits.squeeze(-1) if self.squeeze else logits

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]).reshape(-1), (batch[1] > 0).float())

    def validation_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize("squeeze", [True, False])
def test_one_logit_a_row_is_compared_as_a_binary_answer(squeeze):
    student, teacher = new(Binary, squeeze=squeeze), made(nn.Linear, 1, FEATURES, 1)
    batch = [x[:8] for x in data().tensors]
    module = DistillationModule(student, teacher, alpha=1.0)
    expected = losses.bce(module.eval()(batch[0]).reshape(-1, 1), teacher(batch[0]))
    assert step(module, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"bce", "mse"}))
def test_a_named_loss_that_needs_two_classes_says_so(name):
    module = distilled(new(Binary), of=nn.Linear(FEATURES, 1), loss=name, alpha=1.0)
    with pytest.raises(ValueError, match=r"needs at least 2.*loss='bce'"):
        step(module, [x[:8] for x in data().tensors])


def test_teachers_of_one_logit_are_all_heard():
    one, other = made(nn.Linear, 1, FEATURES, 1), made(nn.Linear, 2, FEATURES, 1)
    student = made(nn.Linear, 0, FEATURES, 1)
    x = data().tensors[0][:8]
    _, loss = plain(student, [(one, 1.0), (other, 3.0)], (x, torch.ones(8)))
    mean = 0.25 * one(x).sigmoid() + 0.75 * other(x).sigmoid()
    assert loss.item() == pytest.approx(losses.bce(student(x), mean.logit()).item(), rel=1e-4)
    task = step(DistillationModule(student, one, optimizer=adam, alpha=0.0), (x, torch.ones(8)))
    assert task.item() == pytest.approx(F.binary_cross_entropy_with_logits(student(x), torch.ones(8, 1)).item())


def test_several_labels_of_an_ensemble_are_averaged_one_by_one():
    one, other, student = (made(nn.Linear, seed, FEATURES, 4) for seed in (1, 2, 0))
    x = data().tensors[0][:8]
    _, loss = plain(student, [one, other], (x, torch.rand(8, 4)), loss="bce")
    mean = 0.5 * one(x).sigmoid() + 0.5 * other(x).sigmoid()
    assert loss.item() == pytest.approx(losses.bce(student(x), mean.logit()).item(), rel=1e-4)


# Labels.


def test_losses_with_labels_skip_samples_without_and_others_do_not():
    batch = [x[:8].clone() for x in data().tensors]
    batch[1][:5] = -100
    module = distilled(new(Quiet), loss={"kd": 1.0, "dkd": 1.0}, alpha=1.0)
    s, t = module.eval()(batch[0]), module.teacher.networks[0](batch[0])
    expected = losses.kd(s, t) + losses.dkd(s[5:], t[5:], targets=batch[1][5:])
    assert step(module, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    batch[1][:] = -100
    assert step(module, batch).item() == pytest.approx(losses.kd(s, t).item(), rel=1e-5)


def test_a_batch_without_labeled_positions_adds_no_distillation_loss():
    student = made(segmentation, 0, 4)
    _, loss = plain(student, made(segmentation, 1, 4), (IMAGES, torch.full_like(MAPS, -100)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in student.parameters())


def test_labels_are_what_the_forward_received_as_such_or_did_not_receive():
    ids, mask, labels = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)
    assert find_labels((ids, labels), {"x": ids}) is labels
    assert find_labels((ids, mask, labels), {"ids": ids, "attention_mask": mask}) is labels
    assert find_labels((ids, labels), {"ids": ids, "targets": labels}) is labels
    assert find_labels({"ids": ids, "labels": labels}, {}) is labels
    assert find_labels((ids, mask), {"ids": ids, "attention_mask": mask}) is None
    ends = find_labels({"start_positions": labels, "end_positions": labels + 1}, {})
    assert ends.tolist() == [[0, 1], [0, 1]]


def test_logits_are_no_scalar_and_no_integers():
    logits, loss = torch.zeros(2, 3), torch.tensor(1.0)
    assert find_logits((loss, logits)) is logits
    assert find_logits({"loss": loss, "ids": torch.zeros(2, 3).long(), "out": logits}) is logits
    assert find_logits((loss, "text")) is None
    with pytest.raises(ValueError, match="a single number"):
        plain(Mean(), Mean(), (logits,))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.scale * x).mean()


# Calls.


@pytest.mark.parametrize("extra", [1, 3])
def test_calls_without_gradient_do_not_count(extra):
    class Measures(Quiet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                for _ in range(extra):
                    self(batch[0]).argmax(-1)
            return loss

    batch = [x[:8] for x in data().tensors]
    words = {"alpha": 1.0, "features": [("net.2", "body.2", "rkd")]}
    assert step(distilled(new(Measures), **words), batch).item() == step(distilled(new(Quiet), **words), batch).item()
    with torch.no_grad():  # where nothing has a gradient, every call counts
        assert step(distilled(new(Quiet), **words), batch).item() > 0


def test_a_step_whose_own_call_has_no_gradient_is_refused(tmp_path):
    class Measures(Quiet):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self(batch[0])
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match="never called its own forward with gradients"):
        fit(tmp_path, distilled(new(Measures)))


# A language model's own step.


class Text(nn.Module):
    def __init__(self, width=8, words=11):
        super().__init__()
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, words)

    def forward(self, ids):
        return self.head(self.table(ids))


class TextStudent(Quiet):
    """A causal step of the user's own; ``ahead`` is how far its labels are from the position."""

    def __init__(self, ahead=1):
        super().__init__()
        self.net, self.ahead = Text(), ahead

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        logits = self(ids)
        if self.ahead:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("told", [None, True])
def test_a_step_that_shifts_labels_is_detected_by_its_loss(ahead, told):
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
    module = Noted(new(TextStudent, ahead=ahead), made(Text, 1), loss="dkd", alpha=1.0)
    module.shift_labels = told
    step(module, [ids, ids])
    shifts = told or ahead == 1
    assert torch.equal(module.noted[2]["targets"], (ids[:, 1:] if shifts else ids).flatten())
    assert torch.equal(module.noted[0], module.student(ids)[:, : 5 if shifts else 6].flatten(0, 1))


# Models of Hugging Face.

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BART = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
       {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()},
    "vocab_size": 40, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
VIT = {**{name: SMALL[name] for name in SMALL if "size" not in name and "token" not in name}, "hidden_size": 16,
       "intermediate_size": 16, "image_size": 16, "patch_size": 8}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}


def tokens(*, decoder=False):
    """Token batches: padded inputs, labels without padding and without the first token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (3, 7), generator=generator)
    mask, labels = torch.ones(3, 7, dtype=torch.long), torch.randint(3, 40, (3, 7), generator=generator)
    mask[0, 4:] = 0
    labels[0, 4:] = -100
    labels[:, 0] = -100
    if decoder:  # the encoder's padding is on the other side
        return {"input_ids": ids, "attention_mask": mask.flip(1), "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pictures(**labels):
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), **labels}


def heard():
    inputs = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": inputs, "labels": tokens()["labels"]}


def samples():
    return {**tokens(), "labels": torch.tensor([0, 1, 1])}


def spans():
    batch = tokens()
    batch.pop("labels")
    return {**batch, "start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 5])}


MODELS = {
    "BertForSequenceClassification": ("BertConfig", SMALL, samples),
    "BertForTokenClassification": ("BertConfig", {**SMALL, "num_labels": 40}, tokens),
    "BertForMaskedLM": ("BertConfig", SMALL, tokens),
    "BertForQuestionAnswering": ("BertConfig", SMALL, spans),
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, "resid_pdrop": 0.0}, tokens),
    "LlamaForCausalLM": ("LlamaConfig", SMALL, tokens),
    "BartForCausalLM": ("BartConfig", BART, tokens),
    "BartForConditionalGeneration": ("BartConfig", BART, partial(tokens, decoder=True)),
    "T5ForConditionalGeneration": ("T5Config", T5, partial(tokens, decoder=True)),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 20, "begin_suppress_tokens": None},
        heard,
    ),
    "ViTForImageClassification": ("ViTConfig", VIT, partial(pictures, labels=torch.tensor([0, 1, 1]))),
}  # fmt: skip


@pytest.fixture
def transformers():
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


def model(transformers, name, seed, **words):
    config, sizes, _ = MODELS[name]
    torch.manual_seed(seed)
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **words}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_labels_and_rows_are_those_of_the_models_own_loss(transformers, name):
    """Cross-entropy on the rows that are distilled is the loss that the model itself computes."""
    batch = MODELS[name][2]()
    student = model(transformers, name, 0).eval()
    module, loss = plain(student, model(transformers, name, 1), batch, loss={CONTROL: 1.0, "kd": 0.0})
    assert loss.item() == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    rows, _, words = module.noted
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2:
        assert len(rows) == (labels != -100).sum() == len(words["targets"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "positions"), [("GPT2LMHeadModel", 18), ("T5ForConditionalGeneration", 21)])
def test_without_labels_the_mask_of_the_output_counts(transformers, name, positions):
    batch = MODELS[name][2]()
    labels = batch.pop("labels")
    if "T5" in name:
        batch["decoder_input_ids"] = labels.clamp_min(0)
    module, _ = plain(model(transformers, name, 0), model(transformers, name, 1), batch)
    assert len(module.noted[0]) == positions
    if "T5" in name:
        batch["decoder_attention_mask"] = (labels != -100).long()
        step(module, batch)
        assert len(module.noted[0]) == (labels != -100).sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_shift_that_no_loss_tells_is_that_of_the_models_class(transformers):
    class Smoothed(Quiet):
        def __init__(self):
            super().__init__()
            self.net = model(transformers, "LlamaForCausalLM", 0)

        def forward(self, **batch):
            return self.net(**batch).logits

        def training_step(self, batch, batch_idx):
            logits = self(**{name: batch[name] for name in ("input_ids", "attention_mask")})
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)

    batch = tokens()
    module = Noted(new(Smoothed), model(transformers, "LlamaForCausalLM", 1), loss="dkd", alpha=1.0)
    step(module, batch)
    assert torch.equal(module.noted[2]["targets"], batch["labels"][batch["labels"] != -100])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_contrastive_model_is_distilled_by_its_logits_and_not_its_loss(transformers):
    def clip(seed):
        torch.manual_seed(seed)
        text = {**SMALL, "max_position_embeddings": 16}
        config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8)
        return transformers.CLIPModel(config)

    batch = {**tokens(), **pictures(), "return_loss": True}
    batch.pop("labels")
    student = clip(0).eval()
    module, _ = plain(student, clip(1), batch)
    assert torch.equal(module.noted[0], student(**batch).logits_per_image)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_segmenter_whose_logits_are_coarser_than_its_labels(transformers):
    def segformer(seed):
        torch.manual_seed(seed)
        words = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
        words |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        config = transformers.SegformerConfig(**words, decoder_hidden_size=16, num_labels=5)
        return transformers.SegformerForSemanticSegmentation(config)

    labels = torch.randint(0, 5, (3, 16, 16))
    labels[0] = 255  # what this model's loss leaves out
    batch = pictures(labels=labels)
    student = segformer(0).eval()
    module, _ = plain(student, segformer(1), batch, loss="dkd")
    rows = student(**batch).logits.movedim(1, -1)[1:].flatten(0, -2)
    assert rows.shape == (2 * 16, 5)
    assert torch.allclose(module.noted[0], rows, atol=1e-6)
    assert torch.equal(module.noted[2]["targets"], labels[1:, 2::4, 2::4].flatten())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:You defined a `validation_step`:UserWarning")
def test_a_language_model_learns_the_next_token_from_the_control(transformers, tmp_path):
    """Compared with its own token it would learn to repeat it."""
    ids = torch.randint(3, 40, (32, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 1::2] = (ids[:, ::2] * 7 + 3) % 37 + 3
    batch = {"input_ids": ids, "labels": ids.clone()}
    module = DistillationModule(
        model(transformers, "LlamaForCausalLM", 0), loss="label_smoothing", alpha=0.9,
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
    )  # fmt: skip
    trainer(tmp_path, max_epochs=40).fit(module, DataLoader([0], collate_fn=lambda _: batch))
    said = module.student.eval()(input_ids=ids).logits.argmax(-1)
    assert (said[:, ::2] == ids[:, 1::2]).float().mean() > 0.9


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_losses_of_single_entries_take_outputs_of_any_layout(loss):
    """A forecast ``[rows, steps, series, quantiles]`` has no dimension of classes, and needs none."""
    student, teacher = made(segmentation, 0, 4), made(segmentation, 1, 8)
    targets = torch.randn(4, 5, 6, 6)
    module, value = plain(student, teacher, (IMAGES, targets), loss=loss, task_loss=F.mse_loss)
    expected = LOSSES[loss](student(IMAGES).reshape(-1, 1), teacher(IMAGES).reshape(-1, 1))
    torch.testing.assert_close(value if isinstance(value, torch.Tensor) else value["loss"], expected)
    assert module.noted[0].numel() == targets.numel()
    with pytest.raises(ValueError, match="do not tell which dimension holds the classes"):
        plain(student, teacher, (IMAGES, targets), loss={loss: 0.5, "kd": 0.5}, task_loss=F.mse_loss)


def test_a_teacher_with_other_inputs_raises_with_the_method_to_override():
    class Named(nn.Module):
        def forward(self, graph):
            return graph.nodes

    with pytest.raises(ValueError, match=r"teacher Named fails with .*: float32 \(4, 3, 6, 6\).*`teacher_inputs"):
        plain(made(segmentation, 0, 4), Named(), (IMAGES, MAPS))
