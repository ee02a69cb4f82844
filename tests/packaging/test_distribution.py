"""What a user installs: wheel and source archive hold the package and nothing else, and work without the clone."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_optim

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools.build_meta import build_{kind}; print(build_{kind}('dist'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, built from a copy: building writes beside the sources."""
    pytest.importorskip("setuptools", reason="the build backend of pyproject.toml")
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "lightning_optim", folder / "lightning_optim", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dist").mkdir()
    for kind in ("wheel", "sdist"):
        command = [sys.executable, "-c", BUILD.format(kind=kind)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return wheel, archive


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lightning_optim").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    info = f"lightning_optim-{lightning_optim.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == sources()
    assert {"lightning_optim/py.typed", "lightning_optim/recipes/cpu-latency.yaml"} <= names
    assert max(sizes.values()) < 100_000  # sources: no data, no weights


def test_the_source_archive_builds_the_same_wheel(built):
    with tarfile.open(built[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert sources() <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.endswith((".csv", ".gz", ".xlsx", ".ckpt", ".onnx", ".pt")) for name in names)


def test_the_metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        folder = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
        metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Name"] == "lightning-optim"
    assert metadata["Version"] == lightning_optim.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [
        line.partition(">")[0].partition("[")[0] for line in metadata.get_all("Requires-Dist") if "extra" not in line
    ]
    assert set(needed) == {"lightning", "torch", "torchmetrics", "torch-pruning", "rich", "numpy", "PyYAML"}
    assert {"onnx", "openvino", "report", "cli", "examples", "test", "docs"} <= set(metadata.get_all("Provides-Extra"))
    assert entry_points.split() == ["[console_scripts]", "lightning-optim", "=", "lightning_optim.cli:main"]
    assert "# lightning_optim" in metadata.get_payload()


@pytest.mark.slow
def test_it_works_without_the_clone(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import lightning_optim, sys; from lightning_optim import Recipe; from lightning_optim.cli import main;"
        "print(lightning_optim.__file__); Recipe.load('recommender').callbacks(); sys.exit(main(['recipes']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "lightning_optim" / "__init__.py")
    assert "small-file" in done.stdout
