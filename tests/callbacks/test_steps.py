"""Steps are counted, and masks applied, whatever optimizer takes them; a window that does not advance says so."""

from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from helpers.models import Classifier, data
from lightning_optim import WeightPruning
from lightning_optim.optimizers import StepWatch, nested


class Wrapper(torch.optim.Optimizer):
    """Wraps another as ``self.optimizer``, the name that Lightning's own wrapper uses."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lookahead(torch.optim.Optimizer):
    """As in timm: ``Optimizer.__init__`` is not called, so torch never hooks its step. Slow weights come back."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.base.step(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for slow, fast in zip(self.slow, parameters, strict=True):
                slow.lerp_(fast, 0.5)
                fast.copy_(slow)
        return loss

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class NoOptimizer:
    """What Lightning asks of an optimizer, and no more: it is not of torch's class."""

    def __init__(self, inside):
        self.parts = [inside]
        self.param_groups, self.defaults, self.state = inside.param_groups, inside.defaults, inside.state

    def step(self, closure=None):
        return self.parts[0].step(closure)

    def zero_grad(self, set_to_none=True):
        self.parts[0].zero_grad(set_to_none)

    def state_dict(self):
        return self.parts[0].state_dict()

    def load_state_dict(self, state):
        self.parts[0].load_state_dict(state)


class Wrapped(pl.LightningModule):
    def __init__(self, wrapper):
        super().__init__()
        self.net = Classifier().net
        self.wrapper = wrapper

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.wrapper(torch.optim.SGD(self.parameters(), 0.05, momentum=0.9))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data(), 8)


class ByHand(Wrapped):
    """Manual optimization; ``steps`` says what is stepped of ``self.optimizers()``."""

    def __init__(self, steps, wrapper=Wrapper):
        super().__init__(wrapper)
        self.steps = steps
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.steps(self)


def fit(module, *callbacks, epochs=2, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_model_summary=False, **quiet, **options
    )
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("wrapper", [Wrapper, Lookahead, NoOptimizer, lambda inside: Lookahead(Wrapper(inside))])
def test_an_optimizer_around_another_advances_the_window_and_keeps_the_zeros(wrapper):
    pruning = WeightPruning(0.8, start=0.1, end=0.5, every_n_steps=2)
    zeros = []

    class Zeros(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            zeros.append(int((pl_module.net[4].weight == 0).sum()))

    trainer = fit(Wrapped(wrapper), pruning, Zeros())
    assert pruning.window.step == trainer.global_step == 16
    assert pruning.reached_end
    assert zeros == sorted(zeros)  # no step gives a weight back
    assert zeros[-1] > 0.5 * 256


def test_a_step_of_the_wrapped_optimizer_alone_counts():
    pruning = WeightPruning(0.8, start=2, end=6, every_n_steps=2)
    fit(ByHand(lambda module: module.optimizers().optimizer.base.step(), Lookahead), pruning, epochs=1)
    assert pruning.window.step == 8
    assert pruning.reached_end


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_window_that_does_not_advance_raises_after_the_first_epoch(epochs):
    module = ByHand(lambda module: module.other.step())
    module.other = torch.optim.SGD(module.parameters(), 0.05)
    with pytest.raises(MisconfigurationException, match=r"8 batches were trained.* \(Wrapper\) was seen"):
        fit(module, WeightPruning(0.8, start=2, end=6), epochs=epochs)
    assert module.trainer.current_epoch == 0


def test_an_optimizer_that_starts_later_than_the_others_is_a_warning():
    def steps(module):
        first, second = module.optimizers()
        first.step()
        if module.current_epoch:
            second.step()

    class Two(ByHand):
        def configure_optimizers(self):
            head, body = self.net[6].parameters(), self.net[:6].parameters()
            return torch.optim.SGD(head, 0.05), torch.optim.SGD(body, 0.05)

    pruning = WeightPruning(0.8, start=2, end=6, every_n_steps=2)
    with pytest.warns(UserWarning, match=r"no step of .* \(SGD\) was seen.*It begins with the first such step"):
        fit(Two(steps), pruning)
    assert pruning.window.step == 8
    assert pruning.reached_end


def test_accumulation_over_a_whole_epoch_is_allowed():
    pruning = WeightPruning(0.8, start=1, end=2, every_n_steps=1)
    fit(Wrapped(Wrapper), pruning, accumulate_grad_batches=8)
    assert pruning.window.step == 2


def test_a_watch_leaves_the_optimizer_as_it_was():
    parameter = torch.nn.Parameter(torch.ones(2))
    for optimizer in (NoOptimizer(torch.optim.SGD([parameter], 0.1)), Lookahead(torch.optim.SGD([parameter], 0.1))):
        before = {name: value for name, value in vars(optimizer).items() if "hooks" not in name}
        steps = []
        watch = StepWatch(optimizer, steps.append)
        optimizer.step()
        optimizer.step()
        watch.remove()
        optimizer.step()
        assert steps == [optimizer, optimizer]
        assert {name: value for name, value in vars(optimizer).items() if "hooks" not in name} == before


def test_optimizers_inside_others_are_found_by_type_and_not_by_name():
    inside = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    around = Lookahead(NoOptimizer(inside))
    around.optimizer = "a word"
    assert nested(around) == [around]  # `base` is of no type that is known
    around.also = {"one": inside}
    assert nested(around) == [around, inside]
