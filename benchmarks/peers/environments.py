"""An environment for each peer, made with venv and pip in a folder outside the repository."""

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "REPOSITORY", "Environment", "NotInstalled", "default_folder"]

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
PINNED = ("torch", "lightning", "onnxruntime")
"""What stays at the version of constraints.txt where a peer refuses the other lines."""

TASK = ("torch", "lightning", "torchmetrics", "torch-pruning", "rich", "numpy", "PyYAML", "scikit-learn", "pandas")
EXPORT = ("onnx", "onnxscript", "onnxruntime")


class NotInstalled(RuntimeError):
    """A peer that pip did not install; the text is pip's reason."""


@dataclass(frozen=True)
class Environment:
    """What is installed together.

    Attributes:
        name: Of its folder.
        peer: Requirements beside those of the task.
        alone: Requirements that are installed without what they require.
        options: More of ``pip install``.
        variables: Set for what runs in it; ``{}`` stands for its folder.
    """

    name: str
    peer: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def make(self, folder: Path) -> Path:
        """Make it where it is not there yet, and return its Python.

        Raises:
            NotInstalled: If pip fails, with all constraints and with the pinned ones alone.
        """
        place = folder / self.name
        python = place / "bin" / "python"
        done = place / "installed.json"
        wanted = [*TASK, *EXPORT, *self.peer]
        recorded = [*wanted, *self.alone]
        if done.exists() and json.loads(done.read_text())["wanted"] == recorded:
            return python
        reasons = []
        for constraints in (CONSTRAINTS, self._few(folder)):
            venv.create(place, with_pip=True, clear=True)
            pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
            pip += self.options
            found = subprocess.run([*pip, "-c", str(constraints), *wanted], capture_output=True, text=True, check=False)
            if found.returncode == 0 and self.alone:
                alone = [*pip, "--no-deps", *self.alone]
                found = subprocess.run(alone, capture_output=True, text=True, check=False)
            if found.returncode == 0:
                done.write_text(json.dumps({"wanted": recorded, "constraints": constraints.name, "refused": reasons}))
                return python
            reasons.append(_reason(found.stdout + found.stderr))
        raise NotInstalled(reasons[-1])

    def surroundings(self, folder: Path) -> dict[str, str]:
        """Return the variables that its programs run with."""
        set_here = {name: value.format(folder / self.name) for name, value in self.variables}
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **set_here}

    def refused(self, folder: Path) -> list[str]:
        """Return why pip did not take all constraints; empty where it did."""
        return json.loads((folder / self.name / "installed.json").read_text())["refused"]

    def _few(self, folder: Path) -> Path:
        lines = [line for line in CONSTRAINTS.read_text().splitlines() if line.split("==")[0] in PINNED]
        path = folder / "few_constraints.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        # ModelPruning comes with Lightning, and torch-pruning is a dependency of the package.
        Environment("own"),
        Environment("torchao", ("torchao==0.18.0",)),
        # Without torchao torch cannot export its models. Its first use compiles an extension, for which it waits 60
        # seconds unless it is told to wait longer.
        Environment(
            "nncf",
            ("nncf==3.4.0", "setuptools<81", "torchao==0.18.0"),
            variables=(("NNCF_EXTENSION_LOAD_TIMEOUT", "0"), ("TORCH_EXTENSIONS_DIR", "{}/extensions")),
        ),
        # It imports requests and huggingface_hub without requiring them.
        Environment("modelopt", ("nvidia-modelopt==0.47.0", "requests", "huggingface_hub")),
        # It requires torchvision, whose wheel on PyPI needs a torch with CUDA; its losses do not use it.
        Environment("torchdistill", alone=("torchdistill==1.1.5",)),
    )
}


def default_folder() -> Path:
    """Return the cache folder of the user."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lightning_optim_peers"


def _reason(stderr: str) -> str:
    """Return the last line in which pip says why."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    conflicts = [line for line in lines if "depends on" in line or "requires" in line]
    return "; ".join([errors[-1], *conflicts[:2]])[:300]


if __name__ == "__main__":
    for chosen in sys.argv[2:] or ENVIRONMENTS:
        print(chosen, ENVIRONMENTS[chosen].make(Path(sys.argv[1])))
