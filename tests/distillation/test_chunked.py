"""Rows compared in chunks, and teachers whose heads are called for the rows that count: the training is the same."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillation.test_positions import IMAGES, MAPS, SMALL, T5, made, segmentation, tokens
from helpers.distilled import HINT, distilled, teacher
from helpers.models import FEATURES, Classifier, Files, Quiet, SeededByStep, assert_same_state, data, fit, new
from lightning_optim import DistillationModule
from lightning_optim.distillation import Ramp
from lightning_optim.functional import losses
from lightning_optim.functional.losses import LOSSES

sgd = partial(torch.optim.SGD, lr=1e-2)
BY_ROWS = [name for name in sorted(LOSSES) if getattr(LOSSES[name], "by_rows", False)]


def learned(student, by, batch, **words):
    """The loss and the gradients of one step of a student that is not changed."""
    student = copy.deepcopy(student).eval()
    module = DistillationModule(student, by, optimizer=sgd, **{"alpha": 0.7, **words})
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def assert_same(left, right, within=1e-6):
    assert left[0] == pytest.approx(right[0], rel=2e-6)
    assert (left[1] - right[1]).norm() <= within * right[1].norm()


def assert_chunks_change_nothing(student, by, batch, **words):
    whole = learned(student, by, batch, chunk_size=None, **words)
    for size in (2, 7, "auto"):
        assert_same(learned(student, by, batch, chunk_size=size, **words), whole)


# Chunks.


@pytest.mark.parametrize("name", BY_ROWS)
def test_samples_with_and_without_labels(name):
    batch = [x[:8].clone() for x in data().tensors]
    batch[1][:3] = -100
    words = {"loss": name, "alpha": 1.0}
    assert_chunks_change_nothing(new(Quiet).net, teacher(), batch, **words)
    batch[1][:] = -100
    if "targets" not in LOSSES[name].needs:
        assert_chunks_change_nothing(new(Quiet).net, teacher(), batch, **words)


@pytest.mark.parametrize("name", BY_ROWS)
def test_pixels(name):
    labels = MAPS.clone()
    labels[:, :2] = -100
    assert_chunks_change_nothing(made(segmentation, 0, 4), made(segmentation, 1, 8), (IMAGES, labels), loss=name)


def test_several_losses_with_a_temperature_log_the_same():
    batch = [x[:8].clone() for x in data().tensors]
    batch[1][:3] = -100
    words = {"loss": {"kd": 1.0, "dkd": 0.5, "mse": 2.0}, "temperature": 3.0, "alpha": 1.0}
    logged = []
    for size in (None, 3):
        module = DistillationModule(new(Quiet).net.eval(), teacher(), optimizer=sgd, chunk_size=size, **words)
        module.training_step(batch, 0)
        logged.append({name: float(value) for name, value in module._step._sums.items()})
    assert logged[0].keys() == {"task", "kd", "kd/kd", "kd/dkd", "kd/mse"}
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_one_logit_a_row():
    x = data().tensors[0][:8]
    pair = made(nn.Linear, 0, FEATURES, 1), made(nn.Linear, 1, FEATURES, 1)
    assert_chunks_change_nothing(*pair, (x, torch.ones(8)))


def test_an_ensemble_that_knows_more_classes():
    batch = [x[:8] for x in data().tensors]
    ensemble = [(teacher(seed=1, classes=5), 1.0), (teacher(seed=2, classes=5), 3.0)]
    assert_chunks_change_nothing(new(Quiet).net, ensemble, batch, teacher_classes=[4, 0, 2])


KINDS = {
    "ramps": {"alpha": Ramp(0.9, 0.1), "temperature": Ramp(4.0, 1.0), "loss": {"reverse_kd": 1.0, "jsd": 1.0}},
    "features": {"features": HINT},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_chunks_is_that_of_all_rows_and_resumes_bit_for_bit(tmp_path, kind):
    """Also with dropout in the student: chunks draw no random numbers."""

    def make(size):
        return distilled(new(Classifier, dropout=0.3, optimizer="sgd"), chunk_size=size, **KINDS[kind])

    whole, chunked = make(None), make(3)
    fit(tmp_path, whole, SeededByStep())
    fit(tmp_path, chunked, SeededByStep(), Files(tmp_path / "files"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(chunked.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    again = make(3)
    fit(tmp_path, again, SeededByStep(), ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(chunked, again)
    fit(tmp_path, chunked, max_epochs=1)


def test_in_half_precision_a_run_in_chunks_learns_the_same(tmp_path):
    states = []
    for size in (None, 3):
        module = distilled(chunk_size=size)
        fit(tmp_path, module, precision="bf16-mixed", max_epochs=1)
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=5e-2, atol=5e-3)


def test_losses_over_the_batch_run_whole_or_say_so():
    batch = [x[:8] for x in data().tensors]
    assert_same(*(learned(new(Quiet).net, teacher(), batch, loss="dist", chunk_size=size) for size in ("auto", None)))
    with pytest.raises(ValueError, match=r"loss 'dist' needs all rows of a batch.*`chunk_size=4` cannot hold"):
        distilled(loss={"kd": 1.0, "dist": 1.0}, chunk_size=4)


def test_a_loss_of_the_users_goes_by_rows_if_it_says_so():
    def margin(student_logits, teacher_logits):
        rows.append(len(student_logits))
        return (student_logits - teacher_logits).abs().amax(-1).mean()

    rows = []
    batch = [x[:8] for x in data().tensors]
    with pytest.raises(ValueError, match=r"loss 'margin' needs all rows.*`loss.by_rows = True`"):
        distilled(loss=margin, chunk_size=3)
    whole = learned(new(Quiet).net, teacher(), batch, loss=margin)
    margin.by_rows = True
    assert_same(learned(new(Quiet).net, teacher(), batch, loss=margin, chunk_size=3), whole)
    assert rows == [8, 3, 3, 2]


def test_a_subclass_that_computes_the_losses_gets_all_rows():
    class Mine(DistillationModule):
        def kd_loss(self, student_logits, teacher_logits, **arguments):
            return {"kd": losses.kd(student_logits, teacher_logits)}

    with pytest.raises(ValueError, match=r"Mine.kd_loss gets all rows.*pass your function as `loss`"):
        Mine(new(), teacher(), chunk_size=3)
    Mine(new(), teacher())


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "big"])
def test_a_chunk_is_a_number_of_rows(size):
    with pytest.raises(ValueError, match="`chunk_size` must be a"):
        distilled(chunk_size=size)


def test_a_teacher_that_returns_nan_is_named_in_chunks_too():
    broken = teacher()
    broken.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the teacher returns NaN"):
        learned(new(Quiet).net, broken, [x[:8] for x in data().tensors], chunk_size=3)


# Heads.

LLAMA = {**SMALL, "num_hidden_layers": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    ),
    "CohereForCausalLM": ("CohereConfig", {**LLAMA, "logit_scale": 0.125}),
    "GraniteForCausalLM": ("GraniteConfig", {**LLAMA, "logits_scaling": 6.0}),
    "MixtralForCausalLM": ("MixtralConfig", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 2}),
    "BertForMaskedLM": ("BertConfig", SMALL),
    "T5ForConditionalGeneration": ("T5Config", T5),
}


@pytest.fixture
def build():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def make(name, seed, **words):
        config, sizes = MODELS[name]
        torch.manual_seed(seed)
        return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **words})).eval()

    return make


class Counted:
    """Counts the rows that a layer multiplies."""

    def __init__(self, layer):
        self.rows = []
        layer.register_forward_hook(lambda _, args, output: self.rows.append(args[0].shape[:-1].numel()))


every_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@every_model
def test_the_head_of_a_teacher_multiplies_only_what_counts(build, name):
    """Besides one position of each sample, which proves that its output are the logits."""
    student, by = build(name, 0), build(name, 1)
    batch = tokens(decoder="T5" in name)
    whole = learned(student, by, batch, chunk_size=None)
    head = Counted(by.get_output_embeddings())
    module = DistillationModule(student, by, optimizer=sgd, alpha=0.7, chunk_size=4)
    shifts = "T5" not in name and "Bert" not in name
    counted = int((batch["labels"][:, 1:] if shifts else batch["labels"]).ne(-100).sum())
    for _ in range(2):
        loss = module.training_step(batch, 0)
        assert loss.item() == pytest.approx(whole[0], rel=1e-5)
        assert head.rows == [3] + [4] * (counted // 4) + [counted % 4] * (counted % 4 > 0)
        head.rows.clear()
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert (gradients - whole[1]).norm() <= 1e-6 * whole[1].norm()


def test_a_teacher_of_hugging_face_computes_no_loss(build):
    student, by = build("LlamaForCausalLM", 0), build("LlamaForCausalLM", 1)
    by.loss_function = None  # calling it would raise
    for size in (None, 4):
        learned(student, by, tokens(), chunk_size=size)


def test_a_teacher_inside_a_module_of_the_users(build):
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, **batch):
            return self.net(**batch).logits

    student, by = build("LlamaForCausalLM", 0), build("LlamaForCausalLM", 1)
    whole = learned(student, by, tokens(), chunk_size=None)
    head = Counted(by.lm_head)
    assert_same(learned(student, Wrapped(by), tokens(), chunk_size=4), whole)
    assert max(head.rows) == 4


class Text(nn.Module):
    """Tokens -> logits, with a step of its own after the head."""

    def __init__(self, after=None, width=8, classes=11):
        super().__init__()
        self.table, self.head, self.after = nn.Embedding(11, width), nn.Linear(width, classes), after

    def forward(self, ids):
        logits = self.head(self.table(ids))
        return logits if self.after is None else self.after(logits)


IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))


def asserted(logits):
    assert logits.shape[1] == 6
    return logits


AFTER = {
    "another function": lambda logits: logits.sin(),
    "in place": lambda logits: logits.mul_(2.0),
    "a class in place": lambda logits: logits.index_fill_(-1, torch.tensor([2]), -9.0),
    "over positions": lambda logits: logits - logits.mean(1, keepdim=True),
    "of a fixed length": lambda logits: logits + torch.arange(6.0)[:, None],
    "of a fixed shape": lambda logits: logits.reshape(3, 6, 11),
    "asserted": asserted,
}


@pytest.mark.parametrize("after", AFTER)
def test_a_teacher_that_changes_its_heads_output_is_asked_for_all(after):
    student, by = made(Text, 0), made(Text, 1, AFTER[after])
    assert_chunks_change_nothing(student, by, (IDS, IDS))
    module = DistillationModule(student, by, optimizer=sgd, chunk_size=4)
    module.training_step((IDS, IDS), 0)
    assert module._live._heads == {0: None}


def test_a_teacher_in_the_precision_asked_for():
    student, by = made(Text, 0), made(Text, 1)
    whole = learned(student, by, (IDS, IDS), chunk_size=None, teacher_autocast=torch.bfloat16)
    assert_same(learned(student, by, (IDS, IDS), chunk_size=4, teacher_autocast=torch.bfloat16), whole, 1e-5)
    exact = learned(student, by, (IDS, IDS), chunk_size=4)
    assert (exact[1] - whole[1]).norm() > 1e-4 * whole[1].norm()
    half = made(Text, 1).bfloat16()
    whole = learned(student, half, (IDS, IDS), chunk_size=None)
    assert_same(learned(student, half, (IDS, IDS), chunk_size=4), whole, 1e-5)


def test_heads_of_an_ensemble_that_knows_more_classes():
    one, other = (made(Text, seed, None, 8, 13) for seed in (1, 2))
    heads = [Counted(net.head) for net in (one, other)]
    places = [12, *range(10)]
    assert_chunks_change_nothing(made(Text, 0), [(one, 1.0), (other, 2.0)], (IDS, IDS), teacher_classes=places)
    assert all(head.rows.count(7) == 2 for head in heads)
    mixed = [one, made(Text, 2, AFTER["another function"], 8, 13)]
    assert_chunks_change_nothing(made(Text, 0), mixed, (IDS, IDS), teacher_classes=places)


def test_a_feature_of_the_head_needs_all_of_it():
    student, by = made(Text, 0), made(Text, 1)
    for layer in ("head", ""):
        words = {"features": [("head", layer, "hint")], "chunk_size": 4}
        module = DistillationModule(student, by, optimizer=sgd, **words)
        module.training_step((IDS, IDS), 0)
        assert module._live._heads == {0: None}
    module = DistillationModule(student, by, optimizer=sgd, features=[("table", "table", "hint")], chunk_size=4)
    module.training_step((IDS, IDS), 0)
    assert module._live._heads[0].layer is by.head


def test_a_new_head_or_teacher_is_found_again():
    student, by, other = (made(Text, seed) for seed in range(3))
    module = DistillationModule(student, by, optimizer=sgd, chunk_size=4)
    first = module.training_step((IDS, IDS), 0).item()
    module.set_teacher(other)
    second = module.training_step((IDS, IDS), 0).item()
    other.head, other.table = by.head, by.table
    assert module.training_step((IDS, IDS), 0).item() == pytest.approx(first, rel=1e-6) != second


@pytest.mark.parametrize("how", ["wrapped", "in place", "its head"])
def test_a_compiled_teacher_is_asked_for_all(how):
    by = made(Text, 1)
    expected = learned(made(Text, 0), copy.deepcopy(by), (IDS, IDS), chunk_size=None)
    if how == "wrapped":
        by = torch.compile(by, backend="eager")
    else:
        (by if how == "in place" else by.head).compile(backend="eager")
    module = DistillationModule(made(Text, 0), by, optimizer=sgd, chunk_size=4)
    module.training_step((IDS, IDS), 0)
    assert module._live._heads == {0: None}
    assert_same(learned(made(Text, 0), by, (IDS, IDS), chunk_size=4), expected)


def test_classes_that_are_not_last_in_the_students_layout():
    """The teacher's head gives ``[rows, classes, positions]``, a Linear over positions: it is another layout."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.across = nn.Embedding(11, 5), nn.Linear(6, 6)

        def forward(self, ids):
            return self.across(self.table(ids).transpose(1, 2))

    labels = torch.randint(0, 5, (3, 6), generator=torch.Generator().manual_seed(1))
    labels[0] = -100
    assert_chunks_change_nothing(made(Mixer, 0), made(Mixer, 1), (IDS, labels))


def test_prompts_and_padding_have_no_part_in_the_loss():
    labels = IDS.clone()
    labels[:, :3] = -100
    by = made(Text, 1)
    head = Counted(by.head)
    module = DistillationModule(made(Text, 0), by, optimizer=sgd, alpha=1.0)
    loss = module.training_step((IDS, labels), 0)
    s, t = module.student(IDS)[:, 3:], by(IDS)[:, 3:]
    assert loss.item() == pytest.approx(losses.kd(s.flatten(0, 1), t.flatten(0, 1)).item(), rel=1e-5)
    assert head.rows == [3, 9, 18]  # one position of each, what counts, and this test's own call


def test_the_students_own_loss_is_untouched(tmp_path):
    ids = IDS.clone()

    class Student(Quiet):
        def __init__(self):
            super().__init__()
            self.net = Text()

        def forward(self, ids):
            return self.net(ids)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())

    pair = [DistillationModule(new(Student), made(Text, 1), chunk_size=size, loss="dkd") for size in (None, 2)]
    values = [module.training_step([ids, ids], 0).item() for module in pair]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
