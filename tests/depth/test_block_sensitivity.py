"""What each block costs."""

import pytest
import torch

from helpers.models import Stacked, assert_same_state, new
from lightning_optim import sensitivity

ROWS = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


def metric(model):
    assert not model.training
    assert not torch.is_grad_enabled()
    return float(-model(ROWS).square().mean())


def test_the_metric_without_each_block():
    model = new(Stacked).train()
    with torch.no_grad():
        for part in (model.blocks[1].down.weight, model.blocks[1].down.bias):
            part.zero_()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    report = sensitivity(model, metric, ROWS, what="blocks", exclude=["blocks.3"], progress=False)
    assert list(report.scores) == ["blocks.0", "blocks.1", "blocks.2"]
    assert report.drop("blocks.1") == 0.0
    assert abs(report.drop("blocks.0")) > 0
    assert report.least(3) == sorted(report.scores, key=report.drop)
    assert report.left_out == {"blocks.3": "excluded by 'blocks.3'"}
    assert_same_state(model, before)
    assert model.training
    assert [block.number for block in model.blocks] == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), state)
    blocks = [block for place, block in enumerate(model.eval().blocks) if place != 2]
    with torch.no_grad():
        hidden = model.net[:4](ROWS)
        for block in blocks:
            hidden = block(hidden)
        assert report.scores["blocks.2"] == pytest.approx(float(-model.net[4:](hidden).square().mean()), rel=1e-6)


def test_table_and_plot(tmp_path):
    report = sensitivity(new(Stacked), metric, ROWS, what="blocks")
    lines = str(report).splitlines()
    assert "without" in lines[2]
    assert sum("blocks." in line for line in lines) == 4
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "bars.svg")
    assert "blocks.3" in (tmp_path / "bars.svg").read_text() or (tmp_path / "bars.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"what": "heads"}, "`what` must be one of 'channels', 'blocks', got 'heads'"),
        ({"what": "blocks", "ratios": (0.5,)}, "`ratios` and `criterion` are those of channels"),
        ({"what": "blocks", "exclude": ["blocks"]}, "sensitivity can remove nothing: blocks: excluded"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(new(Stacked), metric, ROWS, **words)
