"""Which channels leave together, and which groups are left alone."""

import pytest
import torch
from torch import nn

from helpers.nets import DAMAGED, PRUNABLE, Attention, Block, Fused, Net, Tied, TiedResidual, ids, images, sequences
from lightning_optim.structured.events import find_prunable, known_groups
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import as_forward_inputs


def report_of(module, inputs, **words):
    roots, left_alone = select_roots(module, "", words.pop("include", None), words.pop("exclude", None))
    return find_prunable(module, as_forward_inputs(inputs), roots, left_alone, **words)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", PRUNABLE)
def test_coupled_layers_are_one_group(name):
    make, inputs, expected = PRUNABLE[name]
    module = make()
    module.train()
    before, random_state = snapshot(module), torch.get_rng_state()
    example = inputs()
    random_state = torch.get_rng_state()
    report = report_of(module, example)
    assert {group: layers.layers - {group} for group, layers in report.groups.items()} == expected
    assert_unchanged(module, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.training


@pytest.mark.parametrize("name", DAMAGED)
def test_what_would_be_damaged_is_left_out_with_the_reason(name):
    make, inputs, left_out, reason = DAMAGED[name]
    module = make()
    before = snapshot(module)
    words = {"exclude": ["b"]} if "parametrized" in name else {}
    report = report_of(module, inputs(), **words)
    for group in left_out:
        assert group not in report.groups
        assert any(word in report.left_out[group] for word in reason.split("|")), report.left_out[group]
    assert_unchanged(module, before)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_shows_whatever_the_weights_are(name):
    """A branch that is switched off (a zero-initialised or a pruned layer) hides nothing from the check."""
    make, inputs, left_out, _ = DAMAGED[name]
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    words = {"exclude": ["b"]} if "parametrized" in name else {}
    assert not set(left_out) & report_of(module, inputs(), **words).groups.keys()


def test_columns_of_embeddings_leave_where_they_are_included():
    for table in (nn.Embedding(20, 16), nn.EmbeddingBag(20, 16)):
        module = Net(lambda s, rows: s.b(s.a(s.table(rows)).relu()), table=table, a=nn.Linear(16, 8), b=nn.Linear(8, 2))
        assert set(report_of(module, ids()).groups) == {"a"}
        report = report_of(module, ids(), include=["table", "a"])
        assert report.groups["table"].layers == {"table", "a"}


def test_scoring_against_the_table_itself_leaves_the_table_whole():
    for table in (nn.Embedding(20, 16), nn.EmbeddingBag(20, 16)):
        module = Net(
            lambda s, rows: s.b(s.a(s.pool(s.table(rows))).relu()) @ s.table.weight.T,
            table=table,
            pool=nn.Identity() if isinstance(table, nn.EmbeddingBag) else nn.Flatten(0, 1),
            a=nn.Linear(16, 32),
            b=nn.Linear(32, 16),
        )
        report = report_of(module, ids(), include=["table", "a", "b"])
        assert set(report.groups) == {"a"}
        assert {"table", "b"} <= report.left_out.keys()


@pytest.mark.parametrize("make", [Tied, TiedResidual])
def test_tied_layers_lose_the_same_channels(make):
    """With a residual connection their widths are one anyway; without, the tensor that they share couples them."""
    report = report_of(make(), ids(), include=["table", "a", "b"])
    shared = next(group for group in report.groups.values() if "out" in group.layers)
    assert shared.layers == {"table", "a", "b", "out"}
    assert set(report.groups) == {"a", shared.name}


def test_blocks_are_the_least_common_multiple_of_all_layers():
    make, inputs, _ = PRUNABLE["grouped"]
    groups = report_of(make(), inputs()).groups
    assert {name: group.blocks for name, group in groups.items()} == {"4": 2, "2": 4, "0": 4}


def test_one_channel_a_block_is_left_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(4, 4), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))
    report = report_of(module, images())
    assert report.left_out["0"] == "one channel a block"


def test_a_selection_is_kept_to():
    make, inputs, _ = PRUNABLE["residual"]
    report = report_of(make(), inputs(), exclude=["stem"])
    assert report.left_out["conv2"] == "coupled with stem (excluded by 'stem')"
    assert set(report_of(make(), inputs(), include=["conv1"]).groups) == {"conv1"}


def test_frozen_layers_and_no_grad_are_no_obstacle():
    make, inputs, expected = PRUNABLE["residual"]
    module = make().requires_grad_(False)
    with torch.no_grad():
        assert set(report_of(module, inputs()).groups) == set(expected)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_model_that_cannot_be_traced_says_what_to_do():
    module = Net(lambda s, x: s.a(x).nonsense(), a=nn.Linear(32, 4))
    with pytest.raises(ValueError, match=r"Net cannot be traced .*module='the part'"):
        TracedModel(module, as_forward_inputs(sequences()))


@pytest.mark.parametrize("style", ["shape", "head_dim", "both", "embed_dim"])
def test_attention_loses_whole_heads(style):
    report = report_of(Block(Attention(style)), sequences())
    group = report.groups["attention.v"]
    assert group.layers == {f"attention.{name}" for name in "qkvo"}
    assert group.unit == 8
    assert ("attention", "num_heads", 8) in group.counts
    assert (("attention", "embed_dim", 1) in group.counts) is (style == "embed_dim")


@pytest.mark.parametrize(
    ("attention", "name", "members", "channels", "least"),
    [
        (lambda: Fused("chunk"), "qkv", {"qkv", "o"}, 32, 16),
        (lambda: Fused("unbind"), "qkv", {"qkv", "o"}, 32, 16),
        (lambda: Attention("head_dim", kv_heads=2), "q", {"q", "o"}, 32, 16),  # each key keeps as many queries
        (lambda: Attention("head_dim", kv_heads=1), "q", {"q", "o"}, 32, 16),
        (lambda: Attention("head_dim", width=64, heads=8, kv_heads=4), "v", {"q", "k", "v", "o"}, 32, 8),
    ],
)
def test_fused_and_shared_projections_lose_whole_heads(attention, name, members, channels, least):
    attention = attention()
    module = Block(attention, attention.o.out_features)
    inputs = torch.randn(2, 6, attention.o.out_features)
    group = report_of(module, inputs).groups[f"attention.{name}"]
    assert group.layers == {f"attention.{member}" for member in members}
    assert (group.channels, group.unit, group.least) == (channels, 8, least)


def test_groups_are_found_again_with_their_heads():
    module, inputs = Block(Attention()), as_forward_inputs(sequences())
    found = report_of(module, inputs).groups
    again = known_groups(module, inputs, found).groups
    assert again == found
    assert list(again) == list(found)


def test_without_the_check_attention_is_left_alone():
    report = report_of(Block(Attention()), sequences(), check=False)
    assert set(report.groups) == {"up", "down"}
    assert "check=True" in report.left_out["attention.v"]


def test_a_gate_in_the_same_projection_leaves_with_its_value():
    make, inputs, _ = PRUNABLE["gate in the same projection"]
    module, example = make(), as_forward_inputs(inputs())
    assert report_of(module, example).groups["a"].blocks == 2
    removal = TracedModel(module, example).remove({"a": [1, 7]})
    assert removal.shapes == {"a.weight": (10, 32), "a.bias": (10,), "b.weight": (2, 5)}
    with pytest.raises(ValueError, match="channels of a that were to stay would leave with others"):
        TracedModel(module, example).remove({"a": [1, 2]})


def test_products_of_stacked_vectors_are_left_alone():
    def interact(s, x, rows):
        stacked = torch.stack([s.b(s.a(x).relu()), *(s.table(rows[:, i]) for i in range(3))], 1)
        return s.out(s.top((stacked @ stacked.transpose(1, 2)).flatten(1)).relu())

    module = Net(
        interact,
        a=nn.Linear(32, 16),
        b=nn.Linear(16, 8),
        table=nn.EmbeddingBag(20, 8),
        top=nn.Linear(16, 12),
        out=nn.Linear(12, 1),
    )
    report = report_of(module, (sequences()[:, 0], ids()[:, :3, None]), include=["a", "b", "top", "table"])
    assert set(report.groups) == {"a", "top"}
    assert "b" in report.left_out
