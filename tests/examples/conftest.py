"""The example scripts as modules, and what their ``main`` changes in the process put back."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything writes it; monkeypatch takes it away again
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def retail_file():
    """The real Online Retail file, from $LIGHTNING_OPTIM_DATA or ../shared/data; its tests are skipped elsewhere."""
    from online_retail import find_file

    try:
        return find_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
