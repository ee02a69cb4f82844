"""Tests that read what the ranks of a launch wrote: a launch for the quick cases, another for the slow."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning.pytorch"])  # not this package: tests see what importing it does
SECONDS = 600


def run_ranks(worker: Path, *arguments: object, processes: int = 2) -> None:
    """Run a worker on several processes, as torchrun does; all must end well.

    They are forked from a process that has imported torch and Lightning: a launch under torchrun imports them once per
    rank and once more, which takes longer than most workers. ``strategies/test_failures.py`` and
    ``examples/test_distributed.py`` start torchrun itself.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    elastic = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    environments = [
        {**os.environ, **address, **sizes, **elastic, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]
    code, output = _run(worker, arguments, environments)
    assert code == 0, output[-6000:]


def run_alone(worker: Path, *arguments: object) -> tuple[int, str]:
    """Run a script in a new process, in which torch and Lightning are imported; return its exit code and output."""
    return _run(worker, arguments, [dict(os.environ)])


def _run(worker: Path, arguments: Sequence[object], environments: Sequence[Mapping[str, str]]) -> tuple[int, str]:
    words = [str(worker), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"rank{rank}.txt" for rank in range(len(environments))]
        children = [
            _FORKS.Process(target=_be_script, args=(words, {**environment, "OMP_NUM_THREADS": "1"}, os.getcwd(), file))
            for environment, file in zip(environments, files, strict=True)
        ]
        for child in children:
            child.start()
        code = _wait(children)
        return code, "\n".join(file.read_text(errors="replace") for file in files if file.exists())


def _wait(children: Sequence[multiprocessing.Process]) -> int:
    """Return the first exit code that is not 0; the others are then ended, as torchrun ends them."""
    ends = time.monotonic() + SECONDS
    try:
        while True:
            codes = [child.exitcode for child in children]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return failed[0] if failed else 0
            if time.monotonic() > ends:
                return -1
            next(child for child in children if child.exitcode is None).join(0.05)
    finally:
        for child in children:
            child.kill()
            child.join()


def _be_script(words: Sequence[str], environment: Mapping[str, str], folder: str, file: Path) -> None:
    """Do in a forked process what ``python worker.py ...`` does."""
    output = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


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
            run_ranks(self._worker, folder, *self._speeds[number])
            self._folders[number] = folder
        return self._folders[number]


def quick_and_slow(quick: Sequence[str], slow: Sequence[str], keep: Callable[[str], bool] = lambda case: True) -> list:
    """Return cases as test parameters, with their marks."""
    return [
        *(case for case in quick if keep(case)),
        *(pytest.param(case, marks=pytest.mark.slow) for case in slow if keep(case)),
    ]
