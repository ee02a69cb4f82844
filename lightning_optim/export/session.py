"""An exported file that is called like its module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_optim._upstream import tree_flatten_with_path, tree_leaves
from lightning_optim.export.runtimes import RUNTIMES

__all__ = ["ExportedModel", "as_fed"]


def as_fed(tensor: Tensor) -> Tensor:
    """Return a tensor as files expect it: on the CPU, and in float32 if it is floating point."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


class ExportedModel(nn.Module):
    """A file in an inference engine, on one thread of the CPU, that is called like its module.

    The code that evaluates the module then evaluates the file.

    Args:
        path: A file written by :func:`~lightning_optim.export_onnx`.
        runtime: "onnxruntime" or "openvino".

    Raises:
        ImportError: If the engine is not installed; the message names the extra.

    Examples:
        >>> deployed = ExportedModel("model.onnx")  # doctest: +SKIP
        >>> accuracy = (deployed(images).argmax(1) == labels).float().mean()  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, runtime: str = "onnxruntime") -> None:
        super().__init__()
        self.runtime = RUNTIMES.resolve(runtime)(Path(path))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file, and return one tensor, or a tuple of tensors if the file has several outputs."""
        outputs = self.runtime.run(self.ordered(args, kwargs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def ordered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return a call's tensors in the file's order: positional ones in order, keyword arguments by their names.

        Raises:
            TypeError: If the call lacks a tensor for one of the file's inputs, or has one that is not an input.
        """
        positional = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        named = dict(zip(self.runtime.names, positional, strict=False)) | _by_name(kwargs)
        if set(named) != set(self.runtime.names) or len(positional) > len(self.runtime.names):
            raise TypeError(
                f"the file's inputs are {', '.join(self.runtime.names)}, and the call passes "
                f"{len(positional)} tensors by position and {', '.join(_by_name(kwargs)) or 'none'} by name."
            )
        return [as_fed(named[name]) for name in self.runtime.names]


def _by_name(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among keyword arguments, under their names in the file."""
    named = {}
    for path, leaf in tree_flatten_with_path(dict(kwargs))[0]:
        if isinstance(leaf, Tensor):
            named["_".join(str(getattr(key, "idx", getattr(key, "key", key))) for key in path)] = leaf
    return named
