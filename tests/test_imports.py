"""Imports point one way, and importing the package loads nothing heavy."""

import ast
from pathlib import Path

import lightning_optim
from helpers.ranks import run_alone

PACKAGE = Path(lightning_optim.__file__).parent
LAYERS = [
    {
        "configs",
        "functional",
        "registry",
        "_version",
        "_upstream",
        "tables",
        "sharding",
        "optimizers",
        "provenance",
        "checks",
        "errors",
        "files",
        "modules",
        "outputs",
        "structure",
        "change",
        "plan",
        "techniques",
        "patterns",
        "progress",
    },
    {
        "depth",
        "structured",
        "sparsity",
        "low_rank",
        "quantization",
        "measure",
        "export",
        "checkpoint",
        "layerwise",
        "target",
        "calls",
        "window",
    },
    {"report", "callbacks", "strategies", "distillation", "recipe", "search", "metrics", "demo", "cli", "__main__"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Names of the package's own top modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lightning_optim.")}
    return found & LEVEL.keys()


def test_imports_point_one_way():
    upward = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in LEVEL, f"{own} has no place in LAYERS"
        upward |= {(str(path.relative_to(PACKAGE)), name) for name in imports_of(path) if LEVEL[name] > LEVEL[own]}
    assert not upward


PURE = [
    *sorted((PACKAGE / "functional").rglob("*.py")),
    *(PACKAGE / f"strategies/{name}.py" for name in ("cost", "traffic")),
]


def test_arithmetic_is_pure():
    for path in PURE:
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert "lightning" not in roots, path.name


def test_importing_loads_nothing_heavy_and_touches_no_gpu(tmp_path):
    heavy = ["torch_pruning", "onnx", "onnxruntime", "openvino", "matplotlib", "pandas", "sklearn", "torch._dynamo"]
    (tmp_path / "script.py").write_text(
        "import sys, lightning.pytorch, torch; before = set(sys.modules); import lightning_optim;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before], torch.cuda.is_initialized())"
    )
    assert run_alone(tmp_path / "script.py") == (0, "[] False\n")


LONGEST_FILE, MOST_METHODS = 500, 25


def methods_of(node: ast.ClassDef) -> set[str]:
    """Names of the methods and properties that a class defines, without ``__dunders__``."""
    functions = (child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {child.name for child in functions if not (child.name.startswith("__") and child.name.endswith("__"))}


def test_no_class_holds_many_ideas():
    counts = {
        node.name: len(methods_of(node))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: count for name, count in counts.items() if count > MOST_METHODS}


def test_no_file_is_long():
    lengths = {str(path.relative_to(PACKAGE)): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}
