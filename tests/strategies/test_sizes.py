"""Numbers of devices that share layers, hold shards and hold copies."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.strategies.sizes import resolve_sizes, said_sizes


@pytest.mark.parametrize(
    ("arguments", "devices", "nodes", "expected", "said"),
    [
        ({"tensor": 1, "replicate": 1, "shard": True}, 4, 2, (1, 8, 1), "8 shards"),
        ({"tensor": 1, "replicate": "nodes", "shard": True}, 4, 2, (1, 8, 2), "2 copies x 4 shards"),
        ({"tensor": "node", "replicate": 1, "shard": False}, 4, 1, (4, 1, 1), "4 tensor"),
        ({"tensor": 2, "replicate": 1, "shard": True}, 4, 2, (2, 4, 1), "4 shards x 2 tensor"),
        ({"tensor": 1, "replicate": 1, "shard": True}, 1, 1, (1, 1, 1), "1 shard"),
    ],
)
def test_sizes(arguments, devices, nodes, expected, said):
    sizes = resolve_sizes(**arguments, devices=devices, nodes=nodes)
    assert sizes == expected
    assert said_sizes(sizes.replicate, sizes.tensor, devices * nodes, shard=arguments["shard"]) == said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tensor": 3, "replicate": 1, "shard": True}, "`tensor`=3 does not divide the 4 devices of a node"),
        ({"tensor": 1, "replicate": 3, "shard": True}, "`replicate`=3 does not divide the 4 devices in all"),
        ({"tensor": 1, "replicate": "nodes", "shard": True}, "the Trainer has one node"),
        ({"tensor": 2, "replicate": 1, "shard": False}, "uses exactly `tensor` devices: 2 of 4"),
    ],
)
def test_sizes_that_do_not_fit_raise(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        resolve_sizes(**arguments, devices=4, nodes=1)
