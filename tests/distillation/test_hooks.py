"""The student's own hooks run, all of them, and with alpha=0 the run is its own bit for bit."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden

from helpers.distilled import distilled, teacher
from helpers.models import (
    Classifier,
    Files,
    SeededByStep,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim.distillation import DistillationModule
from lightning_optim.distillation.hooks import FORWARDED, OWN

NO_HOOKS = {"forward", "training_step", "configure_sharded_model"}


def hooks_of_lightning() -> set[str]:
    """Every hook of the classes, and every name Lightning's sources call on the module."""
    named = {
        name
        for cls in (ModelHooks, DataHooks, CheckpointHooks)
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    for path in Path(pl.__file__).parent.rglob("*.py"):
        named |= set(re.findall(r"_call_lightning_module_hook\([\w.]+, \"(\w+)\"", path.read_text()))
        named |= set(
            re.findall(r"is_overridden\(\"(\w+)\", (?:pl_module|model|self\.lightning_module)", path.read_text())
        )
    return named


def test_every_hook_is_forwarded_or_called_by_the_module_itself():
    hooks = hooks_of_lightning()
    assert len(hooks) > 55
    assert hooks - set(FORWARDED) == OWN & hooks
    assert not set(FORWARDED) - hooks - {"backward", "predict_step", "test_step", "validation_step", "optimizer_step"}


def recording(hooks):
    """A Classifier that notes which of its hooks are called, and does what it did."""
    notes = []

    def noting(name):
        original = getattr(Classifier, name)

        def hook(self, *args, **kwargs):
            notes.append(name)
            return original(self, *args, **kwargs)

        hook.__signature__ = inspect.signature(original)
        return hook

    names = [
        name for name in hooks if hasattr(Classifier, name) and name not in NO_HOOKS and not name.endswith("loader")
    ]
    cls = type("Recording", (Classifier,), {name: noting(name) for name in names})
    return cls, notes


def everything(tmp_path, module, path):
    torch.manual_seed(0)
    run = trainer(tmp_path, Files(path), max_epochs=2, gradient_clip_val=1.0)
    run.fit(module, train_loader(), val_loader())
    run.validate(module, val_loader(), verbose=False)
    run.test(module, val_loader(), path / "0.ckpt", verbose=False)
    run.predict(module, val_loader())


def test_every_hook_of_the_student_is_called_as_often_as_without_distillation(tmp_path):
    cls, alone = recording(hooks_of_lightning())
    everything(tmp_path, new(cls), tmp_path / "alone")
    cls, wrapped = recording(hooks_of_lightning())
    everything(tmp_path, DistillationModule(new(cls), teacher()), tmp_path / "wrapped")
    counts = [{name: notes.count(name) for name in notes} for notes in (alone, wrapped)]
    assert counts[0] == counts[1]
    assert len(counts[0]) > 50
    assert alone == wrapped  # in the same order


class Own(Classifier):
    """Loaders, metrics and hooks that touch weights, batches and checkpoints."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(dropout=dropout)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.seen = 0

    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return val_loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 1.5, batch[1]]

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", self.net[0].weight.grad.norm())

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def on_train_epoch_end(self):
        self.log("epoch_metric", self.net[0].weight.sum().detach())

    def on_save_checkpoint(self, checkpoint):
        assert "net.0.weight" in checkpoint["state_dict"]
        checkpoint["seen"] = self.seen + 1

    def on_load_checkpoint(self, checkpoint):
        assert "net.0.weight" in checkpoint["state_dict"]
        self.seen = checkpoint["seen"]

    def configure_callbacks(self):
        return [SeededByStep()]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_with_alpha_0_the_run_is_the_students_own(tmp_path, precision):
    best = {"monitor": "val_loss", "save_top_k": 1}
    runs = []
    for name in ("alone", "wrapped"):
        module = new(Own) if name == "alone" else DistillationModule(new(Own), teacher(), alpha=0.0)
        saves = pl.callbacks.ModelCheckpoint(tmp_path / name, **best)
        torch.manual_seed(0)
        run = trainer(tmp_path, saves, max_epochs=3, precision=precision)
        run.fit(module)
        runs.append((run, getattr(module, "student", module), saves))
    (one, own, kept), (other, student, also) = runs
    assert_same_state(own, student)
    metrics = {name: value for name, value in other.callback_metrics.items() if not name.startswith("distillation/")}
    assert metrics == one.callback_metrics
    assert kept.best_model_score == also.best_model_score
    optimizers = [run.optimizers[0].state_dict()["state"] for run in (one, other)]
    for i, state in optimizers[0].items():
        assert_same_state(state, optimizers[1][i])


def test_with_alpha_0_no_teacher_is_needed(tmp_path):
    plain, module = new(), DistillationModule(new(), alpha=0.0)
    fit(tmp_path, plain)
    fit(tmp_path, module)
    assert_same_state(plain, module.student)


def test_a_file_keeps_what_the_students_hooks_wrote(tmp_path):
    module = DistillationModule(new(Own), teacher())
    run = trainer(tmp_path, Files(tmp_path), max_epochs=1)
    run.fit(module)
    file = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert file["seen"] == 1
    assert all(name.startswith("student.") for name in file["state_dict"])
    again = DistillationModule(new(Own), teacher())
    trainer(tmp_path, max_epochs=2).fit(again, ckpt_path=tmp_path / "0.ckpt")
    assert again.student.seen == 1


def test_only_what_the_student_overrides_is_overridden():
    module = DistillationModule(new(), teacher())
    for name in FORWARDED:
        if name != "on_train_epoch_end":  # the module logs the epoch's means there
            assert is_overridden(name, module, pl.LightningModule) == is_overridden(
                name, module.student, pl.LightningModule
            )


def test_a_subclass_adds_hooks_and_replaces_steps(tmp_path):
    notes = []

    class Student(Classifier):
        def on_train_epoch_end(self):
            notes.append("student")

    class Mine(DistillationModule):
        def on_train_epoch_end(self):
            notes.append("mine")

        def validation_step(self, batch, batch_idx):
            notes.append("validation")

    fit(tmp_path, Mine(new(Student), teacher()), max_epochs=1)
    assert notes == ["validation"] * 4 + ["student", "mine"]


def test_copies_and_pickles_call_their_own_student():
    module = DistillationModule(new(Own), teacher())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.on_train_epoch_end.module is other
        assert other.student is not module.student
    assert copy.deepcopy(module).teacher is module.teacher
    assert pickle.loads(pickle.dumps(module)).teacher is None
    assert len(pickle.dumps(module)) < 2 * len(pickle.dumps(module.student))


def test_loaders_with_several_sets(tmp_path):
    class Student(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    module = distilled(new(Student))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, train_loader(), [val_loader(), val_loader()])
    assert {"loss/dataloader_idx_0", "loss/dataloader_idx_1"} <= run.callback_metrics.keys()
