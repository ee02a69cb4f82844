"""DepthPruning in a fit: what leaves, what follows, what is refused, and what judging leaves untouched."""

import logging
from collections import namedtuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, default_collate

from helpers.models import (
    Classifier,
    Files,
    ResumableLoader,
    SeededByStep,
    Stacked,
    assert_same_state,
    data,
    fit,
    new,
    trainer,
    val_loader,
)
from lightning_optim import (
    DepthPruning,
    DistillationModule,
    Feature,
    PerformanceScore,
    QuantizationAwareTraining,
    Recipe,
    WeightPruning,
    load_from_checkpoint,
)
from lightning_optim.callbacks.kept_batches import ROWS, KeptBatches, as_stored, from_stored
from lightning_optim.distillation.indexed import Indexed
from lightning_optim.low_rank import LowRank

WINDOW = {"start": 2, "end": 7}


def numbers(module):
    return [block.number for block in module.blocks]


def test_blocks_leave_one_an_event_and_optimizer_and_log_follow(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sizes = {}

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert {id(p) for p in held} == {id(p) for p in pl_module.parameters()}
            assert set(trainer.optimizers[0].state) == set(held)
            sizes.setdefault(len(pl_module.blocks), trainer.global_step)

    module = new(Stacked)
    run = fit(tmp_path, module, DepthPruning(0.5, **WINDOW), Notes())
    assert sizes == {4: 1, 3: 5, 2: 7}
    assert numbers(module) == [0, 1]
    assert run.callback_metrics["depth/blocks"] == 2
    assert run.callback_metrics["depth/seconds"] > 0
    left = sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in new(Stacked).parameters())
    assert run.callback_metrics["depth/parameters"] == pytest.approx(left)
    assert "asked 2 of 4 blocks gone; 2 are (blocks." in caplog.text
    assert "blocks | 4" in caplog.text.replace("│", "|").replace("  ", " ")


@pytest.mark.parametrize("events", [1, 3])
def test_several_blocks_an_event_are_chosen_one_after_the_other(tmp_path, events):
    module = new(Stacked)
    fit(tmp_path, module, DepthPruning(3, events=events, **WINDOW))
    assert numbers(module) == [0]


class Watched(Stacked):
    """It counts its steps, draws numbers, and keeps a metric and BatchNorm statistics."""

    def __init__(self, **words):
        super().__init__(**words)
        self.steps, self.seen, self.logged = 0, [], 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen.append(batch[0].sum().item())
        torch.rand(1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("criterion", ["loss", "influence"])
def test_judging_leaves_random_state_statistics_and_counters_untouched(tmp_path, criterion):
    """A run whose judged blocks stay (the schedule removes at the end only) is the run without the callback."""
    plain, judged = new(Watched, dropout=0.3), new(Watched, dropout=0.3)
    fit(tmp_path, plain, max_epochs=2)
    fit(tmp_path, judged, DepthPruning(2, criterion=criterion, start=16, end=16), max_epochs=2)
    assert judged.steps == plain.steps == 16
    assert judged.seen == plain.seen
    assert numbers(judged) == [0, 1]
    kept = [name for name in plain.state_dict() if name.startswith("net.")]
    for name in kept:
        assert torch.equal(judged.state_dict()[name], plain.state_dict()[name]), name


def test_the_judged_loss_is_that_of_the_training_step_in_eval_mode(tmp_path):
    """Without dropout on eight rows of each of four batches it can be computed by hand."""
    scores, kept = {}, []

    class Spies(DepthPruning):
        def _choose(self, trainer, pl_module, number):
            kept.extend(batch for batch, _ in self._batches.items)
            chosen = super()._choose(trainer, pl_module, number)
            module = pl_module.eval()
            for place in range(4):
                blocks = [block for other, block in enumerate(module.blocks) if other != place]
                with torch.no_grad():
                    losses = []
                    for x, y in kept:
                        hidden = module.net[:4](x)
                        before = hidden
                        for block in blocks:
                            hidden = block(hidden)
                        for block in module.blocks:
                            before = block(before)
                        losses.append(
                            F.cross_entropy(module.net[4:](hidden), y) - F.cross_entropy(module.net[4:](before), y)
                        )
                scores[place] = float(sum(losses) / len(losses))
            module.train()
            assert chosen[0].score == pytest.approx(min(scores.values()), abs=1e-6)
            assert scores[chosen[0].place] == min(scores.values())
            return chosen

    fit(tmp_path, new(Stacked, dropout=0.5), Spies(1, start=5, end=5), max_epochs=1)
    assert len(kept) == 4
    assert len(scores) == 4


@pytest.mark.parametrize(
    "averaging",
    [
        WeightAveraging,
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    ],
    ids=["mean", "exponential", "stochastic"],
)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averaged_copies_follow(tmp_path, averaging):
    module = new(Stacked)
    fit(tmp_path, module, averaging(), DepthPruning(0.5, start=2, end=12))
    assert numbers(module) == [0, 1]


def test_masks_and_ranges_of_blocks_that_left_are_gone(tmp_path):
    module = new(Stacked)
    weights = WeightPruning(0.5, start=1, end=20, every_n_steps=1)
    integers = QuantizationAwareTraining(weight_bits=4, start=1, observe_steps=2, freeze=22)
    run = fit(tmp_path, module, weights, integers, DepthPruning(0.5, start=3, end=12), Files(tmp_path / "files"))
    names = {f"blocks.{place}.{layer}" for place in range(2) for layer in ("up", "down")}
    assert {name.removesuffix(".weight") for name in weights.masks} == names | {"net.0", "net.4"}
    assert set(integers._layers) == names | {"net.0", "net.4", "net.6"}
    zeros = sum(int((weight == 0).sum()) for weight in weights.target_parameters().values())
    assert zeros == int(0.5 * sum(weight.numel() for weight in weights.target_parameters().values()) + 0.5)
    run.save_checkpoint(tmp_path / "file.ckpt")
    assert_same_state(load_from_checkpoint(Stacked, tmp_path / "file.ckpt"), module)


def test_the_score_counts_the_time_of_events_apart(tmp_path):
    score = PerformanceScore(weights={"size": 1.0, "train_time": 1.0, "accuracy": 1.0}, until_reached="score")
    pruning = DepthPruning(0.5, start=9, end=15)
    run = fit(tmp_path, new(Stacked), pruning, score)
    assert pruning.event_seconds >= float(run.callback_metrics["depth/seconds"]) > 0
    assert run.callback_metrics["P/size"] == pytest.approx(float(run.callback_metrics["depth/parameters"]))


def test_the_dense_file_loads_into_the_pruned_module_and_back(tmp_path):
    module = new(Stacked)
    fit(tmp_path, module, DepthPruning(0.5, start=9, end=15), Files(tmp_path))
    dense = load_from_checkpoint(Stacked, tmp_path / "0.ckpt")
    assert numbers(dense) == [0, 1, 2, 3]
    assert_same_state(load_from_checkpoint(dense, tmp_path / "2.ckpt"), module)
    assert numbers(dense) == [0, 1]
    again = load_from_checkpoint(module, tmp_path / "0.ckpt")
    assert numbers(again) == [0, 1, 2, 3]


def test_a_recipe_lays_out_its_window_first(tmp_path):
    recipe = Recipe(depth_pruning=0.5, weight_pruning=0.5, quantization={"weight_bits": 4})
    assert recipe.stages == ("depth_pruning", "weight_pruning", "quantization")
    assert [callback.order for callback in recipe.callbacks()] == [5, 20, 30]
    assert recipe.depth_pruning == {"start": 0.1, "end": 0.35, "pruning_ratio": 0.5}
    module = new(Stacked)
    fit(tmp_path, module, *recipe.callbacks())
    assert numbers(module) == [0, 1]


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "distilled"])
def test_blocks_leave_and_the_layers_of_the_others_become_two_in_one_recipe(tmp_path, taught):
    """Blocks go first; the factors belong to blocks that stayed; a run that goes on in between ends the same."""
    recipe = Recipe(
        depth_pruning={"pruning_ratio": 0.5, "start": 2, "end": 7},
        low_rank={"rank": 3, "include": ["*blocks.*"], "start": 8, "end": 12},
        quantization={"weight_bits": 4, "start": 14, "freeze": 20},
        distillation={"alpha": 0.5} if taught else None,
    )
    assert recipe.stages[:3] == ("depth_pruning", "low_rank", "quantization")

    def run(*callbacks, ckpt_path=None):
        student = new(Quiet, dropout=0.2)
        module = recipe.wrap(student, new(Quiet, width=32) if taught else None)
        fitter = trainer(tmp_path, SeededByStep(), *recipe.callbacks(), *callbacks)
        torch.manual_seed(0)
        fitter.fit(module, ResumableLoader(), val_loader(), ckpt_path=ckpt_path)
        return module, student

    module, student = run(Files(tmp_path / "files", every_n_steps=5))
    assert numbers(student) == [0, 1]
    for block in student.blocks:
        assert (type(block.up), block.up.rank, block.down.rank) == (LowRank, 3, 3)
        assert block.down.expand.quantization_phase == "frozen"
    for file in ("step5", "step10", "1"):
        assert_same_state(run(ckpt_path=tmp_path / "files" / f"{file}.ckpt")[0], module)
    fresh = new(Quiet)
    into = DistillationModule(fresh, new(Quiet, width=32)) if taught else fresh
    assert_same_state(load_from_checkpoint(into, tmp_path / "files" / "2.ckpt"), module)
    inputs = data()[:][0]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(inputs), student.eval()(inputs))


# Distillation.


class Quiet(Stacked):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def distilled(features=(), **words):
    return DistillationModule(new(Quiet), new(Quiet, width=32), features=features, **words)


def test_under_distillation_blocks_are_judged_by_the_whole_loss(tmp_path):
    module = distilled(alpha=0.5)
    fit(tmp_path, module, DepthPruning(0.5, **WINDOW), Files(tmp_path))
    assert numbers(module.student) == [0, 1]
    assert module.teacher is not None
    again = distilled(alpha=0.5)
    fit(tmp_path, again, DepthPruning(0.5, **WINDOW), ckpt_path=tmp_path / "0.ckpt")
    assert_same_state(again, module)


def test_features_that_name_a_block_that_may_leave_raise_at_fit_start(tmp_path):
    module = distilled([Feature("blocks.2", "blocks.3", "hint")])
    with pytest.raises(
        MisconfigurationException,
        match=r"feature 'blocks.2' names student.blocks.2, in a block that may be removed. Keep that block, "
        r"exclude=\['student.blocks.2'\], or name one of the blocks of student.blocks that stay: student.blocks.0.",
    ):
        fit(tmp_path, module, DepthPruning(0.5, exclude=["blocks.0"], **WINDOW))


def test_the_layer_of_a_feature_keeps_its_block_and_moves_up_with_it(tmp_path):
    features = [Feature("blocks.3", "blocks.3", "hint"), Feature("blocks.3.up", "blocks.1.up", "hint")]
    pruning = {"pruning_ratio": 0.5, "criterion": "influence", "exclude": ["blocks.3"], **WINDOW}
    module = distilled(features)
    kept = module.student.blocks[3]
    fit(tmp_path, module, DepthPruning(**pruning), SeededByStep(), Files(tmp_path))
    assert module.student.blocks[1] is kept
    assert [feature.student for feature in module.features] == ["blocks.1", "blocks.1.up"]
    for epoch in range(2):
        again = distilled(features)
        fit(tmp_path, again, DepthPruning(**pruning), SeededByStep(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_state(again, module)
        assert [feature.student for feature in again.features] == ["blocks.1", "blocks.1.up"]


# Refusals.


class ByHand(Stacked):
    def __init__(self, **words):
        super().__init__(**words)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_is_judged_by_influence_only(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"steps its optimizers itself .* Take criterion='influence'"):
        fit(tmp_path, new(ByHand), DepthPruning(0.5, **WINDOW))
    module = new(ByHand)
    fit(tmp_path, module, DepthPruning(0.5, criterion="influence", **WINDOW))
    assert numbers(module) == [0, 1]


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (Classifier, {}, "can remove nothing: no ModuleList or Sequential holds 3 blocks of one class"),
        (Stacked, {"pruning_ratio": 4}, "asks for 4 of the 4 blocks of blocks, and at least one must stay"),
        (Stacked, {"pruning_ratio": 0.1}, "can remove nothing: pruning_ratio=0.1 is less than half a block of blocks"),
        (
            Stacked,
            {"include": ["net"]},
            r"`include` names net, whose .* are of different classes \(Linear, BatchNorm1d",
        ),
        (Stacked, {"pruning_ratio": 3, "exclude": ["blocks.1", "blocks.2"]}, "of which 2 may be removed"),
    ],
    ids=["no stack", "all", "none", "classes", "too many"],
)
def test_what_cannot_be_is_refused_before_the_first_event(tmp_path, model, words, message):
    module = new(model)
    example = torch.zeros(2, 12)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, DepthPruning(**{**WINDOW, **words}, example_inputs=example))
    module = new(model)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, DepthPruning(**{**WINDOW, **words}))


def test_two_callbacks_for_one_stack_are_refused(tmp_path):
    both = [DepthPruning(1, include=["blocks.*"], **WINDOW), DepthPruning(1, **WINDOW)]
    with pytest.raises(MisconfigurationException, match="blocks is selected by two DepthPruning callbacks"):
        fit(tmp_path, new(Stacked), *both)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"pruning_ratio": 1.0}, ValueError, "is a fraction in \\(0, 1\\)"),
        ({"pruning_ratio": "all"}, TypeError, "must be a float"),
        ({"criterion": "depth"}, ValueError, "unknown criterion 'depth'"),
        ({"schedule": "slow"}, ValueError, "unknown schedule 'slow'"),
        ({"events": 0}, ValueError, "`events` must be a whole number >= 1"),
        ({"start": 0.5, "end": 0.2}, ValueError, "`start` must not be after `end`"),
        ({"include": "blocks"}, TypeError, "`include` must be a list"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(words, error, message):
    with pytest.raises(error, match=message):
        DepthPruning(**words)


def test_a_step_that_fails_in_eval_mode_is_named(tmp_path):
    class Fails(Stacked):
        def training_step(self, batch, batch_idx):
            if not self.training:
                raise ValueError("train first")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"the training step of Fails fails in eval mode .* \(train first\)"):
        fit(tmp_path, new(Fails), DepthPruning(0.5, **WINDOW))


# Kept batches.

Pair = namedtuple("Pair", ["x", "y"])


def kept(batch):
    batches = KeptBatches(inputs=False)
    batches.begin_batch(nn.Identity(), batch, 3)
    return batches


def test_kept_batches_are_copies_of_a_few_rows():
    x = torch.randn(40, 3, requires_grad=True)
    batches = kept({"x": x, "y": torch.arange(40), "scale": torch.tensor(2.0)})
    ((batch, index),) = batches.items
    assert index == 3
    assert batch["x"].shape == (ROWS, 3)
    assert not batch["x"].requires_grad
    assert batch["scale"] == 2.0
    with torch.no_grad():
        x.zero_()
    assert batch["x"].abs().sum() > 0
    ((ragged, _),) = kept((torch.zeros(40, 2), torch.zeros(60))).items
    assert [len(part) for part in ragged] == [40, 60]
    ((texts, _),) = kept((torch.zeros(40, 2), ["a"] * 40)).items
    assert len(texts[0]) == 40


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(3),
        [torch.arange(3), (1, 2.5, "a", None)],
        {"x": torch.arange(3), "lists": [[1], [2]]},
        Pair(torch.arange(3), 4),
        Indexed(torch.arange(3), torch.arange(3)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_comes_back_from_a_file(tmp_path, batch):
    torch.save(as_stored(batch), tmp_path / "batch.pt")
    again = from_stored(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert str(again) == str(batch).replace("Pair", "Batch")
    assert isinstance(again, Indexed) is isinstance(batch, Indexed)


def test_a_mapping_of_another_class_keeps_items_and_attributes():
    collections = pytest.importorskip("transformers")
    encoding = collections.BatchEncoding({"input_ids": torch.arange(3)})
    again = from_stored(as_stored(encoding))
    assert torch.equal(again["input_ids"], encoding["input_ids"])
    assert torch.equal(again.input_ids, encoding.input_ids)
    with pytest.raises(AttributeError, match="labels"):
        _ = again.labels


class Graph:
    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_batches_of_ones_own_class_are_judged_and_not_saved(tmp_path):
    class OfGraphs(Stacked):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch.x), batch.y)

    rows = data()
    loader = DataLoader(rows, 8, collate_fn=lambda samples: Graph(*default_collate(samples)))
    module = new(OfGraphs)
    run = trainer(tmp_path, DepthPruning(0.5, **WINDOW), Files(tmp_path, every_n_steps=3), limit_val_batches=0)
    with pytest.warns(UserWarning, match="judges blocks on batches that hold a Graph, which no checkpoint can hold"):
        run.fit(module, loader)
    assert numbers(module) == [0, 1]
