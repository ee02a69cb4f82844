"""Stacks are found, and blocks that cannot be removed are left alone or refused."""

import re

import pytest
import torch
from torch import nn

from helpers.models import Residual
from lightning_optim.depth.stacks import check_readers, find_stacks, number_of_blocks
from lightning_optim.modules import copy_module


class Body(nn.Module):
    """Calls ``run(self, x)``; layers as keywords."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def chain(name):
    def run(body, x):
        for block in getattr(body, name):
            x = block(x)
        return x

    return run


def residuals(number=4, width=8):
    return nn.ModuleList(Residual(width, 0.0, place) for place in range(number))


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Stage(nn.Module):
    """Like a block of ResNet."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = conv(inputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.skip(x) + self.body(x)


def found(model, inputs=None, **words):
    inputs = torch.randn(2, 8) if inputs is None else inputs
    model = copy_module(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    result = find_stacks(model, lambda root: [root(inputs)], **words)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


def test_a_list_and_a_sequential_of_one_class():
    model = nn.Sequential(nn.Linear(8, 8), Body(chain("blocks"), blocks=residuals()), nn.Sequential(*residuals(3)))
    stacks = found(model).stacks
    assert {name: (stack.blocks, stack.removable) for name, stack in stacks.items()} == {
        "1.blocks": (4, [0, 1, 2, 3]),
        "2": (3, [0, 1, 2]),
    }


def test_the_first_block_of_a_stage_changes_the_shape_and_stays():
    model = nn.Sequential(conv(3, 4), nn.Sequential(Stage(4, 6), Stage(6, 6), Stage(6, 6)), nn.Flatten())
    result = found(model, torch.randn(2, 3, 5, 5))
    assert result.stacks["1"].removable == [1, 2]
    assert result.left_out["1.0"] == "it returns another shape than it takes: (2, 6, 5, 5) for (2, 4, 5, 5)"


class Shifted(Body):
    """It depends on its number."""


def by_number(place):
    block = Shifted(lambda block, x: x + block.linear(x) * block.number, linear=nn.Linear(8, 8))
    block.number = place + 1
    return block


class Pair(nn.Module):
    """A block that hands something else on."""

    def __init__(self, gives):
        super().__init__()
        self.linear, self.gives = nn.Linear(8, 8), nn.Parameter(torch.randn(8)) if gives else None

    def forward(self, x, extra=None):
        extra = self.gives if self.gives is not None else extra
        return x + self.linear(x) * (0.0 if extra is None else extra), extra


def handed_on(body, x):
    extra = None
    for block in body.blocks:
        x, extra = block(x, extra)
    return x


def paired(body, x):
    for block, norm in zip(body.blocks, body.norms, strict=False):
        x = norm(block(x))
    return x


LEFT_ALONE = {
    "shapes that change": (
        lambda: nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 5)),
        "",
        "block 1 returns another shape than it takes: \\(2, 6\\) for \\(2, 7\\)",
    ),
    "one block several times": (
        lambda: Body(chain("blocks"), blocks=nn.ModuleList([Residual(8, 0.0, 0)] * 4)),
        "blocks",
        "it holds the same Residual several times",
    ),
    "branches side by side": (
        lambda: Body(lambda body, x: sum(block(x) for block in body.blocks), blocks=residuals()),
        "blocks.0",
        "other blocks use more of it",
    ),
    "a norm for each block": (
        lambda: Body(paired, blocks=residuals(), norms=nn.ModuleList(nn.Linear(8, 8) for _ in range(4))),
        "blocks.0",
        "other blocks use more of it",
    ),
    "an output of each block": (
        lambda: Body(lambda body, x: [x := block(x) for block in body.blocks], blocks=residuals()),
        "blocks.0",
        "the output has an entry for each block",
    ),
    "never called": (
        lambda: Body(lambda body, x: body.head(x), blocks=residuals(), head=nn.Linear(8, 2)),
        "blocks",
        "the forward pass does not call its blocks",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_removed_is_left_alone_and_refused_by_name(name):
    make, where, reason = LEFT_ALONE[name]
    result = found(make())
    assert not result.stacks
    assert re.search(reason, result.left_out[where])
    if "." not in where:
        with pytest.raises(ValueError, match=f"`include` names .*, whose blocks cannot be removed: .*{reason}"):
            found(make(), include=[f"{where}.*".lstrip(".")])


def test_blocks_of_different_classes_are_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"`include` names 2, whose blocks .* of different classes \(Linear, ReLU\)"):
        found(model, include=["2"])
    with pytest.raises(ValueError, match=r"it has 2 blocks, and a stack has 3 or more"):
        found(nn.Sequential(nn.Linear(8, 8), nn.Sequential(*residuals(2))), include=["1"])
    with pytest.raises(ValueError, match="include: 'decoder' matches no layer"):
        found(model, include=["decoder"])


def test_a_block_that_others_need_stays():
    blocks = nn.ModuleList([Pair(True), Pair(False), Pair(False), Pair(False)])
    stack = found(Body(handed_on, blocks=blocks)).stacks["blocks"]
    assert stack.removable == [1, 2, 3]
    assert "use more of it than the hidden state" in stack.stay[0]


def test_where_the_number_of_a_block_counts_only_the_last_may_leave():
    stack = found(Body(chain("blocks"), blocks=nn.ModuleList(map(by_number, range(4))))).stacks["blocks"]
    assert stack.removable == [3]
    assert "or depend on their number" in stack.stay[0]


def test_a_block_that_is_not_called_stays():
    def skips(body, x):
        for place, block in enumerate(body.blocks):
            x = block(x) if place != 1 else x
        return x

    result = found(Body(skips, blocks=residuals()))
    assert result.left_out["blocks.1"] == "the forward pass does not call it with the example inputs"
    assert result.stacks["blocks"].removable == [2, 3]  # without the first, the second would be called


def test_include_and_exclude_name_stacks_blocks_and_classes():
    model = nn.Sequential(nn.Sequential(*residuals(4)), nn.Sequential(*residuals(4)))
    assert list(found(model, include=["1"]).stacks) == ["1"]
    assert found(model, include=["0.1", "0.3"]).stacks["0"].removable == [1, 3]
    assert found(model, exclude=["0", "1.0"]).stacks["1"].removable == [1, 2, 3]
    assert list(found(model, include=[Residual]).stacks) == ["0", "1"]
    assert list(found(model, module="0").stacks) == ["0"]
    assert found(model, exclude=["0"]).left_out["0"] == "excluded by '0'"


def test_a_stack_inside_of_a_block_goes_with_it_unless_it_is_asked_for():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(*residuals(3))

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.Sequential(*(Outer() for _ in range(3))), nn.Linear(8, 2))
    result = found(model)
    assert list(result.stacks) == ["0"]
    assert result.left_out["0.1.inner"] == "it is inside of a block of 0"
    assert list(found(model, include=["0.1.inner.*"]).stacks) == ["0.1.inner"]


def test_how_many_are_removed():
    stack = found(nn.Sequential(nn.Sequential(*residuals(7)))).stacks["0"]
    assert [number_of_blocks(ratio, stack) for ratio in (0.05, 0.25, 0.5, 1, 6)] == [0, 2, 4, 1, 6]
    with pytest.raises(ValueError, match=r"asks for 7 of the 7 blocks of 0, and at least one must stay. Ask for 6"):
        number_of_blocks(0.95, stack)
    stack.stay.update({0: "it is needed", 2: "excluded"})
    with pytest.raises(ValueError, match=r"of which 5 may be removed: block 0 \(it is needed\); block 2"):
        number_of_blocks(6, stack)


def test_a_layer_that_is_read_keeps_its_block():
    model = nn.Sequential(nn.Sequential(*residuals(4)), nn.Linear(8, 2))
    readers = {"0.2.up": "feature 'up'"}
    with pytest.raises(ValueError, match=r"feature 'up' names 0.2.up, .* exclude=\['0.2'\], .* that stay: 0.1"):
        check_readers(model, readers, exclude=["0.1"])
    check_readers(model, readers, exclude=["0.2"])
    check_readers(model, {"1": "feature '1'"})
