"""What every test gets: one thread, a folder of its own; seeds, environment and process group come back."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", settings.get_profile("default"), deadline=None)  # a busy machine is no failure
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _state_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # two threads spin at every barrier when another process wants a core: 30x slower
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()  # a strategy writes the address of its processes there, and children would take it
    os.environ.update(environment)
