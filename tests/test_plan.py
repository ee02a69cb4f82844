"""The plan's second version: parameters, layers and blocks that a technique adds or removes."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from helpers.models import CLASSES, FEATURES, Classifier, Files, assert_same_state, fit, new, trainer, val_loader
from helpers.toy import LowRank, Once, factorize, remove_blocks
from lightning_optim import conform, load_from_checkpoint
from lightning_optim.checkpoint import EMPTY, plan_of, share_plan
from lightning_optim.structure import change_configs


class Block(nn.Module):
    """Residual, with a buffer that no checkpoint holds."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return x + self.scale * self.norm(self.down(self.up(x).relu()))


class Deep(Classifier):
    """Five blocks."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Sequential(*map(Block, range(blocks))), nn.Linear(8, CLASSES)
        )


def cut(module, places=frozenset({1, 3})):
    """Remove blocks, and narrow one that stays, under its new name."""
    remove_blocks(module, "net.1", places)
    plan = plan_of(module)
    plan.track("net.1.1.up", "out_features")
    plan.track("net.1.1.down", "in_features")
    plan.track("net.1.1", "place")
    block = module.net[1][1]
    with torch.no_grad():
        block.up.weight = nn.Parameter(block.up.weight[:6].clone())
        block.up.bias = nn.Parameter(block.up.bias[:6].clone())
        block.down.weight = nn.Parameter(block.down.weight[:, :6].clone())
    block.up.out_features = block.down.in_features = 6
    block.place = 1


CHANGES = {
    "parameters": (Classifier, partial(factorize, name="net.4", rank=3)),
    "blocks": (Deep, cut),
}


@pytest.fixture(params=CHANGES)
def run(request, tmp_path):
    """A run of 4 epochs (8 steps each), changed at step 10, with a file at the end of each epoch."""
    cls, change = CHANGES[request.param]
    module = new(cls)
    run = fit(tmp_path, module, Once(change), Files(tmp_path / "files"), max_epochs=4)
    return cls, change, module, run, tmp_path / "files"


@pytest.mark.parametrize("epoch", range(3))
def test_a_resumed_run_equals_the_uninterrupted_one(run, tmp_path, epoch):
    cls, change, module, _, files = run
    again = new(cls)
    fit(tmp_path, again, Once(change), Files(tmp_path / "again"), ckpt_path=files / f"{epoch}.ckpt", max_epochs=4)
    assert_same_state(module, again)
    assert [type(layer) for layer in again.modules()] == [type(layer) for layer in module.modules()]


@pytest.mark.parametrize("give", ["class", "instance"])
def test_the_file_loads_into_the_class_and_is_saved_again(run, tmp_path, give):
    cls, _, module, _, files = run
    loaded = load_from_checkpoint(cls if give == "class" else new(cls), files / "3.ckpt")
    assert_same_state(module, loaded)
    again = trainer(tmp_path, max_epochs=1)
    again.strategy.connect(loaded)
    again.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert_same_state(loaded, load_from_checkpoint(cls, tmp_path / "again.ckpt"))
    assert_same_state(pickle.loads(pickle.dumps(loaded)), loaded)


def test_a_dense_file_is_tested_on_the_changed_module_and_back(run):
    cls, _, module, run, files = run
    expected = run.test(module, val_loader(), verbose=False)
    dense = torch.load(files / "0.ckpt", weights_only=True)["state_dict"]
    run.test(module, val_loader(), ckpt_path=files / "0.ckpt", verbose=False)
    assert_same_state(module, dense)
    assert [type(layer) for layer in module.modules()] == [type(layer) for layer in new(cls).modules()]
    assert run.test(module, val_loader(), ckpt_path=files / "3.ckpt", verbose=False) == expected


def test_parameters_keep_the_order_that_optimizers_count_on(run):
    cls, _, module, _, files = run
    loaded = load_from_checkpoint(cls, files / "3.ckpt")
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in module.named_parameters()]


def test_names_after_a_removal_are_those_of_a_model_with_fewer_blocks(run):
    cls, _, module, _, _ = run
    if cls is Deep:
        assert module.state_dict().keys() == Deep(3).state_dict().keys()
        assert plan_of(module).as_plain()["modules"]["net.1"]["children"] == {"0": "0", "1": "2", "2": "4"}


def test_blocks_that_come_back_keep_what_no_checkpoint_holds():
    module = new(Deep)
    cut(module)
    conform(module, EMPTY)
    assert len(module.net[1]) == 5
    assert module.net[1][3].scale == 0.5
    assert [block.place for block in module.net[1]] == list(range(5))
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_removed_blocks_hold_no_memory():
    module = new(Deep)
    gone = module.net[1][3].up.weight.data_ptr()
    cut(module)
    emptied = plan_of(module)._base["net.1"].emptied
    assert all(parameter.is_meta for block in emptied.values() for parameter in block.parameters())
    assert gone not in {parameter.data_ptr() for parameter in module.parameters()}


def test_blocks_are_removed_twice_and_a_copy_knows_it():
    module = new(Deep)
    cut(module)
    duplicate = copy.deepcopy(module)
    remove_blocks(duplicate, "net.1", {0})
    assert plan_of(duplicate).as_plain()["modules"]["net.1"]["children"] == {"0": "2", "1": "4"}
    assert plan_of(module).as_plain()["modules"]["net.1"]["children"] == {"0": "0", "1": "2", "2": "4"}
    fresh = new(Deep)
    conform(fresh, plan_of(duplicate).as_plain())
    fresh.load_state_dict(duplicate.state_dict())
    assert fresh.net[1][0].place == 1
    assert fresh.net[1][0].up.out_features == 6


def test_a_layer_may_become_two():
    """A technique may put layers of torch.nn in the place of one: the file says all that is needed to make them."""

    def split(root):
        plan_of(root).track("net")
        layer = root.net[4]
        u, s, v = torch.linalg.svd(layer.weight.detach())
        first, second = nn.Linear(16, 3, bias=False), nn.Linear(3, 16)
        with torch.no_grad():
            first.weight.copy_(v[:3])
            second.weight.copy_(u[:, :3] * s[:3])
        second.bias = layer.bias
        root.net[4] = nn.Sequential(first, second)

    module = new()
    split(module)
    plain = pickle.loads(pickle.dumps(plan_of(module).as_plain()))
    fresh = new()
    conform(fresh, plain)
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(5, FEATURES)
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    assert repr(fresh.net) == repr(module.net)
    with pytest.raises(ValueError, match=r"'net\.4' of class.*is not known here"):
        conform(new(), {**plain, "modules": {name: entry for name, entry in plain["modules"].items() if name == "net"}})
    conform(fresh, EMPTY)
    assert repr(fresh.net) == repr(new().net)


def test_an_added_layer_that_no_file_could_describe_is_named():
    module = new()
    plan_of(module).track("net")
    module.net[2] = nn.Softplus()
    module.net[2].limit = torch.zeros(2)
    with pytest.raises(ValueError, match=r"added layer 'net\.2' cannot be written.*limit of Softplus"):
        plan_of(module).as_plain()


def test_a_block_that_stands_in_several_places_stays_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(0)] * 3)

    module = Shared()
    plan_of(module).track("blocks.0.up", "out_features")
    plan_of(module).track("blocks")
    assert plan_of(module).as_plain()["modules"] == {}
    module.blocks[0].up.weight = nn.Parameter(torch.ones(6, 8))
    module.blocks[0].up.out_features = 6
    fresh = Shared()
    conform(fresh, plan_of(module).as_plain())
    assert fresh.blocks[0] is fresh.blocks[2]
    assert fresh.blocks[2].up.weight.shape == (6, 8)


def test_a_module_around_another_writes_its_changes_too():
    inner = new(Deep)
    cut(inner)
    outer = nn.Module()
    outer.student = inner
    share_plan(outer, "student")
    modules = plan_of(outer).as_plain()["modules"]
    assert modules["student.net.1"]["children"] == {"0": "0", "1": "2", "2": "4"}
    assert modules["student.net.1.1.up"]["attributes"] == {"out_features": 6}


def test_parameters_of_another_architecture_are_not_taken_in():
    plain = {"class": "torch.nn.modules.linear.Linear", "attributes": {}, "buffers": {}}
    plain["parameters"] = {"weight": (16, 16), "bias": (16,), "u": (16, 2)}
    with pytest.raises(ValueError, match=r"makes 'net\.4' a torch.*with parameters weight, bias, u; Classifier has"):
        conform(new(), {**EMPTY, "modules": {"net.4": plain}})


def test_a_plan_that_does_not_fit_changes_nothing():
    module = new(Deep)
    cut(module)
    plain = plan_of(module).as_plain()
    shallow = new(Deep)
    remove_blocks(shallow, "net.1", {0})
    with pytest.raises(ValueError, match=r"changes 'net\.1\.2', and Deep has no such module"):
        conform(Deep(4), plain)
    before = plan_of(shallow).as_plain()["modules"]
    with pytest.raises(ValueError, match="has no such module"):
        conform(shallow, {**plain, "modules": {**plain["modules"], "head.proj": plain["modules"]["net.1.1.up"]}})
    assert plan_of(shallow).as_plain()["modules"] == before


def test_low_rank_layers_give_the_same_answers_after_loading():
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    factorize(module, "0", 2)
    fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    conform(fresh, plan_of(module).as_plain())
    assert type(fresh[0]) is LowRank
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), module(x))


class SizesConfig:
    """A configuration, as transformers keeps one."""

    def __init__(self) -> None:
        self.num_layers, self.kinds = 5, ["a", "b", "a", "b", "a"]


class Configured(Deep):
    """Its parts hold the configuration, as does another configuration."""

    def __init__(self, config: SizesConfig) -> None:
        super().__init__()
        self.config, self.net.config = config, config
        self.outer = type("OuterConfig", (), {})()
        self.outer.inner = config


def fewer(module):
    plan = plan_of(module)
    plan.track("net", "config.num_layers", "config.kinds")
    remove_blocks(module, "net.1", {1, 3})
    change_configs(module, {module.net: {"config.num_layers": 3, "config.kinds": ["a", "a", "a"]}})


def test_a_configuration_follows_in_all_layers_and_in_no_other_model():
    config = SizesConfig()
    module, other = Configured(config), Configured(config)
    fewer(module)
    held = (module.config, module.net.config, module.outer.inner)
    assert all(each is held[0] and (each.num_layers, each.kinds) == (3, ["a"] * 3) for each in held)
    assert (other.config.num_layers, other.outer.inner.kinds[1]) == (5, "b")
    assert config.num_layers == 5
    plain = plan_of(module).as_plain()
    assert plain["modules"]["net"]["attributes"] == {"config.num_layers": 3, "config.kinds": ["a"] * 3}
    fresh = Configured(config)
    conform(fresh, plain)
    assert fresh.config is fresh.net.config is fresh.outer.inner
    assert (fresh.config.num_layers, fresh.config.kinds, config.num_layers) == (3, ["a"] * 3, 5)
    conform(fresh, EMPTY)
    assert (fresh.config.num_layers, fresh.outer.inner.kinds[1], len(fresh.net[1])) == (5, "b", 5)
