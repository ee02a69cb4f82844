"""What is exported: a float copy of a module, the arguments of its forward, and the names in the file."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_optim._upstream import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten
from lightning_optim.calls import describe_inputs, try_forward
from lightning_optim.export import external
from lightning_optim.export.program import OPSET, Program, export_program
from lightning_optim.export.session import as_fed
from lightning_optim.modules import copy_module
from lightning_optim.outputs import output_fields, output_tensors
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows, map_inputs

__all__ = ["Flat", "Source", "deployed"]

_ADVICE = "a tensor, a tuple of arguments or a dict of keyword arguments is expected."


def deployed(module: nn.Module, *, rounded: bool) -> nn.Module:
    """Return a float32 copy in eval mode on the CPU; parameters that are so already are not copied."""
    return copy_module(module, rounded=rounded, share_weights=True).cpu().float().requires_grad_(False)


class Flat(nn.Module):
    """A module as a function of tensors that returns tensors; dicts and constants in its arguments are built in.

    Args:
        module: The module.
        inputs: Arguments of its forward, whose structure every call has.
    """

    def __init__(self, module: nn.Module, inputs: ForwardInputs) -> None:
        super().__init__()
        self.module = module
        leaves, self._spec = tree_flatten((inputs.args, inputs.kwargs or {}))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def tensors(self, inputs: ForwardInputs) -> tuple[Tensor, ...]:
        """Return the tensors among a call's arguments.

        Raises:
            ValueError: If the arguments have another structure.
        """
        leaves, spec = tree_flatten((inputs.args, inputs.kwargs or {}))
        if spec != self._spec or any(not isinstance(leaves[place], Tensor) for place in self._places):
            raise ValueError(
                f"`inputs` must have the form of `example_inputs`, got {describe_inputs(inputs)}. Pass several calls "
                "as a list."
            )
        return tuple(leaves[place] for place in self._places)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module."""
        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return tuple(tensor for _, tensor in _named(self.module(*args, **kwargs)))


def _named(output: Any) -> list[tuple[str, Tensor]]:
    """Return an output's tensors with the names of its parts (of a dict, a dataclass, ...), or else "output"."""
    named = []
    for key, part in (output_fields(output) or {"output": output}).items():
        tensors = output_tensors(part)
        suffixes = [""] if len(tensors) == 1 else [f"_{index}" for index in range(len(tensors))]
        named += [(f"{key}{suffix}", tensor) for suffix, tensor in zip(suffixes, tensors, strict=True)]
    return named


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        module: A float32 copy of the module.
        inputs: Arguments of its forward.
        input_names: Names in the file.
        output_names: Names in the file.
        dynamic_batch: Whether dimension 0 is free.
        free: Input name -> dimension -> name, for every free dimension.
        opset: Version of ONNX's operators.
    """

    module: nn.Module
    inputs: ForwardInputs
    input_names: list[str]
    output_names: list[str]
    dynamic_batch: bool
    free: dict[str, dict[int, str]]
    opset: int = OPSET

    @classmethod
    def of(
        cls,
        module: nn.Module,
        examples: ForwardInputs,
        dynamic_batch: bool,
        dynamic_dims: Mapping[str, Mapping[int, str]],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
    ) -> "Source":
        """Copy a module and call it once; the arguments are those of :func:`export_onnx`.

        Raises:
            ValueError: If the call fails or returns no tensor, or if names or free dimensions do not fit.
        """
        copy = deployed(module, rounded=True)
        if dynamic_batch:
            examples = _at_least_two_rows(examples)
        outputs = _named(try_forward(copy, examples, argument="`example_inputs`", advice=_ADVICE))
        if not outputs:
            raise ValueError(f"forward of {type(module).__name__} returns no tensor, so there is nothing to export.")
        returned = _names("output_names", output_names, [name for name, _ in outputs])
        names = _names("input_names", input_names, _argument_names(copy, examples))
        _check_unique(names, returned)
        tensors = dict(zip(names, Flat(copy, examples).tensors(examples), strict=True))
        free = _free_dimensions(tensors, dynamic_batch, dynamic_dims)
        return cls(copy, examples, names, returned, dynamic_batch, free)

    def flat(self) -> Flat:
        """Return the module as a function of tensors."""
        return Flat(self.module, self.inputs)

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Return the shape of each input, with the names of free dimensions."""
        shapes = [tuple(tensor.shape) for tensor in self.flat().tensors(self.inputs)]
        return {
            name: tuple(self.free[name].get(place, size) for place, size in enumerate(shape))
            for name, shape in zip(self.input_names, shapes, strict=True)
        }

    def calls_of(self, examples: ForwardInputs, inputs: Any) -> list[ForwardInputs]:
        """Return the calls to compare; with a free batch, the last is the first one cut to one row."""
        calls = inputs if isinstance(inputs, list) else [examples if inputs is None else inputs]
        calls = [map_inputs(as_fed, as_forward_inputs(call)) for call in calls]
        if not calls:
            raise ValueError("`inputs` is an empty list: there is nothing to compare on.")
        return [*calls, first_rows(calls[0], 1)] if self.dynamic_batch else calls

    def write(self, path: Path, metadata: Mapping[str, str]) -> Program:
        """Write the file, and return the graph in it."""
        flat = self.flat()
        tensors = flat.tensors(self.inputs)
        flat(*tensors)  # its error says more plainly what cannot be exported than that of a traced call
        program = export_program(flat, tensors, self.module, self.input_names, self.free)
        exported = program.to_onnx(self.module, self.input_names, self.output_names, self.free, self.opset)
        exported.model.metadata_props.update(metadata)
        external.save(exported.model, path)
        return program


def _at_least_two_rows(examples: ForwardInputs) -> ForwardInputs:
    """Repeat a single row: ``torch.export`` would treat a batch of 1 as a constant."""
    tensors = [leaf for leaf in tree_leaves((examples.args, examples.kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    rows = max((len(tensor) for tensor in tensors), default=2)
    try:
        return first_rows(examples, max(rows, 2))
    except ValueError as error:
        raise ValueError(
            "dimension 0 of all inputs is the batch with dynamic_batch=True, got "
            f"{describe_inputs(examples)}. Pass dynamic_batch=False for fixed shapes."
        ) from error


def _free_dimensions(
    tensors: Mapping[str, Tensor], dynamic_batch: bool, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, str]]:
    free: dict[str, dict[int, str]] = {n: {0: "batch"} if dynamic_batch and t.ndim else {} for n, t in tensors.items()}
    for name, places in dynamic_dims.items():
        if name not in tensors:
            raise ValueError(f"dynamic_dims: there is no input {name!r}; the inputs are {', '.join(tensors)}.")
        for place, dim in places.items():
            shape = tuple(tensors[name].shape)
            if not 0 <= place < len(shape) or shape[place] < 2:
                raise ValueError(
                    f"dynamic_dims: dimension {place} of {name!r} cannot be free with an example of shape {shape}: it "
                    "must exist and have at least two entries, because a size of 1 would be treated as a constant."
                )
            free[name][place] = dim
    return free


def _check_unique(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    twice = [name for name, count in Counter([*inputs, *outputs]).items() if count > 1]
    if twice:
        raise ValueError(
            f"{twice[0]!r} would name two of the file's inputs and outputs. Pass `input_names` or `output_names`."
        )


def _names(argument: str, names: Sequence[str] | None, default: list[str]) -> list[str]:
    if names is not None and len(names) != len(default):
        raise ValueError(f"`{argument}` must be {len(default)} names, for {', '.join(default)}; got {list(names)!r}.")
    return list(default if names is None else names)


def _argument_names(module: nn.Module, inputs: ForwardInputs) -> list[str]:
    """Return the names of all tensors among the arguments: ``x``, ``batch_mask`` of a dict, ``inputs_0`` of a list."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind in kinds]
    names = []
    for (_, first, *rest), leaf in tree_flatten_with_path((inputs.args, inputs.kwargs or {}))[0]:
        if isinstance(leaf, Tensor):
            keys = [getattr(key, "idx", getattr(key, "key", key)) for key in (first, *rest)]
            if isinstance(keys[0], int):
                keys[0] = positional[keys[0]] if keys[0] < len(positional) else f"input_{keys[0]}"
            names.append("_".join(map(str, keys)))
    return names
