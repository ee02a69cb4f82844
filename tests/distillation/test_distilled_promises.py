"""The promises of the package, for a distillation alone and with every compression callback on its student."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from helpers.distilled import HINT, conv_distilled, distilled, teacher
from helpers.marks import cells
from helpers.models import (
    Classifier,
    ConvNet,
    Files,
    ResumableLoader,
    SeededByStep,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import (
    ChannelPruning,
    CompressedCheckpoint,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
    conform,
    load_from_checkpoint,
    prune_channels,
)
from lightning_optim.distillation import DistillationModule, student_only


def weights(**words):
    return WeightPruning(0.8, **{"start": 2, "end": 9, "every_n_steps": 3, **words})


def channels(**words):
    return ChannelPruning(0.5, **{"start": 2, "end": 7, "events": 2, "scope": "layer", **words})


def integers(**words):
    return QuantizationAwareTraining(**{"weight_bits": 4, "start": 2, "freeze": 9, **words})


CALLBACKS = {
    "alone": lambda: [],
    "weights": lambda: [weights()],
    "channels": lambda: [channels()],
    "integers": lambda: [integers()],
    "channels, weights and integers": lambda: [channels(), weights(), integers()],
}
ALL = "channels, weights and integers"
KINDS = {
    "kd": lambda dropout=0.0: distilled(new(Classifier, dropout=dropout)),
    "hint": lambda dropout=0.0: distilled(new(Classifier, dropout=dropout), features=HINT),
}
every_callback = pytest.mark.parametrize("name", cells(list(CALLBACKS), quick=["alone", ALL]))
"""Each technique by itself is slow: all of them together do what each does."""


def assert_reached(student, callbacks):
    hidden = [student.net[i].weight for i in (0, 4)]
    if any(isinstance(c, ChannelPruning) for c in callbacks):
        assert [tuple(w.shape) for w in hidden] == [(8, 12), (8, 8)]
    if any(isinstance(c, WeightPruning) for c in callbacks):
        numel = sum(w.numel() for w in hidden)
        assert sum(int((w == 0).sum()) for w in hidden) == int(0.8 * numel + 0.5)
    if any(isinstance(c, QuantizationAwareTraining) for c in callbacks):
        assert [student.net[i].quantization_phase for i in (0, 4, 6)] == ["frozen"] * 3
    assert all(c.reached_end for c in callbacks)


@pytest.mark.parametrize(
    ("name", "kind"), cells(list(CALLBACKS), list(KINDS), quick=[(ALL, "hint"), ("alone", "kd"), ("channels", "kd")])
)
def test_resumed_at_every_epoch_equals_uninterrupted(tmp_path, name, kind):
    make, kind = CALLBACKS[name], KINDS[kind]
    module, callbacks = kind(dropout=0.3), make()
    before = {name: value.clone() for name, value in module.teacher.networks[0].state_dict().items()}
    fit(tmp_path, module, *callbacks, SeededByStep(), Files(tmp_path / "files"))
    assert_reached(module.student, callbacks)
    assert_same_state(before, module.teacher.networks[0])
    assert all(name.startswith(("student.", "projectors.")) for name in module.state_dict())
    for epoch in range(2):
        again = kind(dropout=0.3)
        fit(tmp_path, again, *make(), SeededByStep(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


@every_callback
def test_resumed_at_every_step_equals_uninterrupted(tmp_path, name):
    make = CALLBACKS[name]
    files = tmp_path / "files"

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(files / f"{trainer.global_step}.ckpt")

    module = distilled(features=HINT)
    trainer(tmp_path, Saves(), *make(), max_epochs=2).fit(module, ResumableLoader(), val_loader())
    for step in (1, 6, 12):
        again = distilled(features=HINT)
        run = trainer(tmp_path, *make(), max_epochs=2)
        run.fit(again, ResumableLoader(), val_loader(), ckpt_path=files / f"{step}.ckpt")
        assert_same_state(module, again)


@pytest.mark.parametrize(
    ("name", "weights_only"), cells(list(CALLBACKS), [False, True], quick=[(ALL, True), ("alone", False)])
)
def test_one_file_reloads(tmp_path, name, weights_only):
    make = CALLBACKS[name]
    module = distilled(features=HINT)
    run = fit(tmp_path, module, *make())
    path = tmp_path / "file.ckpt"
    run.save_checkpoint(path, weights_only)
    torch.load(path, weights_only=True)
    alone = load_from_checkpoint(DistillationModule, path, student=new())  # no teacher, no run
    assert_same_state(module, alone)
    expected = run.test(module, val_loader(), verbose=False)
    fresh = DistillationModule(new())
    assert trainer(tmp_path, *make()).test(fresh, val_loader(), path, verbose=False) == expected
    assert_same_state(module, fresh)
    for source in (path, module, alone):
        bare = load_from_checkpoint(Classifier, student_only(source, tmp_path / "student.ckpt"))
        assert type(bare) is Classifier
        assert_same_state(module.student, bare)
        assert trainer(tmp_path).test(bare, val_loader(), verbose=False) == expected


@every_callback
def test_the_student_saves_what_was_changed_in_it(tmp_path, name):
    make = CALLBACKS[name]
    module = distilled()
    fit(tmp_path, module, *make())
    fit(tmp_path, module.student, Files(tmp_path / "alone"), max_epochs=1)
    assert_same_state(module.student, load_from_checkpoint(Classifier, tmp_path / "alone" / "0.ckpt"))


def test_a_pruned_student_goes_on_under_distillation(tmp_path):
    student = new()
    fit(tmp_path, student, channels(), Files(tmp_path / "files"))
    student = load_from_checkpoint(Classifier, tmp_path / "files" / "2.ckpt")
    module = DistillationModule(student, teacher(), features=HINT)
    fit(tmp_path, module, Files(tmp_path / "distilled"))
    assert module.student.net[4].weight.shape == (8, 8)
    again = load_from_checkpoint(DistillationModule, tmp_path / "distilled" / "2.ckpt", student=new())
    assert_same_state(module, again)
    bare = load_from_checkpoint(Classifier, student_only(module, tmp_path / "student.ckpt"))
    assert_same_state(module.student, bare)


def test_a_compressed_model_is_a_teacher(tmp_path):
    first = new(width=24)
    fit(tmp_path, first, channels(), integers(), Files(tmp_path / "files"))
    compressed = load_from_checkpoint(Classifier, tmp_path / "files" / "2.ckpt")
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    fit(tmp_path, distilled(of=compressed))
    assert_same_state(before, compressed)


def test_projectors_follow_channels_of_images(tmp_path):
    module = conv_distilled()
    fit(tmp_path, module, channels(include=["net.1"]), Files(tmp_path / "files"))
    assert module.student.net[1].out_channels == 4
    assert module.projectors["0"].weight.shape == (12, 4, 1, 1)
    again = conv_distilled()
    fit(tmp_path, again, channels(include=["net.1"]), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)
    assert_same_state(
        module, load_from_checkpoint(DistillationModule, tmp_path / "files" / "2.ckpt", student=new(ConvNet))
    )


@every_callback
def test_the_score_is_that_of_the_student(tmp_path, name):
    make = CALLBACKS[name]
    best = CompressedCheckpoint(tmp_path / "best", monitor="P")
    module = distilled(features=HINT)
    fit(tmp_path, module, *make(), PerformanceScore(), best)
    assert best.best_model_path
    bare = load_from_checkpoint(Classifier, student_only(best.best_model_path, tmp_path / "student.ckpt"))
    metrics = trainer(tmp_path).validate(bare, val_loader(), verbose=False)
    run = trainer(tmp_path, *make(), PerformanceScore(), best)
    again = run.validate(distilled(), val_loader(), best.best_model_path, verbose=False)
    assert metrics == again


def test_the_learning_rate_finder_leaves_the_module_as_it_was(tmp_path):
    module = distilled(features=HINT)
    module.learning_rate = 1e-2
    run = trainer(tmp_path)
    Tuner(run).lr_find(module, train_loader(), val_loader(), num_training=5)
    run.fit(module, train_loader(), val_loader())
    assert_same_state(module.teacher.networks[0], teacher())


def test_an_exception_leaves_no_hook_and_a_loadable_file(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                raise RuntimeError("stop")

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    module = distilled(features=HINT)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module, channels(), Fails())
    assert not any(layer._forward_hooks for layer in module.modules())
    assert_same_state(module, load_from_checkpoint(DistillationModule, tmp_path / "broken.ckpt", student=new()))
    for source in (module, tmp_path / "broken.ckpt"):
        bare = load_from_checkpoint(Classifier, student_only(source, tmp_path / "student.ckpt"))
        assert_same_state(module.student, bare)


def test_a_plain_pruned_student_goes_on_and_reloads(tmp_path):
    def plain():
        torch.manual_seed(3)
        return Classifier().net

    def make(student):
        return DistillationModule(student, teacher(), optimizer=partial(torch.optim.Adam, lr=1e-2))

    student = plain().eval()
    prune_channels(student, torch.zeros(2, 12), pruning_ratio=0.5, scope="layer")
    module = make(student.train())
    fit(tmp_path, module, Files(tmp_path / "files"), max_epochs=1)
    again = load_from_checkpoint(DistillationModule, tmp_path / "files" / "0.ckpt", student=plain())
    assert again.student[4].weight.shape == (8, 8)
    assert_same_state(module, again)
    file = torch.load(student_only(tmp_path / "files" / "0.ckpt", tmp_path / "student.ckpt"), weights_only=True)
    bare = plain()
    conform(bare, file["lightning_optim"])
    bare.load_state_dict(file["state_dict"])
    assert_same_state(module.student, bare)
