"""What the tests ask of each technique, and how they see that it was reached: a row for each of ``TECHNIQUES``.

The model is ``helpers.models.Classifier`` of width 16, or the one that a row names, trained for three epochs of eight
steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn

from helpers.models import Classifier, Stacked
from lightning_optim import (
    ChannelPruning,
    DepthPruning,
    LowRankFactorization,
    QuantizationAwareTraining,
    WeightPruning,
)
from lightning_optim.techniques import TECHNIQUES


@dataclass(frozen=True)
class Tried:
    """How a technique is tried.

    Attributes:
        make: Makes the callback; takes ``start``, ``end`` and arguments of the callback.
        check: Asserts that a module has what was asked.
        cases: Names of ``integration/sharded_worker.py`` that show that it works under a strategy.
        model: What it is tried on.
    """

    make: Callable[..., Any]
    check: Callable[[pl.LightningModule], None]
    cases: tuple[str, ...]
    model: type[Classifier] = Classifier


def blocks(**arguments):
    return DepthPruning(0.5, **{"start": 2, "end": 7, **arguments})


def weights(**arguments):
    return WeightPruning(0.8, **{"start": 2, "end": 9, "every_n_steps": 3, **arguments})


def channels(**arguments):
    return ChannelPruning(0.5, **{"start": 2, "end": 7, "events": 2, "scope": "layer", **arguments})


def low_rank(**arguments):
    return LowRankFactorization(**{"rank": 4, "start": 2, "end": 7, **arguments})


def integers(*, start=2, end=9, **arguments):
    return QuantizationAwareTraining(start=start, freeze=end, **{"weight_bits": 4, **arguments})


def hidden(module):
    """The weights of the hidden layers, or of their factors."""
    layers = [module.net[place] for place in (0, 4)]
    layers += [layer for block in getattr(module, "blocks", ()) for layer in (block.up, block.down)]
    return [weight for layer in layers for weight in layer.parameters() if weight.ndim > 1]


def half_of_the_blocks(module):
    assert [block.number for block in module.blocks] == [0, 1]


def half_of_the_channels(module):
    assert [tuple(module.net[place].weight.shape) for place in (0, 4)] == [(8, 12), (8, 8)]
    assert module.net[6].weight.shape == (3, 8)


def two_for_one(module):
    """Rank 4, or 2 where half of the channels are gone."""
    rank = 4 if module.net[4].out_features == 16 else 2
    assert [module.net[place].rank for place in (0, 4)] == [rank, rank]
    assert type(module.net[6]) is not type(module.net[4])


def zeros(module):
    """80 % of the weights that are left."""
    numel = sum(weight.numel() for weight in hidden(module))
    assert sum(int((weight == 0).sum()) for weight in hidden(module)) == int(0.8 * numel + 0.5)


def rounding(module):
    layers = [layer for layer in module.net.modules() if isinstance(layer, nn.Linear)]
    assert [layer.quantization_phase for layer in layers] == ["frozen"] * len(layers)
    assert all(int(layer.input_batches) > 0 for layer in layers)


TRIED = {
    "depth_pruning": Tried(blocks, half_of_the_blocks, ("blocks",), Stacked),
    "channel_pruning": Tried(channels, half_of_the_channels, ("channels",)),
    "low_rank": Tried(low_rank, two_for_one, ("low_rank",)),
    "weight_pruning": Tried(weights, zeros, ("weights", "wanda", "columns", "both", "score", "all")),
    "quantization": Tried(integers, rounding, ("integers", "histogram", "learned", "both", "all")),
}


def names_without_factors(module):
    """The names of the parameters, with one weight for the two of a layer of low rank."""
    names = [name for name, _ in module.named_parameters() if ".reduce." not in name]
    return [name.replace(".expand.", ".") for name in names]


def assert_reached(module, callbacks):
    """What was asked of each technique is there."""
    for callback in callbacks:
        TRIED[TECHNIQUES.of(callback).name].check(module)
        assert callback.reached_end
