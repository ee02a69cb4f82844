"""Techniques together, alone and under distillation, in every kind of run: what was asked is reached, and saved.

A new kind of run is a row of ``RUNS``; what cannot work is in ``REFUSED`` with its sentence.
"""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from helpers.marks import cells
from helpers.models import (
    Classifier,
    Files,
    Quiet,
    SeededByStep,
    assert_same_state,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import DistillationModule, Recipe, load_from_checkpoint

CHANNELS = {"pruning_ratio": 0.5, "events": 2, "scope": "layer", "start": 2, "end": 6}
WEIGHTS = {"sparsity": 0.5, "every_n_steps": 2, "start": 7, "end": 11}
ROUNDING = {"weight_bits": 4, "start": 12, "freeze": 18}
TWO = {"rank": 2, "start": 6, "end": 7}
STACKS = {
    "low rank + weights + rounding": {"low_rank": TWO, "weight_pruning": WEIGHTS, "quantization": ROUNDING},
    "channels + low rank + weights + rounding": {
        "channel_pruning": CHANNELS,
        "low_rank": TWO,
        "weight_pruning": WEIGHTS,
        "quantization": ROUNDING,
    },
    "weights + rounding": {"weight_pruning": WEIGHTS, "quantization": ROUNDING},
    "channels + rounding": {"channel_pruning": CHANNELS, "quantization": ROUNDING},
    "channels + weights + rounding": {
        "channel_pruning": CHANNELS,
        "weight_pruning": WEIGHTS,
        "quantization": ROUNDING,
    },
}


class TwoOptimizers(Classifier):
    """One optimizer for each half of the layers, stepped by hand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        halves = [list(part.parameters()) for part in (self.net[:4], self.net[4:])]
        return [torch.optim.Adam(half, 1e-2) for half in halves]


class WithRate(Classifier):
    """Its learning rate can be found."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.learning_rate = 1e-2


RUNS = {
    "plain": {},
    "gradient accumulation": {"accumulate_grad_batches": 2, "max_epochs": 6},
    "gradient clipping": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "max_steps": {"max_epochs": -1, "max_steps": 24},
    "max_time": {"max_time": "00:01:00:00"},
    "no validation": {"limit_val_batches": 0},
    "barebones": {"module": Quiet, "barebones": True, "limit_val_batches": 0},
    "weight averaging": {"callbacks": lambda: [WeightAveraging()]},
    "exponential averaging": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9)]},
    "stochastic weight averaging": {"callbacks": lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=2)]},
    "early stopping": {"callbacks": lambda: [EarlyStopping("val_loss", patience=100)]},
    "learning rate finder": {
        "module": WithRate,
        "callbacks": lambda: [LearningRateFinder(num_training_steps=4)],
    },
    "several optimizers by hand": {"module": TwoOptimizers},
    "compiled": {"module": Quiet, "compile": True},
}
EXPECTED = {
    "stochastic weight averaging": ["Swapping scheduler"],  # Lightning's
    "early stopping": [".*prefers the epochs before"],  # ours: it watches a plain metric
    "compiled": [".*should not be instantiated"],  # torch 2.13's own tracing does it
    "barebones": [".*barebones"],  # Lightning's
}
"""What is warned of, and why that is right."""

REFUSED = {
    ("barebones", "scored"): "barebones=True\\) logs nothing",
    ("compiled", "low rank"): "cannot be read inside a module that torch.compile compiled",
}


def parts(run):
    """Return what a row of ``RUNS`` says: module class, whether it is compiled, callbacks, options of the Trainer."""
    words = dict(RUNS[run])
    make = words.pop("callbacks", list)
    return words.pop("module", Classifier), words.pop("compile", False), make(), words


def fit(tmp_path, run, recipe, *, taught):
    cls, compiled, callbacks, options = parts(run)
    student = new(cls, width=16)
    module = recipe.wrap(student, new(Quiet, width=32) if taught else None)
    if compiled:
        student.compile(backend="eager")
    if run != "barebones":
        callbacks.append(SeededByStep())
    example = torch.zeros(2, 12) if compiled else None
    torch.manual_seed(0)
    fitter = trainer(tmp_path, *callbacks, *recipe.callbacks(example_inputs=example), **{"max_epochs": 3, **options})
    with warnings.catch_warnings():
        for said in EXPECTED.get(run, ()):
            warnings.filterwarnings("ignore", said)
        fitter.fit(module, train_loader(), val_loader())
    return student, module, fitter


def assert_reached(student, recipe):
    layers = [student.net[place] for place in (0, 4)]
    hidden = [weight for layer in layers for weight in layer.parameters() if weight.ndim > 1]
    if recipe.channel_pruning is not None:
        assert [tuple(layer.weight.shape) for layer in layers] == [(8, 12), (8, 8)]
    if recipe.low_rank is not None:
        assert [layer.rank for layer in layers] == [2, 2]
    if recipe.weight_pruning is not None:
        numel = sum(weight.numel() for weight in hidden)
        assert sum(int((weight == 0).sum()) for weight in hidden) == int(0.5 * numel + 0.5)
    linear = [layer for layer in student.net.modules() if isinstance(layer, nn.Linear)]
    assert [layer.quantization_phase for layer in linear] == ["frozen"] * (3 if recipe.low_rank is None else 5)


ALL = "channels + low rank + weights + rounding"
"""The stack of the quick tests; those of the others are slow."""
OF_CALLBACKS_AND_TYPES = (
    "bf16-true",
    "64-true",
    "weight averaging",
    "exponential averaging",
    "several optimizers by hand",
    "compiled",
)
"""Runs whose quick test is without a teacher; the others are runs of test_promises.py, or say no more alone."""
every_stack = pytest.mark.parametrize("stack", cells(list(STACKS), quick=[ALL]))


@pytest.mark.parametrize(
    ("taught", "run"),
    cells(
        [False, True],
        list(RUNS),
        quick=[
            *((True, run) for run in RUNS if run not in OF_CALLBACKS_AND_TYPES),
            *((False, run) for run in OF_CALLBACKS_AND_TYPES),
        ],
    ),
)
@every_stack
def test_what_was_asked_is_reached_and_the_file_reloads(tmp_path, stack, taught, run):
    recipe = Recipe(**STACKS[stack], distillation={"alpha": 0.5} if taught else None)
    kinds = [*(["distilled"] if taught else []), *(["low rank"] if recipe.low_rank is not None else [])]
    for refused in [REFUSED[run, kind] for kind in kinds if (run, kind) in REFUSED]:
        with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=refused):
            fit(tmp_path, run, recipe, taught=taught)
        return
    student, module, fitter = fit(tmp_path, run, recipe, taught=taught)
    assert_reached(student, recipe)
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    fresh = new(parts(run)[0], width=16).to(next(student.parameters()).dtype)
    into = DistillationModule(fresh, new(Quiet, width=32)) if taught else fresh
    again = load_from_checkpoint(into, tmp_path / "last.ckpt")
    assert_same_state(again, module)
    inputs = train_loader().dataset[:8][0].to(next(student.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(inputs), student.eval()(inputs))


@pytest.mark.parametrize(
    ("taught", "run"),
    cells(
        [False, True],
        ["plain", "bf16-mixed", "max_steps", "exponential averaging", "early stopping"],
        quick=[(False, "plain"), (False, "exponential averaging"), (True, "bf16-mixed")],
    ),
)
def test_all_of_it_with_the_score_and_the_checkpoint_that_goes_by_it(tmp_path, taught, run):
    words = {"score": {"weights": {"size": 1.0, "accuracy": 0.1}, "size": "bits"}, "checkpoint": {"monitor": "P"}}
    stack = STACKS["channels + weights + rounding"]
    recipe = Recipe(**stack, **words, distillation={"alpha": 0.5} if taught else None)
    student, _, fitter = fit(tmp_path, run, recipe, taught=taught)
    assert_reached(student, recipe)
    assert fitter.callback_metrics["P/feasible"] == 1.0
    assert fitter.checkpoint_callback.best_model_path


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "distilled"])
def test_barebones_and_the_score_exclude_each_other(tmp_path, taught):
    recipe = Recipe(**STACKS["weights + rounding"], score=True, distillation={"alpha": 0.5} if taught else None)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=REFUSED["barebones", "scored"]):
        fit(tmp_path, "barebones", recipe, taught=taught)


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "distilled"])
@every_stack
def test_a_fast_run_reaches_the_target_of_everything(tmp_path, stack, taught):
    fractions = {
        name: {key: value for key, value in words.items() if key not in ("start", "end", "freeze")}
        for name, words in STACKS[stack].items()
    }
    recipe = Recipe(**fractions, distillation={"alpha": 0.5} if taught else None)
    student = new(width=16)
    run = trainer(tmp_path, *recipe.callbacks(), fast_dev_run=6)
    run.fit(recipe.wrap(student, new(width=32) if taught else None), train_loader(), val_loader())
    assert_reached(student, recipe)


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "distilled"])
@every_stack
def test_resumed_equals_uninterrupted(tmp_path, stack, taught):
    recipe = Recipe(**STACKS[stack], distillation={"alpha": 0.5} if taught else None)
    teacher = new(Quiet, width=32) if taught else None

    def run(*files, ckpt_path=None):
        module = recipe.wrap(new(width=16, dropout=0.2), copy.deepcopy(teacher))
        run = trainer(tmp_path, SeededByStep(), *recipe.callbacks(), *files)
        run.fit(module, train_loader(), val_loader(), ckpt_path=ckpt_path)
        return module

    whole = run(Files(tmp_path))
    for epoch in range(2):
        assert_same_state(run(ckpt_path=tmp_path / f"{epoch}.ckpt"), whole)
