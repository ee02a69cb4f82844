"""Names, objects and YAML; and what is refused before anything runs."""

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from helpers.gpt import Language
from helpers.ranks import run_alone
from lightning_optim import _upstream
from lightning_optim.strategies import PRESETS, OptimDDP, OptimFSDP2, OptimSingle, build, sharded_files
from lightning_optim.strategies.common import check_batchnorm_sync
from lightning_optim.strategies.sharded_files import saves_shards
from lightning_optim.strategies.tensor import split_pairs

PROCESSES = {"optim_single": 1}
NOT_ON_ONE_MACHINE = ("optim_hsdp",)


def new_trainer(**words):
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **{"devices": 2, **words})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_copies_and_pickles(name):
    strategy = build(name)
    assert type(strategy) is PRESETS[name].strategy
    for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert type(other) is type(strategy)
        for word, value in PRESETS[name].options.items():
            stored = {
                "static_graph": lambda s: s._ddp_kwargs["static_graph"],
                "start_method": lambda s: s._start_method,
            }
            assert stored.get(word, lambda s, word=word: getattr(s, word))(other) == value


def test_importing_the_package_registers_the_names(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import lightning_optim; from lightning.pytorch.strategies import StrategyRegistry; print(*StrategyRegistry)"
    )
    code, output = run_alone(script)
    assert code == 0, output
    assert set(PRESETS) <= set(output.split())


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NOT_ON_ONE_MACHINE])
def test_a_trainer_takes_name_and_object(name):
    devices = PROCESSES.get(name, 2)
    for strategy in (name, build(name)):
        assert type(new_trainer(strategy=strategy, devices=devices).strategy) is PRESETS[name].strategy
    assert StrategyRegistry[name]["description"] == PRESETS[name].use_when


def test_options_may_be_overridden():
    assert build("optim_zero2", tensor=2).tensor == 2
    assert not build("optim_zero2", tensor=2).reshard


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown preset 'optim_zero3'; known: optim_single, optim_ddp"):
        build("optim_zero3")


@pytest.mark.parametrize(
    ("strategy", "words", "sentence"),
    [
        (OptimDDP, {"compress": "int8"}, "`compress` must be one of 'none', 'bf16', 'fp16', got 'int8'"),
        (OptimDDP, {"timeout_s": 0}, "`timeout_s` must be a positive number of seconds"),
        (OptimFSDP2, {"timeout_s": True}, "`timeout_s` must be a positive number"),
        (OptimFSDP2, {"tensor": 0}, "`tensor` must be a whole number >= 1 or 'node', got 0"),
        (OptimFSDP2, {"replicate": 1.5}, "`replicate` must be a whole number >= 1 or 'nodes', got 1.5"),
        (OptimFSDP2, {"reduce_dtype": "float16"}, "`reduce_dtype` must be one of 'float32', 'bfloat16'"),
        (OptimFSDP2, {"checkpoint": "half"}, "`checkpoint` must be one of 'auto', 'full', 'sharded'"),
        (OptimFSDP2, {"tensor_plan": {"a": "column"}}, "map layer name patterns to 'col' or 'row'"),
        (OptimFSDP2, {"tensor_plan": {}}, "map layer name patterns to 'col' or 'row'"),
        (OptimFSDP2, {"shard": False}, "needs `tensor` > 1"),
        (OptimFSDP2, {"replicate": 2, "tensor": 2}, "cannot be combined"),
    ],
)
def test_arguments_that_are_none(strategy, words, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        strategy(**words)


@pytest.mark.parametrize(
    ("strategy", "words", "sentence"),
    [
        ("optim_single", {"devices": 2}, "trains on one device, and the Trainer has 2"),
        ("optim_hsdp", {}, "has one node. Use 'optim_fsdp', or OptimFSDP2"),
        ("optim_tp", {"devices": 1}, "the Trainer has one"),
        ("optim_2d", {"devices": 3}, "`tensor`=2 does not divide the 3 devices of a node"),
        (OptimFSDP2(replicate=2), {"devices": 3}, "`replicate`=2 does not divide the 3 devices in all"),
        (OptimFSDP2(tensor=2, shard=False), {"devices": 4}, "exactly `tensor` devices: 2 of 4. Use 'optim_2d'"),
        ("optim_tp", {"num_nodes": 2}, "exactly `tensor` devices: 2 of 4. Use 'optim_2d'"),
    ],
)
def test_sizes_that_do_not_fit_raise_with_the_trainer(strategy, words, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        new_trainer(strategy=strategy, **words)


def test_a_notebook_raises_with_the_notebook_preset(monkeypatch):
    monkeypatch.setattr(_upstream, "is_interactive", lambda: True)
    with pytest.raises(MisconfigurationException, match="'optim_ddp_notebook'"):
        new_trainer(strategy="optim_fsdp")


@pytest.mark.parametrize("name", ["optim_ddp", "optim_fsdp"])
def test_synchronised_batchnorm_on_a_cpu_is_refused(name):
    trainer = new_trainer(strategy=name, sync_batchnorm=True)
    with pytest.raises(MisconfigurationException, match="needs CUDA devices"):
        check_batchnorm_sync(trainer.strategy)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [("auto", "found no pair of Linear layers in Linear"), ({"net.x": "col"}, "'net.x' matches no Linear layer")],
)
def test_tensor_parallelism_without_a_pair_is_refused(plan, sentence):
    mesh = SimpleNamespace(size=lambda: 2)
    with pytest.raises((MisconfigurationException, ValueError), match=sentence):
        split_pairs(torch.nn.Linear(4, 4), mesh, plan)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What ``refused_worker.py`` was told, in a process whose group is not left here."""
    out = tmp_path_factory.mktemp("refused") / "refused.json"
    worker = Path(__file__).with_name("refused_worker.py")
    code, output = run_alone(worker, out)
    assert code == 0, output[-4000:]
    return json.loads(out.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("synchronised", "needs CUDA devices"),
        ("averaging", "weight averaging callbacks keep a whole copy"),
        ("half", "trains in 32-true, bf16-mixed, bf16-true, got precision='16-true'"),
        ("units", "units: 'Blok' is neither a class nor a module of Never"),
        ("nothing", "has no parameters"),
        ("channels", "ChannelPruning cannot remove channels under OptimFSDP2"),
        ("divided channels", "ChannelPruning cannot remove channels under OptimFSDP2"),
        ("divided projectors", "projectors are sized while the student is whole"),
        ("bare", "WeightPruning is not supported under ModelParallelStrategy. Use Trainer(strategy='optim_fsdp')"),
    ],
)
def test_refused_before_the_first_step(refusals, case, sentence):
    assert sentence in refusals[case]


@pytest.mark.distributed
def test_a_model_whose_copies_do_not_fit_has_no_score(refusals):
    assert "PerformanceScore keeps no whole copy of this model (it does not fit" in refusals["not measured"]
    assert refusals["P"] == "nan"


def test_large_models_are_saved_in_shards_by_default(monkeypatch):
    module = torch.nn.Linear(10, 10)
    assert not saves_shards("auto", module)
    assert saves_shards("sharded", module)
    monkeypatch.setattr(sharded_files, "FULL_UNTIL", 100)
    assert saves_shards("auto", module)
    assert not saves_shards("full", module)


CLASS = "trainer: {{strategy: {{class_path: lightning_optim.strategies.{}, init_args: {{{}}}}}}}"


def yaml(tmp_path, strategy):
    return [
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}",
        f"--config={strategy}",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {strategy: optim_fsdp}",
        CLASS.format("OptimFSDP2", "tensor: 2, units: [Block]"),
        CLASS.format("OptimDDP", "compress: bf16"),
    ],
)
def test_yaml_by_name_and_by_class(text, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse", reason="YAML needs jsonargparse")
    monkeypatch.setattr(sys, "argv", ["fit"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # what Lightning 2.6 calls
    config = tmp_path / "config.yaml"
    config.write_text(text)
    words = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    cli = LightningCLI(Language, args=yaml(tmp_path, config), **words)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, (OptimFSDP2, OptimDDP))
    if "tensor" in text:
        assert (strategy.tensor, strategy.units) == (2, ["Block"])
    if "compress" in text:
        assert strategy.compress == "bf16"


def test_optim_single_takes_the_trainers_device():
    assert new_trainer(strategy="optim_single", devices=1).strategy.root_device == torch.device("cpu")
    assert OptimSingle().parallel_devices is None
