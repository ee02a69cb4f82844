"""``prune_depth`` and what follows a removal: numbers, counts, configurations, plans."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers.models import Residual, Stacked, assert_same_state, new
from lightning_optim import conform, prune_depth
from lightning_optim.depth.configs import counts_of
from lightning_optim.depth.judge import Judge
from lightning_optim.depth.removal import BlockRemoval, without
from lightning_optim.functional.blocks import BLOCK_CRITERIA
from lightning_optim.structure import children_of

ROWS = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


def spread(model):
    """Give the blocks outputs of very different sizes: block 2 matters least, then 0, 3, 1."""
    with torch.no_grad():
        for block, size in zip(model.blocks, (0.02, 3.0, 0.001, 0.5), strict=True):
            block.down.weight.mul_(size)
            block.down.bias.mul_(size)
    return model.eval()


def square(model):
    return model(ROWS).square().mean()


@pytest.mark.parametrize(
    ("criterion", "removed"),
    [("influence", ["blocks.2", "blocks.0"]), ("last", ["blocks.3", "blocks.2"]), ("loss", None), ("random", None)],
)
def test_the_least_important_blocks_leave(criterion, removed):
    model = spread(new(Stacked))
    dense, blocks = copy.deepcopy(model), dict(enumerate(model.blocks))
    report = prune_depth(model, ROWS, pruning_ratio=0.5, criterion=criterion, loss=lambda m: square(m))
    assert removed in (None, report.removed)
    left = [place for place in range(4) if f"blocks.{place}" not in report.removed]
    assert list(model.blocks) == [blocks[place] for place in left]
    assert [block.number for block in model.blocks] == [0, 1]
    assert report.blocks == {"blocks": (4, 2)}
    assert report.pruning_ratio == 0.5
    before, after = report.parameters
    assert (before, after) == tuple(sum(p.numel() for p in m.parameters()) for m in (dense, model))
    with torch.no_grad():
        for place in range(4):
            if place not in left:
                dense.blocks[place].down.weight.zero_()
                dense.blocks[place].down.bias.zero_()
        assert torch.equal(model(ROWS), dense(ROWS))
    assert "2 blocks removed; parameters" in str(report)


def test_by_loss_each_is_judged_given_those_gone():
    """Two blocks of three fill a gap that either fills alone: the second is needed once the first is gone."""

    class Fill(nn.Module):
        def __init__(self, place):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(float(place)))

        def forward(self, x):
            return torch.maximum(x, self.value.detach() + 1.0) if self.value < 2 else x + 0.1

    model = nn.Sequential(nn.Sequential(Fill(1), Fill(1), Fill(5), Fill(5)))
    zeros = torch.zeros(3, 2)
    with torch.no_grad():
        full = model(zeros)
    report = prune_depth(
        model, zeros, pruning_ratio=2, criterion="loss", loss=lambda root: (root(zeros) - full).abs().mean()
    )
    assert report.removed == ["0.0", "0.2"]
    assert list(report.scores.values()) == pytest.approx([0.0, 0.1], abs=1e-6)


def test_reusing_what_precedes_a_candidate_changes_no_score():
    model = spread(new(Stacked))
    scores = {
        reuse: Judge(model, BLOCK_CRITERIA["loss"], [square], reuse=reuse).scores({"blocks": range(4)})
        for reuse in (True, False)
    }
    assert scores[True] == scores[False]
    called = []
    handles = [
        block.register_forward_hook(lambda *_, place=place: called.append(place))
        for place, block in enumerate(model.blocks)
    ]
    Judge(model, BLOCK_CRITERIA["loss"], [square]).scores({"blocks": range(4)})
    for handle in handles:
        handle.remove()
    assert called == [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]


def test_a_loss_that_blows_up_keeps_the_block():
    model = spread(new(Stacked))

    def loss(root):
        return 1.0 if root.blocks[0].down.weight.abs().max() < 0.1 else float("nan")  # the first block is small

    scores = Judge(model, BLOCK_CRITERIA["loss"], [loss]).scores({"blocks": range(4)})
    assert list(scores.values()) == [math.inf, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="without any further block the loss is infinite or NaN"):
        prune_depth(model, ROWS, pruning_ratio=1, criterion="loss", loss=loss, include=["blocks.0"])
    with pytest.raises(ValueError, match="the loss of a judged batch is nan"):
        prune_depth(new(Stacked), ROWS, criterion="loss", loss=lambda root: float("nan"))


def test_the_plan_makes_a_fresh_model_the_same():
    model = spread(new(Stacked))
    report = prune_depth(model, ROWS, pruning_ratio=0.5)
    fresh = new(Stacked)
    conform(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    assert_same_state(fresh, model)
    assert [block.number for block in fresh.blocks] == [0, 1]
    with pytest.raises(ValueError, match="it has 2 blocks, and a stack has 3 or more"):
        prune_depth(fresh, ROWS, pruning_ratio=1, include=["blocks"])


def test_a_removal_for_a_while_leaves_no_trace():
    model = new(Stacked)
    blocks = list(model.blocks)
    with without(model, {"blocks": [1, 2]}):
        assert list(model.blocks) == [blocks[0], blocks[3]]
        assert [block.number for block in model.blocks] == [0, 1]
    assert list(model.blocks) == blocks
    assert [block.number for block in blocks] == [0, 1, 2, 3]


def test_names_that_count_up_move_up_and_others_stay():
    model = nn.Sequential()
    for name in ("layer_1", "layer_2", "layer_3", "layer_4"):
        model.add_module(name, nn.Linear(2, 2))
    own = nn.Sequential()
    for name in ("stem", "body", "head"):
        own.add_module(name, nn.Linear(2, 2))
    root = nn.ModuleDict({"numbered": model, "named": own})
    BlockRemoval({"numbered": [1], "named": [1]})(root)
    assert list(children_of(model)) == ["layer_1", "layer_2", "layer_3"]
    assert list(children_of(own)) == ["stem", "head"]


class SomeConfig:
    def __init__(self, **numbers):
        vars(self).update(numbers)


def test_counts_are_told_by_value_and_name():
    root = nn.Module()
    root.encoder, root.decoder = nn.Module(), nn.Module()
    for part in (root.encoder, root.decoder):
        part.layers = nn.ModuleList(Residual(4, 0.0, place) for place in range(4))
        part.num_layers, part.width = 4, 4
    root.config = SomeConfig(
        is_encoder_decoder=True, num_layers=4, encoder_layers=4, decoder_layers=4, num_heads=4,
        layer_types=["a", "b", "c", "d"], decoder_block_kinds=("e", "f", "g", "h"), kept_layers=[0, 1, 2, 3],
    )  # fmt: skip
    assert counts_of(root, "encoder.layers", [0, 2]) == {
        "encoder": {"num_layers": 2},
        "": {"config.num_layers": 2, "config.encoder_layers": 2, "config.layer_types": ["a", "c"]},
    }
    assert counts_of(root, "decoder.layers", [0, 2]) == {
        "decoder": {"num_layers": 2},
        "": {"config.decoder_layers": 2, "config.decoder_block_kinds": ("e", "g")},
    }


def test_stages_are_counted_in_a_list():
    root = nn.Module()
    root.stages = nn.ModuleList(nn.ModuleList(Residual(4, 0.0, place) for place in range(n)) for n in (3, 6, 3))
    root.config = SomeConfig(depths=[3, 6, 3], num_layers=3)
    assert counts_of(root, "stages.1", [0, 5]) == {"": {"config.depths": [3, 2, 3]}}
    BlockRemoval({"stages.0": [1], "stages.2": [0, 1]})(root)
    assert root.config.depths == [2, 6, 1]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            {"pruning_ratio": 1.5},
            ValueError,
            "is a fraction in \\(0, 1\\) of each stack's blocks, got 1.5. For a number",
        ),
        ({"pruning_ratio": 0}, ValueError, "is a number of blocks >= 1, got 0"),
        ({"pruning_ratio": True}, TypeError, "must be a float .* or an int"),
        ({"pruning_ratio": 4}, ValueError, "asks for 4 of the 4 blocks of blocks, and at least one must stay"),
        (
            {"pruning_ratio": 0.1},
            ValueError,
            "can remove nothing: pruning_ratio=0.1 is less than half a block of blocks",
        ),
        ({"exclude": ["blocks"]}, ValueError, "can remove nothing: blocks: excluded by 'blocks'"),
        ({"criterion": "loss"}, ValueError, "pass loss=callable\\(model\\) -> number, or take criterion='influence'"),
        ({"criterion": "depth"}, ValueError, "unknown criterion 'depth'; known: influence, last, loss, random"),
        ({"progress": "no"}, TypeError, "`progress` must be True or False"),
        ({"module": "encoder"}, ValueError, "module='encoder' names no module of Stacked"),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_model_as_it_was(words, error, message):
    model = new(Stacked)
    with pytest.raises(error, match=message):
        prune_depth(model, ROWS, **words)
    assert len(model.blocks) == 4


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="forward of Stacked fails with `example_inputs`"):
        prune_depth(new(Stacked), torch.zeros(2, 3))


def test_a_criterion_of_ones_own():
    def heaviest(facts):
        return -float(facts.hidden_out.norm()) if facts.place else -9.0

    heaviest.needs = ("hidden",)
    assert prune_depth(new(Stacked), ROWS, pruning_ratio=1, criterion=heaviest).removed[0] in {
        f"blocks.{place}" for place in range(4)
    }
    heaviest.needs = ("gradient",)
    with pytest.raises(ValueError, match="can need 'loss', 'hidden', 'generator', got 'gradient'"):
        prune_depth(new(Stacked), ROWS, criterion=heaviest)


def test_a_model_without_stacks():
    with pytest.raises(ValueError, match="no ModuleList or Sequential holds 3 blocks of one class"):
        prune_depth(nn.Sequential(nn.Linear(12, 3)), ROWS)
