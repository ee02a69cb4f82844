"""What every test gets: one thread, a folder of its own; seeds, environment and process group come back."""

import io
import os
from functools import cache, partial
from importlib.metadata import entry_points
from pkgutil import resolve_name

import pytest
import torch
from hypothesis import settings

EXAMPLES = {"max_examples": 25, "deadline": None}  # a busy machine is no failure
settings.register_profile("default", settings.get_profile("default"), **EXAMPLES)
settings.register_profile("ci", settings.get_profile("ci"), **EXAMPLES)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def _cheap_repetitions():
    """Done once: the search for other packages' callbacks, 12 ms for each Trainer. Files are timed by few calls.

    The nets of the tests are so small that files would compute all of them in float: here no layer counts as small.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.fabric.utilities.registry.entry_points", cache(entry_points), raising=False)
        for name in ("export.latency.time_in_rounds", "report.comparison.latencies"):
            place = f"lightning_optim.{name}"
            patch.setattr(place, partial(_by_few_calls, resolve_name(place)))
        for name in ("SMALL_MATRIX", "SMALL_CONVOLUTION"):
            patch.setattr(f"lightning_optim.export.mixed.{name}", 0)
        yield


def _by_few_calls(measure, *arguments, **options):
    return measure(*arguments, **{**options, "seconds": 0.0})


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


@pytest.fixture
def empty_pictures(monkeypatch):
    """Figures are written empty: drawing one takes as long as a small fit, and a report draws each twice."""
    figure = pytest.importorskip("matplotlib.figure").Figure

    def save(self, file, **options):
        file.write("<svg ></svg>" if isinstance(file, io.TextIOBase) else b"<svg ></svg>")

    monkeypatch.setattr(figure, "savefig", save)
