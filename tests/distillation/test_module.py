"""DistillationModule: the teacher out of reach, outputs of all kinds, ramps, and what refuses."""

import copy
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from helpers.distilled import HINT, Teacher, distilled, teacher
from helpers.models import (
    CLASSES,
    FEATURES,
    Classifier,
    Files,
    Quiet,
    assert_same_state,
    data,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim.distillation import DistillationModule, Ramp, student_only
from lightning_optim.distillation import Teacher as Handle
from lightning_optim.functional import losses
from lightning_optim.functional.losses import LOSSES
from lightning_optim.target import ForwardInputs

BATCH = [x[:8] for x in data().tensors]
adam = partial(torch.optim.Adam, lr=1e-2)


def step(module, batch=BATCH):
    module.eval()
    return module.training_step(batch, 0)


# The teacher.


def test_the_teacher_is_out_of_reach(tmp_path):
    module = distilled()
    network = module.teacher.networks[0]
    assert all(name.startswith("student.") for name in module.state_dict())
    assert not {id(p) for p in module.parameters()} & {id(p) for p in network.parameters()}
    module.train()
    module.double()
    module.to("meta")
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in network.parameters())


def test_a_teacher_that_is_woken_sleeps_again_and_learns_nothing(tmp_path):
    class Wakes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.teacher.networks[0].train()

    module = distilled()
    before = module.teacher.checksum()
    fit(tmp_path, module, Wakes())
    assert module.teacher.checksum() == before
    assert module.teacher.networks[0].body[1].num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_teacher_computes_in_its_own_precision(tmp_path, dtype, precision):
    seen = []

    class Looks(Teacher):
        def forward(self, x):
            seen.append((x.dtype, super().forward(x).dtype, torch.is_grad_enabled()))
            return super().forward(x)

    fit(tmp_path, distilled(of=teacher(Looks).to(dtype)), precision=precision, max_epochs=1)
    assert set(seen) == {(dtype, dtype, False)}


def test_a_teacher_under_autocast():
    seen = []

    class Looks(Teacher):
        def forward(self, x):
            seen.append(super().forward(x).dtype)
            return super().forward(x)

    step(distilled(new(Quiet), of=teacher(Looks), teacher_autocast=torch.bfloat16))
    assert seen == [torch.bfloat16]


def test_a_teacher_moves_to_its_inputs():
    handle = Handle([teacher()])
    inputs = ForwardInputs((torch.zeros(2, FEATURES, device="meta"),))
    assert handle.logits(inputs, lambda output: output).device.type == "meta"


def test_checksums_tell_teachers_apart():
    same = [Handle([teacher()]).checksum() for _ in range(2)]
    assert same[0] == same[1]
    others = [Handle([teacher(seed=12)]), Handle([teacher(), teacher()]), Handle([teacher()], [2.0])]
    others.append(Handle([teacher().bfloat16()]))
    assert len({same[0], *(handle.checksum() for handle in others)}) == 5


def test_an_ensemble_teaches_its_mean_probability():
    one, other = teacher(), teacher(seed=12)
    module = distilled(new(Quiet), of=[(one, 1.0), (other, 3.0)], alpha=1.0, temperature=1.0)
    x = BATCH[0]
    loss = step(module)
    expected = (0.25 * one(x).softmax(1) + 0.75 * other(x).softmax(1)).log()
    assert loss.item() == pytest.approx(losses.kd(module(x), expected, temperature=1.0).item(), rel=1e-5)
    assert isinstance(distilled(of=[one, other]).teacher, Handle)


def test_what_is_no_teacher():
    with pytest.raises(TypeError, match="`teacher` must be a module"):
        distilled(of="resnet")
    with pytest.raises(ValueError, match="a weight > 0"):
        distilled(of=[(teacher(), 0.0)])
    with pytest.raises(ValueError, match="one or several"):
        distilled(of=[])


def test_self_distillation_takes_a_copy(tmp_path):
    student = new(Quiet)
    with pytest.raises(ValueError, match="share 8 parameters"):
        DistillationModule(student, student)
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        DistillationModule(student, student.net)
    assert student.training
    fit(tmp_path, DistillationModule(student, copy.deepcopy(student)), max_epochs=1)
    assert all(p.requires_grad for p in student.parameters())


def test_a_teacher_that_is_a_lightning_module(tmp_path):
    fit(tmp_path, distilled(of=teacher(Classifier, width=32)), max_epochs=1)


def test_without_teacher_all_but_training_works(tmp_path):
    module = DistillationModule(new())
    run = trainer(tmp_path)
    run.validate(module, val_loader(), verbose=False)
    run.test(module, val_loader(), verbose=False)
    run.predict(module, val_loader())
    with pytest.raises(MisconfigurationException, match="needs a teacher to train"):
        fit(tmp_path, module)
    module.set_teacher(teacher())
    fit(tmp_path, module, max_epochs=1)
    fit(tmp_path, DistillationModule(new(), loss="label_smoothing", alpha=1.0), max_epochs=1)


def test_a_teacher_of_nan_is_named(tmp_path):
    broken = teacher()
    broken.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="the teacher returns NaN"):
        fit(tmp_path, distilled(of=broken))


# Averages, precision, compilation.


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
def test_averages_share_the_teacher(tmp_path, average):
    module, callback = distilled(), average()
    sizes = []

    class Looks(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            copied = callback._average_model.module
            sizes.append((copied.teacher is pl_module.teacher, sum(p.numel() for p in copied.parameters())))

    fit(tmp_path, module, Looks(), callback, Files(tmp_path / "files"))
    assert sizes == [(True, sum(p.numel() for p in module.student.parameters()))]
    again = distilled()
    fit(tmp_path, again, average(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions_resume_bitwise(tmp_path, precision):
    module = distilled(features=HINT)
    run = fit(tmp_path, module, Files(tmp_path / "files"), precision=precision)
    again = distilled(features=HINT)
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt", precision=precision)
    assert_same_state(module, again)
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


@pytest.mark.slow
def test_compiled_networks_train_as_eager_ones(tmp_path):
    eager, compiled = distilled(new(Quiet)), distilled(new(Quiet))
    compiled.student.net.compile()
    compiled.teacher.networks[0].compile()
    named = distilled(new(Quiet), logits_from="net")
    named.student.net.compile()
    for module in (eager, compiled, named):
        fit(tmp_path, module, max_epochs=1)
    for module in (compiled, named):
        for name, value in eager.state_dict().items():
            assert torch.allclose(value.float(), module.state_dict()[name].float(), atol=1e-5), name


def test_features_inside_a_compiled_network_are_refused(tmp_path):
    module = distilled(features=[("net.2", "body.2", "rkd")])
    module.student.net.compile()
    with pytest.raises(MisconfigurationException, match=r"'net.2' is inside 'net', which is compiled"):
        fit(tmp_path, module)


# The loss.


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_trains_and_logs(tmp_path, name):
    module = distilled(loss=name)
    before = copy.deepcopy(module.student)
    run = fit(tmp_path, module, max_epochs=1)
    logged = run.callback_metrics
    assert {name for name in logged if "distillation" in name} == {
        f"distillation/{part}" for part in ("task", "kd", name)
    }
    assert logged[f"distillation/{name}"] == logged["distillation/kd"]
    assert not torch.equal(before.net[0].weight, module.student.net[0].weight)


def test_several_losses_have_weights_and_names(tmp_path):
    module = distilled(new(Quiet), loss={"kd": 1.0, "dkd": 0.5, losses.mse: 2.0}, alpha=1.0)
    s, t = module.eval()(BATCH[0]), module.teacher.networks[0](BATCH[0])
    expected = losses.kd(s, t) + 0.5 * losses.dkd(s, t, targets=BATCH[1]) + 2.0 * losses.mse(s, t)
    assert step(module).item() == pytest.approx(expected.item(), rel=1e-5)
    module.train()
    run = fit(tmp_path, module, max_epochs=1)
    logged = run.callback_metrics
    assert {f"distillation/kd/{n}" for n in ("kd", "dkd", "mse")} <= logged.keys()
    assert all(logged[f"distillation/{n}"] == logged[f"distillation/kd/{n}"] for n in ("dkd", "mse"))


def test_a_loss_may_be_any_callable_with_its_own_options():
    module = distilled(new(Quiet), loss=partial(losses.dkd, other_weight=0.5, temperature=2.0), alpha=1.0)
    s, t = module.eval()(BATCH[0]), module.teacher.networks[0](BATCH[0])
    expected = losses.dkd(s, t, targets=BATCH[1], temperature=2.0, other_weight=0.5)
    assert step(module).item() == pytest.approx(expected.item(), rel=1e-5)
    own = distilled(new(Quiet), loss=lambda s, t: (s - t).abs().max(), alpha=1.0)
    assert step(own).item() == pytest.approx((own(BATCH[0]) - t).abs().max().item(), rel=1e-5)


def test_temperature_none_is_each_losss_own():
    module = distilled(new(Quiet), loss="dist", temperature=None, alpha=1.0)
    s, t = module.eval()(BATCH[0]), module.teacher.networks[0](BATCH[0])
    assert step(module).item() == pytest.approx(losses.dist(s, t, temperature=1.0).item(), rel=1e-5)


def test_ramps_follow_the_run_and_a_resumed_run_keeps_its_window(tmp_path):
    def make():
        return distilled(
            alpha=Ramp(0.9, 0.1, "cosine", end=0.5), temperature={"initial": 4.0, "final": 1.0, "start": 4}
        )

    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at = trainer.global_step
            seen.append((pl_module._ramps.alpha.value(at), pl_module._ramps.temperature.value(at)))

    module = make()
    fit(tmp_path, module, Notes(), Files(tmp_path / "files"))
    assert seen[0] == (0.9, 4.0)
    assert seen[6][0] == pytest.approx(0.5)
    assert seen[12][0] == 0.1
    assert seen[4][1] == 4.0
    assert seen[14][1] == pytest.approx(2.5)
    whole = list(seen)
    for epoch in range(2):
        seen.clear()
        again = make()
        fit(tmp_path, again, Notes(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert seen == whole[8 * (epoch + 1) :]
        assert_same_state(module, again)
    seen.clear()
    fit(tmp_path, make(), Notes(), ckpt_path=tmp_path / "files" / "0.ckpt", max_epochs=6)
    assert seen[: len(whole) - 8] == whole[8:]
    seen.clear()
    fit(tmp_path, module, Notes(), max_epochs=1)  # a new Trainer: a new window
    assert seen[0] == (0.9, 4.0)
    assert seen[4][0] == 0.1


# Outputs and inputs of all kinds.


class Plain(nn.Module):
    def __init__(self, wrap=lambda logits: logits) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(FEATURES, CLASSES), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


KINDS = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, "more"),
    "dict": lambda logits: {"hidden": logits * 2, "logits": logits},
    "nameless dict": lambda logits: {"out": logits},
    "output": lambda logits: SimpleNamespace(logits=logits),
}


def test_outputs_of_all_kinds_give_the_same_loss():
    found = set()
    for wrap in KINDS.values():
        torch.manual_seed(0)
        module = DistillationModule(Plain(wrap), Plain(KINDS["tuple"]), optimizer=adam)
        found.add(step(module).item())
    assert len(found) == 1
    with pytest.raises(TypeError, match="Override `get_logits"):
        module.get_logits("text")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hugging_face_models_and_their_padding(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 4}

    def model(layers):
        config = transformers.BertConfig(num_hidden_layers=layers, **sizes)
        return transformers.BertForTokenClassification(config)

    module = DistillationModule(model(1), model(2), optimizer=adam, alpha=1.0, temperature=1.0)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 2:] = 0
    batch = {"input_ids": torch.randint(0, 50, (3, 6)), "attention_mask": mask, "labels": torch.zeros(3, 6).long()}
    loss = step(module, batch)
    s, t = (each(**batch).logits[mask.bool()] for each in (module.student, module.teacher.networks[0]))
    assert s.shape == (14, 4)
    assert loss.item() == pytest.approx(losses.kd(s, t, temperature=1.0).item(), rel=1e-4)
    half = DistillationModule(module.student, module.teacher, optimizer=adam, alpha=0.5, temperature=1.0)
    task = module.student(**batch).loss
    assert step(half, batch).item() == pytest.approx(0.5 * (task + loss).item(), rel=1e-4)


def test_a_mask_that_does_not_fit_is_refused():
    class Masks(DistillationModule):
        def padding_mask(self, batch, inputs):
            return torch.ones(2, 2)

    torch.manual_seed(0)
    module = Masks(nn.Linear(4, 3), nn.Linear(4, 3), optimizer=adam, task_loss=lambda logits, y: logits.mean())
    with pytest.raises(ValueError, match="the padding mask"):
        step(module, [torch.zeros(2, 5, 4), torch.zeros(2)])


def test_a_teacher_may_read_the_batch_differently():
    class Words(DistillationModule):
        def teacher_inputs(self, batch):
            return (batch[0][:, :6],)

    module = Words(new(Quiet), nn.Linear(6, CLASSES), alpha=1.0)
    t = module.teacher.networks[0](BATCH[0][:, :6])
    assert step(module).item() == pytest.approx(losses.kd(module(BATCH[0]), t).item(), rel=1e-5)


def test_a_teacher_with_more_classes():
    big = teacher(classes=7)
    with pytest.raises(ValueError, match=r"\(8, 3\) and the teacher's \(8, 7\).*teacher_classes"):
        step(distilled(new(Quiet), of=big))
    module = distilled(new(Quiet), of=big, teacher_classes=[6, 0, 2], alpha=1.0)
    t = big(BATCH[0])[:, [6, 0, 2]]
    assert step(module).item() == pytest.approx(losses.kd(module(BATCH[0]), t).item(), rel=1e-5)


class CallsItsNet(Quiet):
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return {"loss": loss, "more": 1}


def test_a_step_that_calls_a_submodule_names_it(tmp_path):
    with pytest.raises(RuntimeError, match=r"never called its own forward.*`logits_from`.*the layers are net"):
        fit(tmp_path, distilled(new(CallsItsNet)))
    outputs = step(distilled(new(CallsItsNet), logits_from="net"))
    assert outputs["more"] == 1
    assert outputs["loss"].item() == pytest.approx(step(distilled(new(Quiet))).item())


def test_two_calls_in_a_step_are_averaged():
    class Twice(Quiet):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) + 0 * self(batch[0] * 2).sum()

    module = distilled(new(Twice), alpha=1.0)
    network = module.teacher.networks[0]
    both = [losses.kd(module.eval()(x), network(x)) for x in (BATCH[0], 2 * BATCH[0])]
    assert step(module).item() == pytest.approx(sum(both).item() / 2, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_step_that_skips_a_batch(tmp_path):
    class Skips(Quiet):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    fit(tmp_path, distilled(new(Skips)), max_epochs=1)


# Plain students.


def test_a_plain_student_runs_as_is(tmp_path):
    def make():
        torch.manual_seed(0)
        return DistillationModule(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)), teacher(),
                                  optimizer=adam, features=[("0", "body.0")])  # fmt: skip

    module = make()
    run = fit(tmp_path, module, Files(tmp_path / "files"))
    assert "val_loss" in run.callback_metrics
    again = make()
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)
    run.test(module, val_loader(), verbose=False)
    assert torch.cat(run.predict(module, val_loader())).shape == (64, CLASSES)
    file = torch.load(student_only(tmp_path / "files" / "2.ckpt", tmp_path / "student.ckpt"), weights_only=True)
    assert_same_state(module.student, file["state_dict"])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_unlabelled_batches_teach_with_alpha_1(tmp_path):
    module = DistillationModule(Plain(), teacher(), optimizer=adam, alpha=1.0)
    trainer(tmp_path, max_epochs=1).fit(module, torch.utils.data.DataLoader(data().tensors[0], 8))


def test_a_plain_student_with_a_task_loss_and_a_subclass_with_its_own():
    module = DistillationModule(Plain(), optimizer=adam, alpha=0.0, task_loss=lambda logits, y: logits.sum())
    assert step(module).item() == pytest.approx(module(BATCH[0]).sum().item(), rel=1e-5)

    class Mine(DistillationModule):
        def task_loss(self, output, batch):
            return output.mean()

    module = Mine(Plain(), optimizer=adam, alpha=0.0)
    assert step(module).item() == pytest.approx(module(BATCH[0]).mean().item(), rel=1e-5)


def test_labels_are_found_or_asked_for():
    module = DistillationModule(Plain(), optimizer=adam)
    assert module.targets({"x": 1, "labels": 2}) == 2
    for batch in (torch.zeros(2), [torch.zeros(2)], {"x": 1}):
        with pytest.raises(TypeError, match="Override `targets"):
            module.targets(batch)


# Files.


def test_hyperparameters_never_hold_networks(tmp_path):
    class Mine(DistillationModule):
        def __init__(self, student, teacher=None, note="none", **words):
            super().__init__(student, teacher, **words)
            self.save_hyperparameters()

    module = Mine(new(), teacher(), note="kept", loss=losses.kd)
    assert dict(module.hparams) == {"note": "kept"}
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    again = Mine.load_from_checkpoint(tmp_path / "files" / "0.ckpt", student=new(), weights_only=True)
    assert again.hparams["note"] == "kept"
    assert_same_state(module, again)


def test_the_student_alone_keeps_its_hyperparameters(tmp_path):
    class Odd(Classifier):
        def __init__(self, width=16, activation=None):
            super().__init__(width)
            self.save_hyperparameters()

    module = distilled(new(Odd, width=20, activation=F.relu))
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    torch.load(tmp_path / "files" / "0.ckpt", weights_only=True)
    for source in (module, tmp_path / "files" / "0.ckpt"):
        path = student_only(source, tmp_path / "deep" / "student.ckpt")
        assert_same_state(module.student, Odd.load_from_checkpoint(path, weights_only=True))
        assert trainer(tmp_path).test(new(Odd, width=20), val_loader(), path, verbose=False)


def test_what_holds_no_student(tmp_path):
    with pytest.raises(TypeError, match="expected a DistillationModule"):
        student_only(new(), tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError):
        student_only(tmp_path / "none.ckpt", tmp_path / "a.ckpt")
    fit(tmp_path, new(), Files(tmp_path / "files"), max_epochs=1)
    with pytest.raises(ValueError, match="holds no student"):
        student_only(tmp_path / "files" / "0.ckpt", tmp_path / "a.ckpt")


def test_a_file_with_projectors_loads_without_teacher_or_features(tmp_path):
    module = distilled(features=HINT)
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    alone = DistillationModule.load_from_checkpoint(tmp_path / "files" / "0.ckpt", student=new(), weights_only=True)
    assert_same_state(module, alone)


# What refuses.


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        ({"temperature": 0}, ValueError, r"`temperature` must be a number > 0 \(4.0 is usual\), got 0"),
        ({"alpha": 2}, ValueError, r"`alpha` must be a weight in \[0, 1\], got 2"),
        ({"alpha": Ramp(0.5, 1.5)}, ValueError, "`alpha` must be a weight"),
        ({"alpha": "half"}, TypeError, "`alpha` must be a number or a Ramp"),
        ({"alpha": {"initial": 1, "final": 0, "schedule": "curve"}}, ValueError, "unknown schedule 'curve'"),
        ({"loss": "kdd"}, ValueError, "unknown loss 'kdd'; known: bce"),
        ({"loss": 3}, TypeError, "a loss is a registered name"),
        ({"loss": ["kd", "dkd"]}, TypeError, "a loss is a registered name"),
        ({"loss": {}}, ValueError, "at least one loss"),
        ({"loss": {"kd": -1}}, ValueError, "must be a number >= 0"),
        ({"optimizer": adam}, ValueError, "`optimizer` is for a plain module"),
        ({"task_loss": F.cross_entropy}, ValueError, "`task_loss` is for a plain module"),
    ],
)
def test_arguments_that_make_no_sense(words, error, sentence):
    with pytest.raises(error, match=sentence):
        distilled(**words)


def test_students_that_cannot_be_distilled(tmp_path):
    with pytest.raises(TypeError, match="`student` must be"):
        DistillationModule("net")

    class Two(Classifier):
        def configure_optimizers(self):
            return [torch.optim.Adam(self.net[:4].parameters()), torch.optim.Adam(self.net[4:].parameters())]

    with pytest.raises(MisconfigurationException, match="the student configures 2 optimizers"):
        fit(tmp_path, distilled(new(Two)))
    with pytest.raises(MisconfigurationException, match="needs an optimizer"):
        fit(tmp_path, DistillationModule(Plain(), teacher()))


def test_other_strategies_are_refused(tmp_path):
    module = distilled()
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match="DistillationModule is not supported under ModelParallelStr"):
        module.setup("fit")


def test_layers_built_in_configure_model(tmp_path):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(3)
                self.net = Classifier().net

    class Later(Late):
        pass

    def make():
        return DistillationModule(new(Later), teacher(), features=HINT, logits_from="net")

    module = make()
    fit(tmp_path, module, Files(tmp_path / "files"))
    again = make()
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"max_steps": 5},
        {"gradient_clip_val": 0.5},
        {"fast_dev_run": 2},
        {"barebones": True},
        {"val_check_interval": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*barebones.*:UserWarning")
def test_trainers_of_all_kinds(tmp_path, options):
    module = distilled(features=HINT, alpha=Ramp(0.9, 0.1))
    fit(tmp_path, module, **options)


def test_several_training_loaders_at_once(tmp_path):
    class Pairs(Quiet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    class Mine(DistillationModule):
        def targets(self, batch):
            return batch["a"][1]

    loaders = {"a": train_loader(), "b": train_loader()}
    module = Mine(new(Pairs), teacher(), features=HINT, loss="dkd", example_inputs=torch.zeros(2, FEATURES))
    trainer(tmp_path, max_epochs=1).fit(module, loaders, val_loader())
    cached = Mine(new(Pairs), teacher(), cache=tmp_path / "logits.cache")
    with pytest.raises(ValueError, match="needs one training loader"):
        trainer(tmp_path, max_epochs=1).fit(cached, loaders, val_loader())


def test_with_alpha_one_labels_do_not_count(tmp_path):
    """Cross-entropy of a batch without labels is NaN, and must not reach the loss."""

    class Unlabelled(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), torch.full_like(batch[1], -100))

    module = DistillationModule(new(Unlabelled), teacher(), alpha=1.0)
    fit(tmp_path, module)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


class WithRate(Classifier):
    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_the_learning_rate_is_the_students(tmp_path):
    module = distilled(WithRate())
    assert module.learning_rate == 1e-2
    assert not hasattr(module, "lr")
    module.learning_rate = 1e-3
    assert module.student.hparams.learning_rate == 1e-3
    module.lr = 5.0  # a subclass's own: the student has none
    assert module.lr == 5.0
    assert not hasattr(module.student, "lr")
