"""The graph of a module with its free dimensions, and the ONNX model built from it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.errors import FAILURES
from lightning_optim.export import expanding, packed
from lightning_optim.export.simplify import simplify
from lightning_optim.quantization.failures import export_failure, quiet_export

__all__ = ["OPSET", "FreeDimensions", "Program", "export_program"]

OPSET = 21
"""The first opset whose DequantizeLinear supports everything written here."""

FreeDimensions = Mapping[str, Mapping[int, str]]
"""Input name -> dimension -> name, for every free dimension."""

_FIXED_BATCH = (
    "If code fixes the batch size (`len(x)` does, `x.shape[0]` does not), change it or pass dynamic_batch=False."
)


@dataclass(frozen=True)
class Program:
    """An exported graph.

    Attributes:
        graph: The result of ``torch.export``.
        largest: Name of a free dimension -> the largest size that the module's own code allows, if it is limited.
    """

    graph: Any
    largest: dict[str, int]

    def held(self, module: nn.Module) -> set[int]:
        """Return the identities of the parameters and buffers of ``module`` that the graph uses.

        Args:
            module: The exported module.
        """
        signature = self.graph.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        read = {names[node.name] for node in self.graph.graph.nodes if node.name in names and node.users}
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        return {id(tensor) for name, tensor in tensors if name in read}

    def to_onnx(
        self,
        module: nn.Module,
        input_names: Sequence[str],
        output_names: Sequence[str],
        free: FreeDimensions,
        opset: int = OPSET,
    ) -> Any:
        """Return the ONNX model, with named free dimensions.

        Args:
            module: The exported module.
            input_names: Names of all inputs.
            output_names: Names of all outputs.
            free: The free dimensions.
            opset: Version of ONNX's operators.

        Raises:
            ValueError: If ONNX has no operator for a part of it.
        """
        try:
            with quiet_export() as printed:
                exported = torch.onnx.export(
                    self.graph,
                    dynamo=True,
                    opset_version=opset,
                    input_names=list(input_names),
                    output_names=list(output_names),
                    custom_translation_table=_translations(opset),
                    verbose=False,
                )
        except FAILURES as error:
            raise ValueError(export_failure(module, error, printed.getvalue())) from error
        assert exported is not None  # noqa: S101 - with dynamo=True
        expanding.write_out(exported.model)
        packed.pack_initializers(exported.model)
        _drop_traces(exported.model)
        _name_dimensions(exported.model, [free[name] for name in input_names])
        simplify(exported.model)
        return exported


def export_program(
    flat: nn.Module, tensors: Sequence[Tensor], module: nn.Module, input_names: Sequence[str], free: FreeDimensions
) -> Program:
    """Export a module's graph; the largest size of a free dimension is found in its code.

    Args:
        flat: The module as a function from tensors to tensors.
        tensors: Its inputs.
        module: The module itself, for messages.
        input_names: Names of all inputs.
        free: The free dimensions.

    Raises:
        ValueError: If it cannot be exported, naming a free dimension that its code fixes.
    """
    named = {name: torch.export.Dim(name, min=1) for places in free.values() for name in places.values()}
    shapes = tuple({place: named[dim] for place, dim in free[name].items()} for name in input_names)
    try:
        with quiet_export() as printed:
            return Program(_export(flat, tensors, shapes if named else None), {})
    except FAILURES as error:
        if not _is_about_sizes(error):
            raise ValueError(export_failure(module, error, printed.getvalue())) from error
    # A limit on a size (a table of positions) is an error for a named dimension, but is detected for an unnamed one.
    shapes = tuple(dict.fromkeys(free[name], torch.export.Dim.DYNAMIC) for name in input_names)
    try:
        with quiet_export() as printed:
            graph = _export(flat, tensors, shapes)
    except FAILURES as error:
        fixed = _fixed_dimension(module, error, input_names, free)
        raise ValueError(fixed or export_failure(module, error, printed.getvalue())) from error
    return Program(graph, _largest(graph, input_names, free))


def _export(flat: nn.Module, tensors: Sequence[Tensor], shapes: Any) -> Any:
    return torch.export.export(flat, tuple(tensors), dynamic_shapes=None if shapes is None else (shapes,), strict=False)


def _is_about_sizes(error: Exception) -> bool:
    return type(error).__name__ == "UserError" and "Constraints violated" in str(error)


def _fixed_dimension(module: nn.Module, error: Exception, input_names: Sequence[str], free: FreeDimensions) -> str:
    """Return the sentence that names the dimension fixed by the module's code; empty if the error names none."""
    message = re.search(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] as dynamic .* constant \((\d+)\)", str(error))
    if message is None:
        return ""
    name, place, size = input_names[int(message[1])], int(message[2]), message[3]
    dim = free[name].get(place, "")
    sentence = (
        f"{type(module).__name__} fixes dimension {place} of {name!r} ({dim!r}) at {size}, but it should be free. "
    )
    if place == 0 and dim == "batch":
        return sentence + _FIXED_BATCH
    return sentence + "Change the code (`len(x)` or a parameter of that length fix a size), or its dynamic_dims."


def _largest(graph: Any, input_names: Sequence[str], free: FreeDimensions) -> dict[str, int]:
    sizes = dict(zip(input_names, (_sizes(node) for node in _user_inputs(graph)), strict=True))
    limits: dict[str, int] = {}
    for name, places in free.items():
        for place, dim in places.items():
            bounds = graph.range_constraints.get(getattr(getattr(sizes[name][place], "node", None), "expr", None))
            upper = getattr(bounds, "upper", None)
            if upper is not None and upper < 2**31:  # torch's infinity is larger
                limits[dim] = min(int(upper), limits.get(dim, int(upper)))
    return limits


def _user_inputs(graph: Any) -> list[Any]:
    names = set(graph.graph_signature.user_inputs)
    return [node for node in graph.graph.nodes if node.op == "placeholder" and node.name in names]


def _sizes(node: Any) -> Any:
    return node.meta["val"].shape


def _drop_traces(model: Any) -> None:
    """Drop the Python stacks and the signature that the exporter writes: they were half of a small model's file."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_dimensions(model: Any, free: Sequence[Mapping[int, str]]) -> None:
    """Give free dimensions their names: the exporter writes torch's symbols (``s95``), also in products."""
    symbols: dict[str, str] = {}
    for value, places in zip(model.graph.inputs, free, strict=True):
        for place, name in places.items():
            symbols.setdefault(str(value.shape[place]), name)
    if not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*model.graph.inputs, *inner):
        for place, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:  # an unknown size is not equal to others
                value.shape[place] = pattern.sub(lambda symbol: symbols[symbol[0]], str(size))
    for value, places in zip(model.graph.inputs, free, strict=True):  # dimensions that the code makes equal
        for place, name in places.items():
            value.shape[place] = name


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    import onnxscript

    standard: Any = getattr(onnxscript, f"opset{opset}")

    def quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return standard.QuantizeLinear(x, scale, zero_point)

    def dequantize(integers: Any, scale: Any, zero_point: Any = None, axis: int = -1) -> Any:
        attributes = {} if axis < 0 else {"axis": axis}
        return standard.DequantizeLinear(integers, scale, zero_point, **attributes)

    def quantize_dynamically(x: Any) -> Any:
        return standard.DynamicQuantizeLinear(x)

    own = torch.ops.lightning_optim
    return {
        own.expand.default: expanding.translation(),
        own.quantize.default: quantize,
        own.dequantize.default: dequantize,
        own.quantize_dynamically.default: quantize_dynamically,
        **packed.translations(),
    }
