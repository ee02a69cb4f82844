"""The check is exact: norms count the channels that stay, and what the tracing gets wrong is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.nets import Net, flat, images, sequences
from lightning_optim import prune_channels
from lightning_optim.structured.absent import absent_entries, in_float64
from lightning_optim.structured.allocation import Allocation
from lightning_optim.structured.check import damage
from lightning_optim.structured.events import event_damage, find_prunable, plan_event
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.target import as_forward_inputs


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision's ConvNeXt."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class WrittenOut(nn.LayerNorm):
    """The formula instead of the function."""

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Shuffle(nn.Module):
    """As in ShuffleNet."""

    def forward(self, x):
        rows, channels, height, width = x.shape
        return x.view(rows, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Flip(nn.Module):
    def forward(self, x):
        return x.flip(1)


class Function(nn.Module):
    """A function, called as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


NORMS = {
    "LayerNorm with its own forward": lambda: LayerNorm2d(16),
    "LayerNorm written out": lambda: WrittenOut(16),
    "GroupNorm of one group": lambda: nn.GroupNorm(1, 16),
    "GroupNorm of four groups": lambda: nn.GroupNorm(4, 16),
    "GroupNorm without scale": lambda: nn.GroupNorm(1, 16, affine=False),
    "group_norm as a function": lambda: Function(lambda x: F.group_norm(x, 1)),
    "RMS written out": lambda: Function(lambda x: x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()),
    "standardized by var_mean": lambda: Function(
        lambda x: (x - torch.var_mean(x, 1, keepdim=True)[1]) / torch.var_mean(x, 1, keepdim=True)[0].sqrt()
    ),
    "standardized by std": lambda: Function(lambda x: x / x.std((1, 2, 3), keepdim=True)),
    "length 1": lambda: Function(lambda x: F.normalize(x, dim=1)),
    "BatchNorm": lambda: nn.BatchNorm2d(16),
    "InstanceNorm": lambda: nn.InstanceNorm2d(16),
    "none": nn.Identity,
}
PERMUTATIONS = {"none": nn.Identity, "shuffle": Shuffle, "flip": Flip}


def through(norm, permutation, activation=nn.Sigmoid):
    """Sigmoid: a channel that is zero before it is not after it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        activation(),
        norm,
        permutation,
        nn.Conv2d(16, 12, 1),
        nn.ReLU(),
        *flat(12 * 64),
    )


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_channels_leave_through_every_norm_and_never_through_a_permutation(norm, permutation):
    module = through(NORMS[norm](), PERMUTATIONS[permutation]())
    report = prune_channels(module, images(), scope="layer")
    assert ("0" in report.channels) is (permutation == "none")
    assert report.channels["4"] == (12, 6)  # what one group does not bear is checked in the others
    if permutation != "none":
        assert "differs from setting to zero" in report.left_out["0"] or "walk" in report.left_out["0"]


@pytest.mark.parametrize("norm", NORMS)
def test_the_kept_channels_alone_make_the_statistics(norm):
    """Hand arithmetic: the norm of the kept channels, read by the columns of the kept channels."""
    module = through(NORMS[norm](), nn.Identity()).eval()
    x = images()
    inputs = as_forward_inputs(x)
    removal = TracedModel(module, inputs).remove({"0": [0, 5, 8, 13]})
    assert damage(module, inputs, removal) is None
    small = through(NORMS[norm](), nn.Identity()).eval()
    apply_removal(small, removal)
    kept = [c for c in range(16) if c not in (0, 5, 8, 13)]
    with torch.no_grad():
        features = module[:2](x)[:, kept]
        expected = module[5:](F.conv2d(small[2](features), module[4].weight[:, kept], module[4].bias))
    torch.testing.assert_close(small(x), expected)


SEQUENCES = {
    "LayerNorm without scale": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "LayerNorm": lambda: nn.LayerNorm(16),
    "RMSNorm without scale": lambda: nn.RMSNorm(16, elementwise_affine=False),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("norm", SEQUENCES)
def test_norms_over_the_last_dimension_are_checked(norm, flip):
    def forward(s, x):
        y = s.norm(s.a(x))
        return s.c(s.b(y.flip(-1) if flip else y).relu())

    module = Net(forward, a=nn.Linear(32, 16), norm=SEQUENCES[norm](), b=nn.Linear(16, 8), c=nn.Linear(8, 3))
    inputs = as_forward_inputs(sequences())
    report = find_prunable(module, inputs, *select_roots(module))
    assert "b" in report.groups
    assert not flip or "a" not in report.groups


def test_nothing_is_removed_that_only_one_set_of_channels_would_hide():
    """The event is checked with the channels that it removes, not with those of the first check."""
    module = through(nn.GroupNorm(1, 16), Flip())
    inputs = as_forward_inputs(images())
    groups = {group.name: group for group in TracedModel(module, inputs).groups() if group.name in ("0", "4")}
    dense = {name: group.channels for name, group in groups.items()}
    event = plan_event(module, inputs, groups, dense, 0.5, Allocation.of("magnitude", **WORDS))
    problem = event_damage(module, inputs, groups, event)
    assert problem.startswith("0: removing differs from setting to zero by")
    assert "4:" not in problem


WORDS = {"scope": "layer", "reduction": "mean", "round_to": None}


def test_groups_that_need_zeros_pass_beside_groups_that_need_absence():
    """A maximum over channels bears zeros alone, a LayerNorm absence alone; together each is checked by itself."""

    def forward(s, x):
        y = s.a(x).relu()
        return s.c(y / (1 + y.amax(-1, keepdim=True))) + s.d(s.norm(s.b(x)))

    layers = {"a": nn.Linear(32, 16), "b": nn.Linear(32, 16), "norm": nn.LayerNorm(16)}
    module = Net(forward, **layers, c=nn.Linear(16, 5), d=nn.Linear(16, 5))
    inputs = as_forward_inputs(sequences())
    report = find_prunable(module, inputs, *select_roots(module))
    assert set(report.groups) == {"a", "b"}
    dense = {name: group.channels for name, group in report.groups.items()}
    event = plan_event(module, inputs, report.groups, dense, 0.5, Allocation.of("magnitude", **WORDS))
    assert damage(module, inputs, event.removal).only_values
    assert event_damage(module, inputs, report.groups, event) is None


class Island(nn.Module):
    """Float32 inside, whatever comes in; as Hugging Face's norms have it."""

    def forward(self, x):
        y = x.to(torch.float32)
        return (y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6) @ torch.eye(8)).to(x.dtype)


def test_float32_inside_a_layer_is_computed_in_float64():
    module = through(Island(), nn.Identity())
    assert "0" in prune_channels(module, images()).channels
    with in_float64():
        assert Island()(torch.ones(1, 4, 8, 8).double()).dtype == torch.float64


def test_a_model_that_float64_cannot_compute_is_checked_in_its_own_dtype():
    def picky(x):
        assert x.dtype == torch.float32
        return x

    module = through(nn.GroupNorm(1, 16), Function(picky))
    assert "0" in prune_channels(module, images()).channels
    flipped = through(nn.GroupNorm(1, 16), Function(lambda x: picky(x).flip(1)))
    assert "0" not in prune_channels(flipped, images()).channels


RULES = {
    "linear": (lambda x: F.linear(x, torch.ones(2, 4)), lambda x: F.linear(x, torch.ones(2, 3))),
    "product": (lambda x: x @ x.mT, lambda x: x @ x.mT),
    "sum": (lambda x: x.sum(-1), lambda x: x.sum(-1)),
    "length": (lambda x: x.norm(dim=-1), lambda x: x.norm(dim=-1)),
    "mean": (lambda x: x.mean(-1, keepdim=True), lambda x: x.mean(-1, keepdim=True)),
    "var": (lambda x: x.var(-1, keepdim=True), lambda x: x.var(-1, keepdim=True)),
    "std_mean": (lambda x: torch.std_mean(x, -1, keepdim=True)[0], lambda x: x.std(-1, keepdim=True)),
    "conv": (lambda x: F.conv1d(x, torch.ones(2, 5, 1)), None),
}


@pytest.mark.parametrize("name", RULES)
def test_absent_entries_do_not_count(name):
    ours, theirs = RULES[name]
    whole = torch.rand(3, 5, 4)
    whole[..., 2] = torch.nan
    with absent_entries():
        result = ours(whole)
    if theirs is None:  # positions of which every channel is absent stay absent
        assert result[..., 2].isnan().all()
        assert not result[..., [0, 1, 3]].isnan().any()
    else:
        torch.testing.assert_close(result, theirs(whole[..., [0, 1, 3]]))


def test_what_is_absent_alone_stays_absent():
    whole = torch.rand(3, 5, 4)
    whole[:, 1] = torch.nan
    with absent_entries():
        for result in (whole.sum(-1), whole @ torch.ones(4, 2), whole.mean(-1), whole.norm(dim=-1), whole.square()):
            assert result[:, 1].isnan().all()
            assert not result[:, [0, 2, 3, 4]].isnan().any()
        edge = F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), padding=1)
    assert not edge.isnan().any()  # padding is no absence


@pytest.mark.parametrize("threads", [1, 2])
def test_the_order_of_sums_decides_nothing(threads):
    """A chaotic map: it makes differences that float32 sums have in another order as large as the output."""

    def chaotic(s, x):
        y = s.b(s.a(x).relu()).sigmoid()
        for _ in range(30):
            y = 3.9 * y * (1 - y)
        return s.c(y)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = Net(chaotic, a=nn.Linear(32, 64), b=nn.Linear(64, 16), c=nn.Linear(16, 5))
        assert "a" in prune_channels(module, sequences()).channels
    finally:
        torch.set_num_threads(before)
