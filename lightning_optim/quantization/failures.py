"""Failed exports: one sentence, and a file with everything that torch prints about it."""

import contextlib
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator

from torch import nn

__all__ = ["export_failure", "quiet_export"]

_TALKATIVE = (
    "torch.onnx._internal.exporter._registration",  # torch 2.13: "torchvision is not installed"
    "onnxscript.optimizer._constant_folding",  # onnxscript 0.7: "Evaluation failed", and the node stays as it is
    "torch.fx.experimental.symbolic_shapes",  # torch 2.13: "Unable to find user code", before it raises
)


@contextlib.contextmanager
def quiet_export() -> Iterator[io.StringIO]:
    """Keep the output of the exporters off the terminal, such as the graph of a module that they cannot export.

    Yields:
        What was printed. After a success it is printed after all, because a module's own forward may print.
    """
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    printed = io.StringIO()
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            # torch 2.13 calls what it deprecates
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # nn.RNNBase keeps a list of its parameters, whose entries torch.export replaces and gives back.
            warnings.filterwarnings("ignore", r"The tensor attributes? \S*_flat_weights", UserWarning)
            yield printed
        sys.stderr.write(printed.getvalue())
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def export_failure(module: nn.Module, error: BaseException, printed: str = "") -> str:
    """Return the sentence that says that a module cannot be exported, and why.

    Args:
        module: The module.
        error: The exporter's error.
        printed: The exporter's output; with the whole error it is written to a file that the sentence names.
    """
    sentence = f"{type(module).__name__} cannot be exported by {_exporter(error)} ({_reason(error)})."
    details = f"{_whole(error)}\n{printed}".strip()
    return sentence if "\n" not in details else f"{sentence} Details: {_written(details)}."


def _exporter(error: BaseException) -> str:
    return "torch.onnx" if type(error).__module__.startswith("torch.onnx") else "torch.export"


def _reason(error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(causes[-1]))
    if missing:
        return f"ONNX has no operator for {missing[1]}{_called_by(causes)}"
    decides = re.search(
        r"The following call raised this error:\s+File \"(.+)\", line (\d+), in .+\n\s*(.+)", str(error)
    )
    if type(error).__name__ == "GuardOnDataDependentSymNode" and decides:
        return (
            f"Could not guard on data: `{decides[3].strip()}` in {decides[1]}, line {decides[2]}, depends on the "
            "values of a tensor, and a graph is the same for all values"
        )
    lines = [line.strip() for line in str(causes[-1]).splitlines() if line.strip()] or [repr(causes[-1])]
    return next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ").rstrip(".")


def _called_by(causes: list[BaseException]) -> str:
    """Return how transformers' mixtures of experts are told to use operators that ONNX has, if it is about them."""
    if not any("transformers." in str(cause) and "grouped_mm" in str(cause) for cause in causes):
        return ""
    return ', by which the experts are computed; call model.set_experts_implementation("batched_mm") before'


def _whole(error: BaseException) -> str:
    cause = "" if error.__cause__ is None else f"\n\ncaused by\n{_whole(error.__cause__)}"
    return f"{type(error).__name__}: {error}{cause}"


def _written(details: str) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="export_failure_", suffix=".txt", delete=False) as file:
        file.write(details)
    return file.name
