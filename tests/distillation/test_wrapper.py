"""The module around a student is the student to everybody else: callbacks, tuners, loggers, files, and its Trainer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from helpers.distilled import HINT, Teacher, distilled, teacher
from helpers.models import (
    CLASSES,
    FEATURES,
    Classifier,
    Files,
    assert_same_state,
    data,
    fit,
    new,
    train_loader,
    val_loader,
)
from helpers.models import trainer as make_trainer
from lightning_optim import PerformanceScore, QuantizationAwareTraining, ReportCallback, WeightPruning
from lightning_optim.checkpoint import load_from_checkpoint
from lightning_optim.distillation import DistillationModule, student_only


class Tuned(Classifier):
    """A student with what finetuning callbacks, tuners and loggers look for."""

    batch_size = 4

    def __init__(self, width=16, base_lr=1e-2):
        super().__init__(width)
        self.save_hyperparameters()
        self.net = None
        self.backbone, self.head = nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)
        self.base_lr = base_lr

    def forward(self, x):
        return self.head(self.backbone(x).relu())

    def train_dataloader(self):
        return train_loader(self.batch_size)

    def val_dataloader(self):
        return val_loader()

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.base_lr)


def test_what_only_the_student_has_is_the_students():
    module = distilled(new(Tuned))
    assert module.backbone is module.student.backbone
    assert module.hparams is module.student.hparams
    module.base_lr = 0.5
    assert module.student.base_lr == 0.5
    assert "base_lr" not in module.__dict__
    layer = module.head = nn.Linear(2, 2)  # a subclass's own layer never takes the place of the student's
    assert module.head is layer is not module.student.head
    plain = DistillationModule(nn.Linear(2, 2), optimizer=torch.optim.Adam)
    assert plain.in_features == 2
    for each in (module, plain):
        for name in ("nothing", "_private_of_nobody"):
            with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
                getattr(each, name)


def test_a_subclass_keeps_its_own_hyperparameters():
    class Mine(DistillationModule):
        def __init__(self, student, note):
            super().__init__(student)
            self.save_hyperparameters()

    module = Mine(new(Tuned), "kept")
    assert dict(module.hparams) == {"note": "kept"}
    assert module.hparams_initial == {"note": "kept", **module.student.hparams_initial}


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.parametrize("name", ["finetuning", "batch size"])
def test_callbacks_that_read_the_student_work(tmp_path, name):
    made = {"finetuning": BackboneFinetuning, "batch size": BatchSizeFinder}[name]
    words = {"finetuning": {"unfreeze_backbone_at_epoch": 1, "verbose": False}, "batch size": {"max_trials": 1}}[name]
    module = distilled(new(Tuned))
    before = copy.deepcopy(module.student.backbone.weight)
    run = make_trainer(tmp_path, made(**words), max_epochs=2)
    run.fit(module)
    if name == "batch size":
        assert module.student.batch_size == module.batch_size == 2
        assert "batch_size" not in module.__dict__
    else:
        assert len(run.optimizers[0].param_groups) == 2
        assert not torch.equal(before, module.student.backbone.weight)


def test_loggers_write_the_students_hyperparameters(tmp_path):
    written = []
    for name, module in (("alone", new(Tuned)), ("distilled", distilled(new(Tuned)))):
        kept = CSVLogger(tmp_path / name)
        make_trainer(tmp_path, logger=kept, max_epochs=1, log_every_n_steps=1).fit(module)
        with open(f"{kept.log_dir}/hparams.yaml", encoding="utf-8") as file:
            written.append(yaml.safe_load(file))
    assert written[0] == written[1]
    assert written[1]["base_lr"] == 1e-2


class ReadsItsHyperparameters(Classifier):
    """As every model of pytorch-forecasting does."""

    def __init__(self, width=16, activation=None):
        super().__init__(width)
        self.save_hyperparameters()
        self.seen = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = checkpoint["hyper_parameters"]["width"]
        checkpoint["hyper_parameters"] = {"width": checkpoint["hyper_parameters"]["width"]}

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["hyper_parameters"]["width"]


def test_the_students_own_checkpoint_hooks_find_its_hyperparameters(tmp_path):
    module = distilled(new(ReadsItsHyperparameters, width=20, activation=F.relu))
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    path = tmp_path / "files" / "0.ckpt"
    file = torch.load(path, weights_only=True)
    assert file["mine"] == 20
    assert "hyper_parameters" not in file  # arguments of the module around: it has none
    for source in (module, path):
        alone = student_only(source, tmp_path / "student.ckpt")
        loaded = ReadsItsHyperparameters.load_from_checkpoint(alone, weights_only=True)
        assert_same_state(module.student, loaded)
        assert torch.load(alone, weights_only=True)["mine"] == 20
    again = distilled(new(ReadsItsHyperparameters, width=20))
    fit(tmp_path, again, ckpt_path=path, max_epochs=2)
    assert again.student.seen == 20


def test_arguments_of_the_student_are_not_those_of_the_module_around(tmp_path):
    """The student's ``optimizer`` is a name; the module's is a function for a plain student."""
    fit(tmp_path, distilled(new(Classifier, optimizer="sgd")), Files(tmp_path / "files"), max_epochs=1)
    path = tmp_path / "files" / "0.ckpt"
    loaded = DistillationModule.load_from_checkpoint(path, student=new(Classifier, optimizer="sgd"), weights_only=True)
    assert loaded.student.hparams.optimizer == "sgd"


# Files.


def test_a_distilled_file_in_the_bare_class_names_student_only(tmp_path):
    fit(tmp_path, distilled(), Files(tmp_path / "files"), max_epochs=1)
    path = tmp_path / "files" / "0.ckpt"
    sentence = r"that of a DistillationModule, and Classifier.*student_only"
    for cls_or_module in (Classifier, new()):
        with pytest.raises(ValueError, match=sentence):
            load_from_checkpoint(cls_or_module, path)
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, new(), WeightPruning(0.5, start=1, end=4), ckpt_path=path)
    loaded = load_from_checkpoint(Classifier, student_only(path, tmp_path / "student.ckpt"))
    assert_same_state(loaded, load_from_checkpoint(distilled(), path).student)


def test_writing_over_the_file_that_is_read_loses_nothing(tmp_path):
    """Read by memory mapping, a file that is written over ends the process."""
    module = distilled(new(Classifier, width=512))
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    path = tmp_path / "files" / "0.ckpt"
    link = tmp_path / "link.ckpt"
    link.symlink_to(path)
    assert student_only(path, link) == link
    assert link.is_symlink()
    assert_same_state(module.student, torch.load(path, weights_only=True)["state_dict"])
    assert [file.name for file in path.parent.iterdir()] == ["0.ckpt"]


def test_a_student_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    fit(tmp_path, distilled(), Files(tmp_path / "files"), max_epochs=1)
    path = tmp_path / "files" / "0.ckpt"
    before = path.read_bytes()

    def full(file, where):
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        student_only(path, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["0.ckpt"]


# Students and Trainers of `pytorch_lightning`.


@pytest.fixture
def other():
    return pytest.importorskip("pytorch_lightning")


def student_of(other):
    class Other(other.LightningModule):
        def __init__(self, width=16):
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(3)
            self.net = Classifier(width).net
            self.saved = 0

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

        def on_save_checkpoint(self, checkpoint):
            assert checkpoint["hyper_parameters"] == {"width": 16}
            self.saved += 1

    return Other()


class Saves:
    """Builds a callback of another package that writes a file an epoch."""

    def __new__(cls, other, folder):
        class Callback(other.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.save_checkpoint(folder / f"{trainer.current_epoch}.ckpt")

        return Callback()


def run_of(other, tmp_path, module, *callbacks, ckpt_path=None, epochs=2, validates=True):
    torch.manual_seed(0)
    run = other.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks), default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )  # fmt: skip
    run.fit(module, train_loader(), val_loader() if validates else None, ckpt_path=ckpt_path)
    return run


def test_a_pytorch_lightning_student_is_distilled_by_its_own_trainer(tmp_path, other):
    module = DistillationModule(student_of(other), teacher(), features=HINT)
    assert isinstance(module, DistillationModule)
    assert isinstance(module, other.LightningModule)
    assert type(module).__name__ == "DistillationModule"
    run = run_of(other, tmp_path, module, Saves(other, tmp_path / "files"))
    assert {"train_loss", "val_acc", "distillation/kd"} <= run.callback_metrics.keys()
    assert module.student.saved == 2
    again = DistillationModule(student_of(other), teacher(), features=HINT)
    run_of(other, tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)
    path = student_only(tmp_path / "files" / "1.ckpt", tmp_path / "student.ckpt")
    assert_same_state(module.student, load_from_checkpoint(type(module.student), path))


def test_with_alpha_0_the_run_of_the_other_package_is_the_students_own(tmp_path, other):
    alone, module = student_of(other), DistillationModule(student_of(other), teacher(), alpha=0.0)
    for each in (alone, module):
        run_of(other, tmp_path, each)
    assert_same_state(alone, module.student)


def test_subclasses_copies_and_pickles_stay_of_the_other_package(other):
    class Mine(DistillationModule):
        def targets(self, batch):
            return batch["y"]

    module = Mine(student_of(other), teacher())
    assert isinstance(module, Mine)
    assert isinstance(module, other.LightningModule)
    assert type(module) is type(Mine(student=student_of(other)))
    assert not isinstance(Mine(new()), other.LightningModule)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert twin.teacher is module.teacher
    assert_same_state(twin, module)
    plain = DistillationModule(other.LightningModule(), teacher())
    again = pickle.loads(pickle.dumps(plain))
    assert type(again) is type(plain)
    assert again.teacher is None


def test_all_of_ours_runs_beside_it_under_the_other_trainer(tmp_path, other):
    module = DistillationModule(student_of(other), teacher())
    callbacks = [
        WeightPruning(0.5, start=1, end=6),
        QuantizationAwareTraining(start=8, freeze=14),
        PerformanceScore("val_acc"),
        ReportCallback(tmp_path / "report"),
    ]
    run = run_of(other, tmp_path, module, *callbacks)
    assert "P" in run.callback_metrics
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "Distillation: kd by Teacher, in 16 batches." in page


# What is claimed.


def test_the_file_holds_the_number_of_distilled_batches(tmp_path):
    module = distilled(alpha=0.0)
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    assert torch.load(tmp_path / "files" / "0.ckpt", weights_only=True)["distillation"]["batches"] == 0
    assert module.last_line() == "Distillation: asked kd by Teacher; no batch was taught."
    module = distilled()
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    again = distilled()
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt", max_epochs=2)
    assert again.last_line() == "Distillation: kd by Teacher, in 16 batches."


def test_what_ran_is_named_where_the_default_depends_on_the_logits():
    class One(Classifier):
        def forward(self, x):
            return self.net(x)[:, 0]

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).float())

    module = DistillationModule(new(One), Teacher(classes=1))
    module.eval().training_step([x[:8] for x in data().tensors], 0)
    assert module.last_line() == "Distillation: bce by Teacher, in 1 batch."
