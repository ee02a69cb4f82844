"""Small nets of every kind of connection between layers, with their example inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name and the function that is their forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Residual(nn.Module):
    """Two stages with BatchNorm and skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.down, self.conv3 = nn.Conv2d(width, 2 * width, 1, 2), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head((self.down(x) + self.conv3(x)).relu().mean((2, 3)))


class Attention(nn.Module):
    """Hand-written attention with separate projections; how it counts its width differs between people."""

    def __init__(self, style: str = "shape", width: int = 32, heads: int = 4, kv_heads: int | None = None) -> None:
        super().__init__()
        self.style, self.embed_dim, self.num_heads, self.head_dim = style, width, heads, width // heads
        if kv_heads is not None:
            self.num_key_value_heads = kv_heads
        kv = (kv_heads or heads) * self.head_dim
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, kv), nn.Linear(width, kv)
        self.o = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        sizes = {
            "shape": (self.num_heads, -1),
            "head_dim": (-1, self.head_dim),
            "both": (self.num_heads, self.head_dim),
            "embed_dim": (self.num_heads, self.embed_dim // self.num_heads),
        }
        return x.view(*x.shape[:2], *sizes[self.style]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.q(x))
        if hasattr(self, "num_key_value_heads"):
            k, v = (y.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for y in (self.k(x), self.v(x)))
            k, v = (y.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for y in (k, v))
        else:
            k, v = self.split(self.k(x)), self.split(self.v(x))
        mixed = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        width = self.embed_dim if self.style == "embed_dim" else -1
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], width))


class Fused(nn.Module):
    """Attention with one projection to queries, keys and values."""

    def __init__(self, how: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.how, self.num_heads = how, heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        if self.how == "unbind":
            y = y.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = y.unbind(0)
        else:
            parts = y.chunk(3, -1) if self.how == "chunk" else y.split(x.shape[-1], -1)
            q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for part in parts)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block of a stem, an attention and a feed-forward part."""

    def __init__(self, attention: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 64), nn.Linear(64, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x))))).mean(1))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def sequences() -> Tensor:
    return torch.randn(2, 6, 32)


def ids() -> Tensor:
    return torch.randint(20, (2, 6))


def flat(width: int, out: int = 3) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(width, out)]


def stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def value_beside(layer: nn.Module, y: Tensor) -> Tensor:
    return layer(y) + y.detach().mean(-1)[..., None]


def gated(s: Net, x: Tensor) -> Tensor:
    values, gates = s.a(x).chunk(2, -1)
    return s.b(values * F.silu(gates))


class FrozenNorm(nn.Module):
    """A BatchNorm that holds buffers and nothing else, as detection backbones have it."""

    def __init__(self, width: int, shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.num_features = width
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, (torch.rand(width) + 0.5).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (t.view(1, self.num_features, 1, 1) for t in (self.weight, self.bias))
        scale = scale * (self.running_var.view_as(scale) + 1e-5).rsqrt()
        return x * scale + (shift - self.running_mean.view_as(scale) * scale)


class Bottleneck(nn.Module):
    """Two convolutions, around them a skip connection or none."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.shortcut = nn.BatchNorm2d(width), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.two(F.silu(self.one(x)))))
        return x + y if self.shortcut else y


class SplitChain(nn.Module):
    """YOLO's C2f: one half goes on as it is, the other through a chain; all of it is concatenated."""

    def __init__(self, how: str, shortcut: bool, width: int = 6) -> None:
        super().__init__()
        self.how, self.c = how, width
        self.one, self.two = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(4 * width, 8, 1)
        self.chain = nn.ModuleList(Bottleneck(width, shortcut) for _ in range(2))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.one(x))
        parts = {
            "chunk": lambda: y.chunk(2, 1),
            "sizes": lambda: y.split((self.c, self.c), dim=1),
            "size": lambda: torch.split(y, self.c, 1),
            "slices": lambda: (y[:, : self.c], y[:, self.c :]),
        }
        found = list(parts[self.how]())
        for layer in self.chain:
            found.append(layer(found[-1]))
        return self.head(F.silu(self.two(torch.cat(found, 1))))


class PartialConv(nn.Module):
    """FasterNet's: a quarter of the channels is convolved, the rest goes by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim_conv, self.dim_rest = width // 4, width - width // 4
        self.conv = nn.Conv2d(self.dim_conv, self.dim_conv, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        some, rest = x.split([self.dim_conv, self.dim_rest], dim=1)
        return torch.cat([self.conv(some), rest], 1)


class Branches(nn.Module):
    """InceptionNeXt's: unequal parts, their sizes in a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        part = width // 4
        self.square = nn.Conv2d(part, part, 3, padding=1, groups=part)
        self.row = nn.Conv2d(part, part, (1, 5), padding=(0, 2), groups=part)
        self.split_sizes = (width - 2 * part, part, part)

    def forward(self, x: Tensor) -> Tensor:
        same, square, row = torch.split(x, self.split_sizes, 1)
        return torch.cat([same, self.square(square), self.row(row)], 1)


def two_into_one(first: nn.Module, second: nn.Module) -> Net:
    """Two activations or norms, one after the other, and both concatenated."""

    def forward(s: Net, x: Tensor) -> Any:
        early = s.first(s.a(x))
        return s.d(s.c(torch.cat([early, s.second(s.b(early))], 1)).flatten(1))

    layers = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(16, 5, 1)}
    return Net(forward, **layers, d=nn.Linear(5 * 64, 3), first=first, second=second)


Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, set[str]]]

PRUNABLE: dict[str, Case] = {
    # name: (model, inputs, group -> other layers that change with it)
    "residual": (
        Residual,
        images,
        {
            "down": {"conv3", "head"},
            "conv2": {"stem", "norm", "conv1", "norm2", "down", "conv3"},
            "conv1": {"norm1", "conv2"},
        },
    ),
    "concatenation": (
        lambda: Net(
            lambda s, x: s.d(s.c(torch.cat([s.a(x), s.b(x)], 1)).flatten(1)),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Conv2d(3, 6, 3),
            c=nn.Conv2d(10, 5, 3),
            d=nn.Linear(5 * 16, 3),
        ),
        images,
        {"a": {"c"}, "b": {"c"}, "c": {"d"}},
    ),
    "residual around a concatenation": (
        lambda: Net(
            lambda s, x: s.d((torch.cat([s.a(x), s.b(x)], 1) + s.c(x)).mean((2, 3))),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Conv2d(3, 6, 3),
            c=nn.Conv2d(3, 10, 3),
            d=nn.Linear(10, 3),
        ),
        images,
        {"c": {"a", "b", "d"}},
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 1),
            *flat(6 * 16),
        ),
        images,
        {"4": {"6"}, "2": {"0", "3", "4"}},
    ),
    **{
        f"split chain, {how}": (
            partial(SplitChain, how, True),
            images,
            {
                "two": {"head"},
                "one": {"two", *(f"chain.{i}.{name}" for i in (0, 1) for name in ("one", "two", "norm"))},
                "chain.1.one": {"chain.1.two"},
                "chain.0.one": {"chain.0.two"},
            },
        )
        for how in ("chunk", "sizes", "size", "slices")
    },
    "split chain without skip connections": (
        partial(SplitChain, "chunk", False),
        images,
        {
            "two": {"head"},
            "one": {"two", "chain.0.one"},
            "chain.1.two": {"chain.1.norm", "two"},
            "chain.1.one": {"chain.1.two"},
            "chain.0.two": {"chain.0.norm", "chain.1.one", "two"},
            "chain.0.one": {"chain.0.two"},
        },
    ),
    "a quarter convolved": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), PartialConv(16), nn.ReLU(), nn.Conv2d(16, 6, 1), *flat(6 * 64)),
        images,
        {"3": {"5"}, "1.conv": {"3"}, "0": {"1.conv", "3"}},
    ),
    "unequal branches": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Branches(16), nn.ReLU(), nn.Conv2d(16, 6, 1), *flat(6 * 64)),
        images,
        {"3": {"5"}, "0": {"1.square", "1.row", "3"}},
    ),
    "a gate by half of the channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GLU(1), nn.Conv2d(4, 4, 1), *flat(4 * 64)),
        images,
        {"2": {"4"}, "0": {"2"}},
    ),
    "gated linear unit": (
        lambda: Net(lambda s, x: s.b(F.glu(s.a(x))), a=nn.Linear(32, 12), b=nn.Linear(6, 5)),
        sequences,
        {"a": {"b"}},
    ),
    "parts of a sequence of vectors": (
        lambda: Net(
            lambda s, x: s.b(sum(part.relu() for part in s.a(x.transpose(1, 2)).transpose(1, 2).chunk(3, -1))),
            a=nn.Conv1d(32, 12, 1),
            b=nn.Linear(4, 5),
        ),
        sequences,
        {"a": {"b"}},
    ),
    "slices of places": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), Net(lambda s, x: x[:, :, 1:7, ::2]), nn.Conv2d(8, 6, 1), *flat(6 * 24)
        ),
        images,
        {"2": {"4"}, "0": {"2"}},
    ),
    "one slope before a concatenation": (
        lambda: two_into_one(nn.PReLU(), nn.PReLU()),
        images,
        {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}},
    ),
    "one slope that two layers share": (
        lambda: two_into_one(*[nn.PReLU()] * 2),
        images,
        {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}},
    ),
    "instance norm before a concatenation": (
        lambda: two_into_one(nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        images,
        {"a": {"b", "c", "first"}, "b": {"c", "second"}, "c": {"d"}},
    ),
    "frozen norms": (
        lambda: two_into_one(FrozenNorm(8), FrozenNorm(8, (1, -1, 1, 1))),
        images,
        {"a": {"b", "c", "first"}, "b": {"c", "second"}, "c": {"d"}},
    ),
    "grouped transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 2, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, groups=8),
            nn.Conv2d(8, 6, 1),
            *flat(6 * 18 * 18),
        ),
        images,
        {"7": {"9"}, "6": {"4", "7"}, "2": {"4"}, "0": {"2"}},
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=4),
            nn.GELU(),
            nn.Conv2d(12, 12, 1, groups=2),
            *flat(12 * 16),
        ),
        images,
        {"4": {"6"}, "2": {"4"}, "0": {"2"}},
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 12, 3), *flat(12 * 16)),
        images,
        {"3": {"5"}, "0": {"1", "3"}},
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, 2),
            nn.Conv2d(4, 2, 1),
        ),
        images,
        {"4": {"5"}, "2": {"4"}, "0": {"2"}},
    ),
    "1d with instance norm and PReLU": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3),
            nn.InstanceNorm1d(8, affine=True),
            nn.PReLU(8),
            nn.Conv1d(8, 6, 3),
            nn.PReLU(),
            nn.AdaptiveMaxPool1d(1),
            *flat(6),
        ),
        lambda: torch.randn(2, 3, 12),
        {"3": {"7"}, "0": {"1", "2", "3"}},
    ),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 6, 3), *flat(6 * 64)),
        lambda: torch.randn(2, 3, 8, 8, 8),
        {"2": {"4"}, "0": {"1", "2"}},
    ),
    "squeeze and excitation": (
        lambda: Net(
            lambda s, x: s.d(
                (s.a(x) * s.up(s.squeeze(s.a(x).mean((2, 3))).relu()).sigmoid()[:, :, None, None]).flatten(1)
            ),
            a=nn.Conv2d(3, 8, 3),
            squeeze=nn.Linear(8, 4),
            up=nn.Linear(4, 8),
            d=nn.Linear(8 * 36, 3),
        ),
        images,
        {"a": {"squeeze", "up", "d"}, "squeeze": {"up"}},
    ),
    "gate in the same projection": (
        lambda: Net(gated, a=nn.Linear(32, 12), b=nn.Linear(6, 2)),
        sequences,
        {"a": {"b"}},
    ),
    "dense connections": (
        lambda: Net(
            lambda s, x: s.head(s.join(torch.cat([s.stem(x), s.grow(s.norm(s.stem(x)).relu())], 1)).mean((2, 3))),
            stem=nn.Conv2d(3, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            grow=nn.Conv2d(8, 6, 3, padding=1),
            join=nn.Conv2d(14, 5, 1),
            head=nn.Linear(5, 3),
        ),
        images,
        {"stem": {"norm", "grow", "join"}, "grow": {"join"}, "join": {"head"}},
    ),
    "layer norm": (
        lambda: Net(lambda s, x: s.b(s.n(s.a(x).relu())), a=nn.Linear(32, 16), n=nn.LayerNorm(16), b=nn.Linear(16, 3)),
        sequences,
        {"a": {"n", "b"}},
    ),
    "transformer encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
            ),
            nn.Linear(32, 5),
        ),
        sequences,
        {f"0.layers.{i}.linear1": {f"0.layers.{i}.linear2"} for i in range(2)},
    ),
    "layers called twice": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x).relu()) - s.b(s.a(2 * x).relu())),
            a=nn.Linear(32, 16),
            b=nn.Linear(16, 8),
            c=nn.Linear(8, 3),
        ),
        sequences,
        {"a": {"b"}, "b": {"c"}},
    ),
    "into a recurrent layer": (
        lambda: Net(
            lambda s, x: s.b(s.g(s.a(x))[0]),
            a=nn.Linear(32, 16),
            g=nn.GRU(16, 12, 2, bidirectional=True, batch_first=True),
            b=nn.Linear(24, 5),
        ),
        sequences,
        {"a": {"g"}},
    ),
    "into an LSTM": (
        lambda: Net(
            lambda s, x: s.b(s.g(s.a(x))[1][0][-1]),
            a=nn.Linear(32, 16),
            g=nn.LSTM(16, 12, batch_first=True),
            b=nn.Linear(12, 5),
        ),
        sequences,
        {"a": {"g"}},
    ),
    "into a recurrent cell": (
        lambda: Net(lambda s, x: s.b(s.g(s.a(x[:, 0]))), a=nn.Linear(32, 16), g=nn.GRUCell(16, 12), b=nn.Linear(12, 5)),
        sequences,
        {"a": {"g"}},
    ),
    "product of two towers": (
        lambda: Net(
            lambda s, x: (s.b(s.a(x).relu()) * s.d(s.c(x).relu())).sum((1, 2)),
            a=nn.Linear(32, 16),
            b=nn.Linear(16, 8),
            c=nn.Linear(32, 12),
            d=nn.Linear(12, 8),
            unused=nn.Linear(1, 1),
        ),
        sequences,
        {"b": {"d"}, "a": {"b"}, "c": {"d"}},
    ),
    "keywords in, dict out": (
        lambda: Net(lambda s, x, scale: {"y": s.b(scale * s.a(x)), "n": 3}, a=nn.Linear(32, 6), b=nn.Linear(6, 2)),
        lambda: {"x": torch.randn(2, 32), "scale": 2.0},
        {"a": {"b"}},
    ),
}

DAMAGED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[str], str]] = {
    # name: (model, inputs, groups that must be left out, what the reason says)
    "fused projection, split": (lambda: Block(Fused("split")), sequences, ["attention.qkv"], "heads"),
    "heads counted where nobody sees it": (
        lambda: Net(
            lambda s, x: s.o(
                F.scaled_dot_product_attention(*(f(x).view(2, 6, 4, -1).transpose(1, 2) for f in (s.q, s.k, s.v)))
                .transpose(1, 2)
                .flatten(2)
            ),
            q=nn.Linear(32, 32),
            k=nn.Linear(32, 32),
            v=nn.Linear(32, 32),
            o=nn.Linear(32, 5),
        ),
        sequences,
        ["v"],
        "differs from setting to zero|forward pass fails",
    ),
    "softmax over the channels": (
        lambda: Net(lambda s, x: s.b(s.a(x).softmax(-1)), a=nn.Linear(32, 16), b=nn.Linear(16, 5)),
        sequences,
        ["a"],
        "differs from setting to zero",
    ),
    "a mean of the channels that is read as a value": (
        lambda: Net(lambda s, x: value_beside(s.b, s.a(x)), a=nn.Linear(32, 16), b=nn.Linear(16, 5)),
        sequences,
        ["a"],
        "differs from setting to zero",
    ),
    "channels shuffled": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1), *flat(256)),
        images,
        ["0"],
        "differs from setting to zero|forward pass fails",
    ),
    "channels made pixels": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1), *flat(1024)),
        images,
        ["0"],
        "differs from setting to zero|forward pass fails",
    ),
    "blocks across a concatenation": (
        lambda: Net(
            lambda s, x: s.d(s.c(s.n(torch.cat([s.a(x), s.b(x)], 1))).flatten(1)),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Conv2d(3, 8, 3),
            n=nn.GroupNorm(2, 12),
            c=nn.Conv2d(12, 5, 3),
            d=nn.Linear(5 * 16, 3),
        ),
        images,
        ["a", "b"],
        "blocks of n",
    ),
    "out of a recurrent layer into a sum": (
        lambda: Net(
            lambda s, x: s.b(s.g(x)[0] + s.a(x)),
            g=nn.LSTM(32, 16, batch_first=True),
            a=nn.Linear(32, 16),
            b=nn.Linear(16, 5),
        ),
        sequences,
        ["a"],
        "LSTM cannot lose",
    ),
    "a sum with nn.MultiheadAttention": (
        lambda: Net(
            lambda s, x: s.b(s.a(x) + s.m(s.a(x), s.a(x), s.a(x))[0]),
            a=nn.Linear(32, 16),
            m=nn.MultiheadAttention(16, 4, batch_first=True),
            b=nn.Linear(16, 5),
        ),
        sequences,
        ["a"],
        "scrambled",
    ),
    "an output of the model": (
        lambda: Net(lambda s, x: (s.b(s.a(x)), s.a(x)), a=nn.Linear(32, 16), b=nn.Linear(16, 5)),
        sequences,
        ["a"],
        "output would change its shape",
    ),
    "a sum with the model's input": (
        lambda: Net(lambda s, x: s.b(s.a(x) + x), a=nn.Linear(32, 32), b=nn.Linear(32, 5)),
        sequences,
        ["a"],
        "forward pass fails",
    ),
    "into a parametrized layer": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x))),
            a=nn.Linear(32, 16),
            b=torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)),
            c=nn.Linear(8, 3),
        ),
        sequences,
        ["a"],
        "coupled with b (excluded by|b is parametrized",
    ),
}


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.table(rows)).relu()))


class TiedResidual(Tied):
    """The same with a skip connection, so that both ends lose the same columns."""

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.table(rows)
        return self.out(rows + self.b(self.a(rows).relu()))
