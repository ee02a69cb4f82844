"""Which parts are gathered together: ten kinds of models, and what is named by hand."""

from collections import Counter

import pytest
import torch
from torch import nn

from helpers.exported import Block as Residual
from helpers.gpt import GPT, Block, Language
from lightning_optim.strategies.units import find_units


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        widths = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
        self.layers = nn.Sequential(*(Residual(before, after) for before, after in widths))
        self.head = nn.Linear(64, 10)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(50, 32), nn.Embedding(50, 32)
        self.transformer = nn.Transformer(32, 4, 3, 3, 64, batch_first=True)
        self.head = nn.Linear(32, 50)


class Window(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.feed = nn.Sequential(nn.Linear(3 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Merge(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce = nn.Linear(4 * width, 2 * width)


class Stage(nn.Module):
    def __init__(self, width, depth, merges):
        super().__init__()
        self.blocks = nn.ModuleList(Window(width) for _ in range(depth))
        self.merge = Merge(width) if merges else nn.Identity()


class Swin(nn.Module):
    """Blocks of several widths in stages, the last stage alone more than half of the model."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.stages = nn.ModuleList([Stage(16, 2, True), Stage(32, 2, True), Stage(64, 6, True), Stage(128, 2, False)])
        self.head = nn.Linear(128, 10)


class DLRM(nn.Module):
    """Nearly all in three tables of very different sizes."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(rows, 16) for rows in (20_000, 5_000, 300)])
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16))
        self.top = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = GPT(16, 2, 2), GPT(64, 4, 4).requires_grad_(False)


class Convolutions(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(before, after, 3), nn.ReLU(), nn.Conv2d(after, after, 3))


class UNet(nn.Module):
    """The block at the bottom holds most of it."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([Convolutions(3, 8), Convolutions(8, 16), Convolutions(16, 32)])
        self.bottom = Convolutions(32, 64)
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2), nn.ConvTranspose2d(32, 16, 2)])
        self.joined = nn.ModuleList([Convolutions(64, 32), Convolutions(32, 16)])
        self.head = nn.Conv2d(16, 1, 1)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 4, enable_nested_tensor=False)


def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))


MODELS = {
    "GPT": (lambda: GPT(64, 4, 4), {"Block": 4}),
    "tied GPT": (lambda: GPT(64, 4, 4, tied=True), {"Block": 4}),
    "ResNet": (ResNet, {"Block": 6}),
    "MLP": (mlp, {"Linear": 3}),
    "encoder": (encoder, {"TransformerEncoderLayer": 4}),
    "encoder and decoder": (EncoderDecoder, {"TransformerEncoderLayer": 3, "TransformerDecoderLayer": 3}),
    "Swin": (Swin, {"Window": 12}),
    "DLRM": (DLRM, {"EmbeddingBag": 2}),
    "student and teacher": (Distilled, {"Block": 6}),
    "U-Net": (UNet, {"Convolutions": 6}),
}


@pytest.mark.parametrize("name", MODELS)
def test_ten_kinds_of_models(name):
    make, expected = MODELS[name]
    module = make()
    units = find_units(module)
    found = Counter(type(unit).__name__ for _, unit in units.named)
    assert expected.items() <= found.items(), found
    covered = {id(p): p.numel() for _, unit in units.named for p in unit.parameters()}
    total = sum(p.numel() for p in module.parameters())
    assert units.covered == pytest.approx(sum(covered.values()) / total)
    assert 0.96 <= units.covered <= 1


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_gathered_by_two_units_beside_each_other(name):
    """Units may lie in units: those inside come first, and take their parameters."""
    units = find_units(MODELS[name][0]()).named
    for place, (name, unit) in enumerate(units):
        for other_name, other in units[place + 1 :]:
            shared = {id(p) for p in unit.parameters()} & {id(p) for p in other.parameters()}
            assert not shared or name.startswith(f"{other_name}.")


def test_a_unit_is_small_against_the_model():
    """GPT of 4 blocks: a block is under a fourth of it."""
    module = GPT(64, 4, 4)
    total = sum(p.numel() for p in module.parameters())
    largest = max(sum(p.numel() for p in unit.parameters()) for _, unit in find_units(module).named)
    assert largest < total / 4


def test_tied_layers_stay_in_the_root():
    units = dict(find_units(GPT(16, 2, 2, tied=True)).named)
    untied = dict(find_units(GPT(16, 2, 2)).named)
    assert {"embedding", "head"} <= untied.keys()
    assert not {"embedding", "head"} & units.keys()


def test_layers_tied_within_a_unit_leave_it_one():
    module = GPT(16, 2, 2)
    module.blocks[0].attention.q_proj.weight = module.blocks[0].attention.k_proj.weight
    assert "blocks.0" in dict(find_units(module).named)
    module.blocks[1].attention.q_proj.weight = module.blocks[0].attention.k_proj.weight
    assert not {"blocks.0", "blocks.1"} & dict(find_units(module).named).keys()


def test_given_classes_and_names():
    units = find_units(Language(layers=3), ["Block", "net.head"])
    assert [name for name, _ in units.named] == ["net.blocks.0", "net.blocks.1", "net.blocks.2", "net.head"]
    assert units.how == "as given"
    assert "3 x Block, 1 x Linear (as given)" in str(units)


def test_what_hugging_face_modules_declare():
    module = GPT(16, 3, 2)
    module._no_split_modules = ["Feed"]
    units = find_units(module)
    assert {f"blocks.{place}.feed" for place in range(3)} <= dict(units.named).keys()
    assert units.how == "_no_split_modules"


def test_an_unknown_name_lists_the_classes():
    message = r"units: 'Blok' is neither a class nor a module of Language. Classes with parameters: Attention, Block, "
    with pytest.raises(ValueError, match=message):
        find_units(Language(), ["Block", "Blok"])


def test_a_string_is_not_a_list_of_names():
    with pytest.raises(ValueError, match="must be 'auto' or a list"):
        find_units(Language(), "Block")


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match=r"ReLU has no parameters, so there is nothing to shard or train"):
        find_units(nn.ReLU())


def test_one_indivisible_part_has_the_root_alone():
    units = find_units(nn.Linear(4, 4))
    assert not units.named
    assert units.covered == 0
    assert "none, the root alone" in str(units)


def test_containers_without_a_forward_are_no_units():
    """Nothing would gather a ModuleList: its items are taken, large or small."""
    module = nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 16)])])})
    assert [name for name, _ in find_units(module).named] == ["parts.1.0", "parts.0"]


def test_nothing_below_torch_attention_and_encoder_layers():
    """They read their layers' weights without calling the layers."""
    module = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 64), nn.Linear(16, 16))
    assert [name for name, _ in find_units(module).named] == ["0", "1", "2"]
    decoder = nn.ModuleList([nn.TransformerDecoderLayer(16, 2, 64)])
    units = dict(find_units(decoder).named)
    assert {"0.self_attn", "0.multihead_attn", "0.linear1"} <= units.keys()
    assert not any("out_proj" in name for name in units)


def test_nothing_is_computed_or_changed():
    module = Language()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    find_units(module)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    assert not any(isinstance(part, Block) and "forward" in part.__dict__ for part in module.modules())
