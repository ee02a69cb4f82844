"""The engines that files are written for: each has its form of a file, and an engine that verifies it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_optim.export import tensorrt
from lightning_optim.export.integer import rounds
from lightning_optim.export.mixed import leave_float
from lightning_optim.export.program import OPSET
from lightning_optim.export.report import Kernels
from lightning_optim.export.runtimes import Runtime
from lightning_optim.quantization.layers import QuantizedLayer

__all__ = ["TARGETS", "Target", "find_target_form"]


@dataclass(frozen=True)
class Target:
    """The form of files for an engine.

    Attributes:
        title: The engine's name in tables.
        runtime: The engine that verifies the file, by its name in ``RUNTIMES``.
        opset: Version of ONNX's operators.
        runs_here: Whether times in ``runtime`` say anything about the engine.
    """

    title: str
    runtime: str
    opset: int = OPSET
    runs_here: bool = True

    def check(self, module: nn.Module, keep_float: str) -> str:
        """Check that a module can have this form, and return which of its layers compute in float.

        Args:
            module: The module as it is quantized.
            keep_float: What the user asked.

        Raises:
            ValueError: If it cannot; the message says what can.
        """
        return keep_float

    def prepare(self, module: nn.Module) -> list[str]:
        """Change a copy before its layers are converted to integers, in place, and return what to note."""
        return []

    def finish(self, module: nn.Module) -> None:
        """Change a converted copy, in place."""

    def check_file(self, path: Path) -> None:
        """Check a file that was written.

        Raises:
            RuntimeError: If it has not the form.
        """

    def kernels(self, path: Path, loaded: Runtime) -> Kernels:
        """Count the products with integers: those of the engine that runs the file, or of the file."""
        return loaded.kernels()


class _OpenVINO(Target):
    def prepare(self, module: nn.Module) -> list[str]:
        """Leave inputs with the range of each call float.

        OpenVINO computes that range operation by operation, which took longer than the product gained; weights alone
        it multiplies as they are stored (2026.4).
        """
        layers = {n: x for n, x in module.named_modules() if isinstance(x, QuantizedLayer) and rounds(x)}
        dynamic = [name for name, x in layers.items() if x.activation_bits and x.activation_ranges == "dynamic"]
        if not dynamic:
            return []
        leave_float(module, dynamic)
        return [
            f"The inputs of {len(dynamic)} layers, which the module rounds with the range of each call, are not "
            "rounded in this file: OpenVINO is faster so. It was compared with the module without these roundings."
        ]


class _TensorRT(Target):
    def check(self, module: nn.Module, keep_float: str) -> str:
        if keep_float == "auto":
            raise ValueError(
                'keep_float="auto" times files in the engine, and TensorRT cannot be run here. Take keep_float="none".'
            )
        tensorrt.check_module(module)
        return "none"  # which layers are small was found out on CPUs

    def prepare(self, module: nn.Module) -> list[str]:
        return tensorrt.prepare(module)

    def finish(self, module: nn.Module) -> None:
        tensorrt.finish(module)

    def check_file(self, path: Path) -> None:
        broken = tensorrt.violations(path)
        if broken:
            raise RuntimeError(
                f"the file is not one that TensorRT reads, so nothing was written: {'; '.join(broken[:4])}. Exclude "
                "the layers from quantization."
            )

    def kernels(self, path: Path, loaded: Runtime) -> Kernels:
        return tensorrt.integer_products(path)


TARGETS: Mapping[str, Target] = {
    "onnxruntime": Target("ONNX Runtime", "onnxruntime"),
    "openvino": _OpenVINO("OpenVINO", "openvino"),
    "tensorrt": _TensorRT("TensorRT", "onnxruntime", tensorrt.OPSET, runs_here=False),
}
"""Name -> form of the files for an engine."""


def find_target_form(name: str) -> Target:
    """Return the form of the files for an engine.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(map(repr, TARGETS))}, got {name!r}.")
    return TARGETS[name]
