"""What is private upstream: one door, nothing of it on import, and our own words where a name is gone."""

import ast
import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch_pruning
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

import lightning_optim
from helpers.ranks import run_alone
from lightning_optim import CompressedCheckpoint, _upstream
from lightning_optim.strategies import PRESETS

PACKAGE = Path(lightning_optim.__file__).parent
OWNERS = {
    cls.__name__: cls
    for cls in (
        ModelCheckpoint,
        LightningCLI,
        DDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        torch_pruning.DependencyGraph,
        pl.LightningModule,
        WeightAveraging,
        StochasticWeightAveraging,
        torch.nn.Module,
        torch._dynamo.OptimizedModule,
    )
}
UPSTREAM = ("torch", "lightning", "torch_pruning", "pytorch_lightning")


@cache
def trees():
    """Every file of the package but the door."""
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py") if path.name != "_upstream.py"}
    return {name: ast.parse(path.read_text()) for name, path in files.items()}


def imports_of(tree):
    """Modules and names that a file imports from upstream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in UPSTREAM:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UPSTREAM)


def test_only_the_door_imports_what_is_private():
    private = {
        (path, name)
        for path, tree in trees().items()
        for name in imports_of(tree)
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    }
    assert not private


def test_only_the_door_reaches_what_is_private_by_attribute():
    """``torch._ops.OpOverload`` is no import; ``torch._foreach_*`` are documented."""
    assert not {(path, name) for path, tree in trees().items() for name in private_attributes(tree)}


def private_attributes(tree):
    """Private attributes of upstream modules that a file names."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith(("__", "_foreach_"))
        ):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in (*UPSTREAM, "nn", "pl", "F"):
                yield ast.unparse(node)


@pytest.mark.parametrize("key", _upstream.NAMES)
def test_every_name_is_there(key):
    private = _upstream.NAMES[key]
    assert hasattr(import_module(private.module), private.name)
    assert all((private.why, private.seen, private.without))
    assert key in _upstream.__all__


@pytest.mark.parametrize("override", _upstream.OVERRIDES, ids=lambda override: override.name)
def test_every_private_method_that_is_overridden_is_there(override):
    method = getattr(OWNERS[override.owner], override.name)
    assert tuple(inspect.signature(method).parameters)[1:] == override.parameters


@pytest.mark.parametrize("attribute", _upstream.ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_every_private_attribute_is_there(attribute):
    assert all((attribute.why, attribute.seen, attribute.without))
    assert any(attribute.name in inspect.getsource(cls) for cls in OWNERS[attribute.owner].__mro__[:-1])


def subclasses():
    """Classes of the package, with the classes upstream that they are made from."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(("lightning_optim", *path.relative_to(PACKAGE).with_suffix("").parts))
        if module.endswith(("__init__", "__main__")):
            continue
        for cls in vars(import_module(module)).values():
            if isinstance(cls, type) and cls.__module__ == module:
                theirs = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in UPSTREAM]
                if theirs:
                    yield cls, theirs


CLASSES = list(subclasses())


@pytest.mark.parametrize(("cls", "theirs"), CLASSES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_private_override_is_in_the_table_and_every_marked_one_overrides(cls, theirs):
    listed = {(override.owner, override.name) for override in _upstream.OVERRIDES}
    for name, method in vars(cls).items():
        owners = [base for base in theirs if name in vars(base)]
        if getattr(method, "__override__", False) or getattr(getattr(method, "fget", None), "__override__", False):
            assert owners, f"{cls.__name__}.{name} overrides nothing"
        if owners and inspect.isfunction(method) and name.startswith("_") and not name.startswith("__"):
            if issubclass(cls, torch.nn.Module) and not issubclass(cls, pl.LightningModule):
                continue  # `_apply` of a layer: every release of torch has called it
            assert any((owner.__name__, name) in listed for owner in owners), f"{cls.__name__}.{name}"


def test_an_override_of_a_renamed_method_is_an_error(monkeypatch):
    monkeypatch.delattr(ModelCheckpoint, "_save_topk_checkpoint")
    with pytest.raises(_upstream.UpstreamChangedError, match=r"overrides ModelCheckpoint\._save_topk"):
        CompressedCheckpoint(monitor="val_acc", mode="max")


def test_an_override_with_other_arguments_is_an_error(monkeypatch):
    monkeypatch.setattr(DDPStrategy, "_register_ddp_hooks", lambda self, when: None)
    with pytest.raises(_upstream.UpstreamChangedError, match=r"has it with the arguments \(when\)"):
        PRESETS["optim_ddp"].build()


def test_an_attribute_that_is_gone_is_an_error(monkeypatch):
    gone = _upstream.Attribute("ModelCheckpoint", "_gone", "does something", "lightning 2.6.6", "Wait.")
    monkeypatch.setattr(_upstream, "ATTRIBUTES", (gone,))
    with pytest.raises(_upstream.UpstreamChangedError, match=r"uses ModelCheckpoint\._gone \(does something\)"):
        CompressedCheckpoint()


def test_importing_needs_no_private_name_and_loads_no_strategy(tmp_path):
    """Every name is gone before the package is imported; the error comes with the use, in our words."""
    taken = "\n".join(
        f"from importlib import import_module as m; delattr(m({private.module!r}), {private.name!r})"
        for private in _upstream.NAMES.values()
        if not private.module.startswith("torch.")  # torch itself needs its own
    )
    (tmp_path / "script.py").write_text(f"""
import sys, lightning.pytorch as pl
{taken}
import lightning_optim
print([name for name in ("fsdp2", "ddp", "single") if f"lightning_optim.strategies.{{name}}" in sys.modules])
try:
    pl.Trainer(strategy="optim_fsdp", accelerator="cpu", devices=1)
except RuntimeError as error:
    print(type(error).__name__, error)
""")
    code, output = run_alone(tmp_path / "script.py")
    assert code == 0, output[-3000:]
    loaded, error = output.splitlines()
    assert loaded == "[]"
    assert error.startswith(
        "UpstreamChangedError lightning_optim needs lightning.fabric.utilities.imports._IS_INTERACTIVE"
    )
    assert "Take Trainer(strategy='optim_ddp')" in error


def test_lazy_classes_tell_what_the_real_ones_tell():
    assert isinstance(torch.nn.BatchNorm2d(2), _upstream.BatchNorm)
    assert not isinstance(torch.nn.LayerNorm(2), _upstream.BatchNorm)
    assert issubclass(torch.nn.SyncBatchNorm, _upstream.BatchNorm)
    with pytest.raises(TypeError, match="for `isinstance` only"):
        type("Own", (_upstream.BatchNorm,), {})
