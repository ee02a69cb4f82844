"""The table of modules that others wrote says what the workers found, and why a cell is no "yes"."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.models import Quiet, data
from lightning_optim import Recipe

MODULES = Path(__file__).parents[2] / "benchmarks" / "modules"
NAMES = ("run", "case", "environments")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    """Import the scripts by their names, and forget them again."""
    monkeypatch.setattr(sys, "path", [str(MODULES), *sys.path])
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


class Regressor(Quiet):
    """A module whose outputs are numbers."""

    validation_step = None

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :3]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def regressor_case(modules: dict[str, ModuleType], made=Regressor):
    return modules["case"].Case(
        make=lambda seed: made(),
        data=lambda: DataLoader(data(8), 2, shuffle=True),
        trainer=pl.Trainer,
    )


def outcomes(run: ModuleType, **others: str) -> dict[str, str]:
    return {**dict.fromkeys(run.COLUMNS, "yes"), **others}


def test_the_columns_are_those_of_the_worker(modules: dict[str, ModuleType]):
    assert modules["run"].COLUMNS == modules["case"].COLUMNS


def test_every_package_has_a_script_and_one_version(modules: dict[str, ModuleType]):
    for package in modules["run"].PACKAGES.values():
        assert (MODULES / f"{package.script}.py").exists()
        assert package.environment.peer == (package.requirement,)
        assert "==" in package.requirement


def test_equal_reasons_share_a_number_and_different_ones_do_not(modules: dict[str, ModuleType]):
    run = modules["run"]
    found = {
        "a": {"models": {"One": outcomes(run, zeros="train: no"), "Two": outcomes(run, zeros="train: no")}},
        "b": {"models": {"One": outcomes(run, channels="export: why")}, "versions": {}},
    }
    lines = run.modules_table(found).splitlines()
    assert lines[2] == "| One (a) | yes | (1) | yes | yes | yes | yes |"
    assert lines[3] == "| Two (a) | yes | (1) | yes | yes | yes | yes |"
    assert lines[4] == "| One (b) | yes | yes | (2) | yes | yes | yes |"
    assert lines[-2:] == ["1. train: no", "2. export: why"]


def test_a_package_that_is_not_installed_stands_in_the_file_with_its_reason(modules: dict[str, ModuleType]):
    run = modules["run"]
    found = {
        "a": {
            "models": {"One": outcomes(run)},
            "versions": {"torch": "2", "pandas": "3.0"},
            "refused": ["ERROR: pandas"],
        },
        "b": {"failed": "not installed: ERROR: no matching distribution"},
        "c": {"models": {"One": outcomes(run, alone="export: no")}, "versions": {"torch": "2", "pandas": "3.1"}},
    }
    text = run.document(Namespace(output=Path("x.md")), found)
    assert "b has no rows: not installed: ERROR: no matching distribution." in text
    assert "torch 2; pandas 3.0 (a), 3.1 (c);" in text
    assert "pip took not all constraints for a: `ERROR: pandas`." in text
    assert "Of 2 modules: alone 1, zeros 2," in text


def test_what_is_not_resumed_bit_for_bit_is_told(modules: dict[str, ModuleType], tmp_path: Path):
    made = []

    class Other(Regressor):
        """Every one begins elsewhere, and a step reads it."""

        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            self.shift = float(len(made))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.shift

    alone = modules["case"].Alone()
    case = regressor_case(modules, Other)
    said = modules["case"].told(lambda: alone.run(case, tmp_path), tmp_path / "alone.txt")
    assert said == "resume: without a technique too the resumed run is another"
    assert not alone.resumes
    assert "Ends" in (tmp_path / "alone.txt").read_text()


def test_a_technique_goes_through_all_steps_and_a_failure_names_its_own(modules: dict[str, ModuleType], tmp_path: Path):
    case, module = modules["case"], regressor_case(modules)
    alone = case.Alone()
    assert case.told(lambda: alone.run(module, tmp_path), tmp_path / "alone.txt") == "yes"
    assert alone.resumes
    assert alone.loads_by_class
    assert alone.exports
    recipe = case.RECIPES["zeros"]
    assert case.told(lambda: case.compressed(module, recipe, tmp_path, alone), tmp_path / "zeros.txt") == "yes"
    nothing = Recipe(weight_pruning={"sparsity": 0.5, "include": ["missing.*"]})
    said = case.told(lambda: case.compressed(module, nothing, tmp_path, alone), tmp_path / "zeros.txt")
    assert said.startswith("train: include: 'missing.*' matches no layer")


def test_recipes_of_numbers_teach_by_the_squared_error(modules: dict[str, ModuleType]):
    recipes = modules["case"].RECIPES
    assert recipes["a teacher"].distillation["loss"] == "mse"
    assert recipes["all of it"].distillation["loss"] == "mse"
    assert recipes["zeros"].distillation is None
