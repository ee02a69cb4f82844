"""Students that optimize manually, with one or several optimizers: their step decides, the teacher's loss joins it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from helpers.distilled import HINT, Teacher, teacher
from helpers.models import Classifier, Files, Quiet, assert_same_state, data, fit, new, trainer, val_loader
from lightning_optim import ChannelPruning, DepthPruning, QuantizationAwareTraining, WeightPruning
from lightning_optim.distillation import DistillationModule, Ramp


class ByHand(Quiet):
    """One optimizer, stepped by its own training step."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Automatic(ByHand):
    """The same, optimized by Lightning."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Two(ByHand):
    """Two optimizers and a schedule each, one of them toggled, clipped by hand, as Lightning's documentation shows."""

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(head, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        self.toggle_optimizer(body)
        body.step()
        self.untoggle_optimizer(body)
        head.step()
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.Adam(self.net[:4].parameters(), 1e-2),
            torch.optim.SGD(self.net[4:].parameters(), 0.1),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5) for optimizer in optimizers]


class Accumulates(ByHand):
    """Steps after every second batch, each with half of its loss."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class InClosure(ByHand):
    def training_step(self, batch, batch_idx):
        def closure():
            self.optimizers().zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        self.optimizers().step(closure=closure)


class Repeats(InClosure):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Adversarial(ByHand):
    """The student generates, a critic judges; each has its own loss and optimizer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        answer = self(batch[0])
        self.toggle_optimizer(critic)
        critic.zero_grad()
        self.manual_backward(self.critic(answer.detach()).mean() - self.critic(F.one_hot(batch[1], 3).float()).mean())
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(-self.critic(answer).mean() + F.cross_entropy(answer, batch[1]))
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net, self.critic)]


class Backward(ByHand):
    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.loss(batch).backward()
        self.optimizers().step()


class Skips(ByHand):
    def training_step(self, batch, batch_idx):
        if batch_idx % 3 == 1:
            self.loss(batch)  # looked at, and found wanting
            return None
        return super().training_step(batch, batch_idx)


class Vector(ByHand):
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(F.cross_entropy(self(x), y, reduction="none"), gradient=torch.ones(len(x)))


def taught(cls, **words) -> DistillationModule:
    return DistillationModule(new(cls), teacher(), **{"features": HINT, **words})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_by_hand_equals_automatic(tmp_path, precision):
    ramps = {"alpha": Ramp(0.9, 0.1), "temperature": Ramp(4.0, 1.0)}
    ours, theirs = taught(ByHand, **ramps), taught(Automatic, **ramps)
    first, second = (fit(tmp_path, module, precision=precision) for module in (ours, theirs))
    assert_same_state(ours, theirs)
    logged = [
        {n: v for n, v in run.callback_metrics.items() if n.startswith("distillation")} for run in (first, second)
    ]
    assert logged[0] == logged[1]
    assert logged[0].keys() == {"distillation/task", "distillation/kd", "distillation/net.2"}


@pytest.mark.parametrize("cls", [ByHand, Two, Accumulates, InClosure, Adversarial, Backward, Skips, Repeats])
def test_without_a_teacher_s_part_it_is_the_student_s_own_run(tmp_path, cls):
    alone = new(cls)
    fit(tmp_path, alone)
    module = taught(cls, alpha=0.0, features=())
    fit(tmp_path, module)
    assert_same_state(module.student, alone)
    assert "manual_backward" not in vars(module.student)


@pytest.mark.parametrize("cls", [ByHand, Two, Accumulates, InClosure, Adversarial, Skips])
def test_resumed_equals_uninterrupted(tmp_path, cls):
    def make():
        module = taught(cls, alpha=Ramp(0.9, 0.1))
        module.accumulated_batches = 2 if cls is Accumulates else None
        module.taught_backward = 1 if cls is Adversarial else None
        return module

    module = make()
    fit(tmp_path, module, Files(tmp_path / "files"))
    assert module._step.batches == (24 if cls is not Skips else 24 - 3 * 3)
    untaught = new(cls)
    fit(tmp_path, untaught)
    assert not torch.equal(module.student.net[0].weight, untaught.net[0].weight)
    again = make()
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "0.ckpt")
    assert_same_state(module, again)
    fit(tmp_path, again, max_epochs=1)  # a second fit


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """A step of two batches is the mean of both losses: the teacher's part is divided as the student's own."""

    modules = []
    for cls, rows in ((Accumulates, 8), (ByHand, 16)):
        student = new(cls)
        student.net[1] = nn.Identity()  # a BatchNorm sees the batches apart
        module = DistillationModule(student, teacher(), features=HINT)
        module.student.configure_optimizers = partial(torch.optim.SGD, module.student.parameters(), lr=0.1)
        module.accumulated_batches = 2 if cls is Accumulates else None
        run = trainer(tmp_path)
        run.fit(module, DataLoader(data(), rows), val_loader())
        modules.append((module, run.callback_metrics))
    (small, logged), (large, metrics) = modules
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value)
    assert {n: float(v) for n, v in logged.items()} == pytest.approx(
        {n: float(v) for n, v in metrics.items()}, rel=0.05
    )


@pytest.mark.parametrize(
    ("cls", "attributes", "sentence"),
    [
        (Adversarial, {}, "calls `manual_backward` a second time in batch 0.*module.taught_backward = 0"),
        (
            Adversarial,
            {"taught_backward": 2},
            "called `manual_backward` 2 times in batch 0.*module.taught_backward = 2",
        ),
        (Repeats, {}, r"second time in batch 0.*\(LBFGS\)"),
        (Backward, {}, r"without `manual_backward`.*Call self.manual_backward\(loss\) instead of loss.backward"),
        (Accumulates, {}, r"\(batch 1 is the second\).*set module.accumulated_batches"),
        (Vector, {}, r"gives a tensor \(8,\) to `manual_backward` in batch 0"),
    ],
)
def test_steps_that_do_not_say_which_loss_is_meant(tmp_path, cls, attributes, sentence):
    module = taught(cls)
    for name, value in attributes.items():
        setattr(module, name, value)
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(tmp_path, module)
    assert "manual_backward" not in vars(module.student)
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in module.trainer.optimizers)


def test_values_that_make_no_sense(tmp_path):
    for name in ("taught_backward", "accumulated_batches"):
        module = taught(ByHand)
        setattr(module, name, -1)
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number"):
            fit(tmp_path, module)


def test_several_optimizers_need_manual_optimization(tmp_path):
    class Several(Two):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

    with pytest.raises(MisconfigurationException, match=r"2 optimizers.*self.automatic_optimization = False"):
        fit(tmp_path, DistillationModule(new(Several), teacher()))


def test_projectors_join_the_first_optimizer(tmp_path):
    module = taught(Two)
    run = fit(tmp_path, module)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in run.optimizers]
    ours = {id(p) for p in module.projectors.parameters()}
    assert ours <= held[0]
    assert not ours & held[1]
    assert all(run.optimizers[0].state[p]["step"] == 24 for p in module.projectors.parameters())


def test_an_override_of_manual_backward_is_called_with_the_sum(tmp_path):
    class Own(ByHand):
        seen = 0

        def manual_backward(self, loss, *args, **kwargs):
            self.seen += 1
            super().manual_backward(loss, *args, **kwargs)

    ours, theirs = taught(Own), taught(Automatic)
    for module in (ours, theirs):
        fit(tmp_path, module)
    assert_same_state(ours, theirs)
    assert ours.student.seen == 24


class Blocks(Two):
    """A stack of blocks that keep their width."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 16),
            nn.Sequential(*[nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )


@pytest.mark.parametrize(
    ("cls", "callback", "features"),
    [
        (Two, lambda: WeightPruning(0.8, every_n_steps=3, start=2, end=0.8), HINT),
        (Two, lambda: ChannelPruning(0.5, start=2, end=7, events=2, scope="layer"), HINT),
        (Two, lambda: QuantizationAwareTraining(weight_bits=4, start=2, freeze=0.8), HINT),
        (
            Blocks,
            lambda: DepthPruning(0.5, criterion="influence", start=2, end=7, example_inputs=torch.zeros(2, 12)),
            [("net.1.-1", "body.2", "rkd")],
        ),
    ],
    ids=["weights", "channels", "integers", "depth"],
)
def test_compression_works_as_with_automatic_optimization(tmp_path, cls, callback, features):
    module = taught(cls, features=features)
    fit(tmp_path, module, callback(), Files(tmp_path / "files"))
    zeros = (module.student.net[0].weight == 0).float().mean()
    assert isinstance(callback(), (ChannelPruning, DepthPruning, QuantizationAwareTraining)) or zeros > 0.3
    if isinstance(callback(), DepthPruning):
        assert len(module.student.net[1]) == 2
    if isinstance(callback(), ChannelPruning):
        assert module.student.net[0].weight.shape == (8, 12)
        assert module.projectors["0"].weight.shape == (24, 8)
    again = taught(cls, features=features)
    fit(tmp_path, again, callback(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_a_student_built_like_those_of_lightning_bolts(tmp_path):
    """Net and online probe with raw optimizers; the backward pass goes through a hook that the student overrides."""

    class Online(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.probe = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self.optimizers(use_pl_optimizer=False)
            logits = self(x)
            loss = F.cross_entropy(logits, y) + F.cross_entropy(self.probe(logits.detach()), y)
            self.log("train_loss", loss)
            self.manual_backward(loss)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return {"loss": loss, "logits": logits.detach()}

        def backward(self, loss, *args, **kwargs):
            loss.backward(*args, **kwargs)

        def forward(self, x):
            return self.net(x)

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), 1e-2), torch.optim.Adam(self.probe.parameters(), 1e-2)

    module = DistillationModule(new(Online), teacher(Teacher))
    run = fit(tmp_path, module)
    assert module._step.batches == 24
    assert module._step.ramps.step == 24  # raw optimizers count too
    assert {"train_loss", "distillation/kd"} <= run.callback_metrics.keys()
