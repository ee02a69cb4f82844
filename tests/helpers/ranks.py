"""Tests that read what the ranks of a launch wrote: a launch for the quick cases, another for the slow."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def torchrun(worker: Path, *arguments: object, processes: int = 2) -> None:
    """Run a worker on several processes; it must end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, str(worker), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]


class Launches:
    """Runs cases when the first of them is asked for, those of one speed together.

    Args:
        worker: Takes a folder and names of cases.
        make_folder: Makes a new folder.
        speeds: Cases that run together.
    """

    def __init__(self, worker: Path, make_folder: Callable[[str], Path], *speeds: Sequence[str]) -> None:
        self._worker = worker
        self._make_folder = make_folder
        self._speeds = speeds
        self._folders: dict[int, Path] = {}

    def __call__(self, case: str) -> Path:
        """Return the folder where the ranks of a case wrote."""
        number = next(number for number, cases in enumerate(self._speeds) if case in cases)
        if number not in self._folders:
            folder = self._make_folder(f"launch{number}")
            torchrun(self._worker, folder, *self._speeds[number])
            self._folders[number] = folder
        return self._folders[number]


def quick_and_slow(quick: Sequence[str], slow: Sequence[str], keep: Callable[[str], bool] = lambda case: True) -> list:
    """Return cases as test parameters, with their marks."""
    return [
        *(case for case in quick if keep(case)),
        *(pytest.param(case, marks=pytest.mark.slow) for case in slow if keep(case)),
    ]
