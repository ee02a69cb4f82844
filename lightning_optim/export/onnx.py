"""An ONNX file from a module, float or quantized, that is written only when its answers are the module's."""

import importlib.util
import inspect
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim._upstream import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten
from lightning_optim._version import __version__
from lightning_optim.calls import describe_inputs, try_forward
from lightning_optim.checkpoint import plain_plan
from lightning_optim.export.integer import convert, rounds, rounds_output
from lightning_optim.export.program import OPSET, Program, export_program
from lightning_optim.export.report import ExportReport, Kernels, describe_layers, notes_on
from lightning_optim.export.verify import RUNTIMES, Comparison, Runtime, compare, compare_latency, missing_package
from lightning_optim.measure.latency import LatencyResult
from lightning_optim.modules import CONVOLUTIONS, copy_module, without_fast_path
from lightning_optim.outputs import output_fields, output_tensors
from lightning_optim.quantization.graph import read_graph
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows, map_inputs

__all__ = ["export_onnx"]

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file."""

_ADVICE = "a tensor, a tuple of arguments or a dict of keyword arguments is expected."


def export_onnx(
    module: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    verify: bool = True,
    runtime: str = "onnxruntime",
    inputs: Any = None,
    least_agreement: float = 0.99,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metric: Mapping[str, float] | None = None,
) -> ExportReport:
    """Export a module to ONNX: int8 where it is quantized, float32 elsewhere.

    Weights are stored as int8 with the integers and scales that fake quantization gives, activations are rounded to
    uint8 by QuantizeLinear and DequantizeLinear, and BatchNorm is folded into the scales of the convolution before it.
    Engines run such layers with integers; weights of fewer than 8 bits are stored as int8 too, and weights with scales
    per group are computed in float. Attention's own matrix products, norms and additions stay float.

    The file replaces what is at ``path`` only after it was run in the engine and gave the module's answers.

    Args:
        module: A LightningModule or any module, on any device and in any precision, in training or not. A float32 copy
            on the CPU, in eval mode, is exported; ``module`` is not changed.
        path: The file to write; its folder exists.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments of ``forward``.
        dynamic_batch: Whether dimension 0 of all inputs is free in the file; else the shapes are the examples'.
        dynamic_dims: Other free dimensions: input name -> dimension -> its name; those of one name have one size. For a
            text model ``{"input_ids": {1: "length"}, "attention_mask": {1: "length"}}``. Limits that the module's code
            sets (a table of 512 positions) are found, and are among the report's notes.
        verify: Whether the file is run and compared.
        runtime: "onnxruntime" or "openvino": where it is run, on one thread of the CPU.
        inputs: What to compare on, like ``example_inputs``, or a list of such; default the example inputs. Better are
            some hundred rows of held-out data.
        least_agreement: Fraction of rows whose class must be the module's. Outputs without classes may differ by 0.05
            of their range.
        input_names: Names in the file; default those of ``forward``'s arguments.
        output_names: Names in the file; default "output" (several: "output_0", ...), or the keys of a dict.
        metric: Numbers to write into the file, for example the validation metrics.

    Returns:
        What is in the file, how far it is from the module, what runs with integers, size and time.

    Raises:
        ValueError: If the inputs do not fit ``forward``, quantization has not begun or saw no input of a layer, or the
            module cannot be exported.
        RuntimeError: If the file's answers are not the module's; nothing is written then.
        ImportError: If a package is missing; the text names the extra.
    """
    path = Path(path)
    if not 0.0 <= least_agreement <= 1.0:
        raise ValueError(f"`least_agreement` must be a fraction in [0, 1], got {least_agreement!r}.")
    _check_packages()
    RUNTIMES.resolve(runtime)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(path)!r} does not exist. Make it first.")
    _check_ranges(module)
    examples = _on_cpu(as_forward_inputs(example_inputs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_fast_path():
        source = _Source.of(module, examples, dynamic_batch, dynamic_dims or {}, input_names, output_names)
        folded = _batch_norms(source.module, source.inputs)
        convert(source.module, folded)
        with _beside(path) as temporary:
            program = source.write(temporary, _metadata(module, metric))
            held = program.held(source.flat())
            report = ExportReport(
                path,
                None,
                OPSET,
                source.shapes(),
                tuple(source.output_names),
                describe_layers(module, source.module, folded, held),
                [*_limits(program), *notes_on(module, source.module, held)],
                temporary.stat().st_size,
            )
            if verify:
                calls = source.calls_of(examples, inputs)
                report = _verified(report, module, source, temporary, calls, runtime, least_agreement)
            os.replace(temporary, path)
    return report


def _limits(program: Program) -> list[str]:
    return [f"{name} is at most {size} in this file, as in the module." for name, size in program.largest.items()]


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, "onnx")


def _check_ranges(module: nn.Module) -> None:
    """Raise where a module has quantized layers and cannot be deployed with integers yet.

    Raises:
        ValueError: If no layer is quantized yet, or a range was never observed.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}
    if layers and not any(rounds(layer) or rounds_output(layer) for layer in layers.values()):
        raise ValueError(
            f"{len(layers)} layers are prepared for quantization, and no range has been used yet: quantization has not "
            "begun. Export after the epoch in which it starts, or a module without quantization."
        )
    for name, layer in layers.items():
        for which in layer.watched:
            used = rounds_output(layer) if which == "output" else rounds(layer)
            if used and int(layer.state_of(which)["batches"]) == 0:
                raise ValueError(
                    f"the {which} of {name} is quantized, and no batch was observed that gives its range. Train or "
                    f"calibrate first, or exclude {name}."
                )


def _on_cpu(inputs: ForwardInputs) -> ForwardInputs:
    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    return map_inputs(move, inputs)


def _deployed(module: nn.Module, *, rounded: bool) -> nn.Module:
    return copy_module(module, rounded=rounded).cpu().float().requires_grad_(False)


class _Flat(nn.Module):
    """A module as a function of tensors that returns tensors: names, dicts and constants are told elsewhere."""

    def __init__(self, module: nn.Module, inputs: ForwardInputs) -> None:
        super().__init__()
        self.module = module
        leaves, self._spec = tree_flatten((inputs.args, inputs.kwargs or {}))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def tensors(self, inputs: ForwardInputs) -> tuple[Tensor, ...]:
        """Return the tensors among a call's inputs."""
        leaves, spec = tree_flatten((inputs.args, inputs.kwargs or {}))
        if spec != self._spec or any(not isinstance(leaves[place], Tensor) for place in self._places):
            raise ValueError(
                f"`inputs` must have the form of `example_inputs`, got {describe_inputs(inputs)}. Several calls are a "
                "list."
            )
        return tuple(leaves[place] for place in self._places)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return tuple(tensor for _, tensor in _named(self.module(*args, **kwargs)))


def _named(output: Any) -> list[tuple[str, Tensor]]:
    """Return an output's tensors: by name where its parts have names (a dict, a dataclass, ...), else "output"."""
    named = []
    for key, part in (output_fields(output) or {"output": output}).items():
        tensors = output_tensors(part)
        suffixes = [""] if len(tensors) == 1 else [f"_{index}" for index in range(len(tensors))]
        named += [(f"{key}{suffix}", tensor) for suffix, tensor in zip(suffixes, tensors, strict=True)]
    return named


@dataclass(frozen=True)
class _Source:
    """What is exported: a copy, what its forward receives, and the names in the file."""

    module: nn.Module
    inputs: ForwardInputs
    input_names: list[str]
    output_names: list[str]
    dynamic_batch: bool
    free: dict[str, dict[int, str]]
    """Input name -> dimension -> name of each that is free."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        examples: ForwardInputs,
        dynamic_batch: bool,
        dynamic_dims: Mapping[str, Mapping[int, str]],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
    ) -> "_Source":
        copy = _deployed(module, rounded=True)
        if dynamic_batch:
            examples = _at_least_two_rows(examples)
        outputs = _named(try_forward(copy, examples, argument="`example_inputs`", advice=_ADVICE))
        if not outputs:
            raise ValueError(f"forward of {type(module).__name__} returns no tensor, so there is nothing to export.")
        returned = _names("output_names", output_names, [name for name, _ in outputs])
        names = _names("input_names", input_names, _argument_names(copy, examples))
        _check_names(names, returned)
        return cls(
            copy,
            examples,
            names,
            returned,
            dynamic_batch,
            _free_dimensions(
                dict(zip(names, _Flat(copy, examples).tensors(examples), strict=True)), dynamic_batch, dynamic_dims
            ),
        )

    def flat(self) -> _Flat:
        return _Flat(self.module, self.inputs)

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        shapes = [tuple(tensor.shape) for tensor in self.flat().tensors(self.inputs)]
        return {
            name: tuple(self.free[name].get(place, size) for place, size in enumerate(shape))
            for name, shape in zip(self.input_names, shapes, strict=True)
        }

    def calls_of(self, examples: ForwardInputs, inputs: Any) -> list[ForwardInputs]:
        """Return the calls to compare, the first of them cut to one row last."""
        given = inputs if isinstance(inputs, list) else [examples if inputs is None else inputs]
        calls = [_on_cpu(as_forward_inputs(call)) for call in given]
        if not calls:
            raise ValueError("`inputs` is an empty list: there is nothing to compare on.")
        return [*calls, first_rows(calls[0], 1)] if self.dynamic_batch else calls

    def write(self, path: Path, metadata: Mapping[str, str]) -> Program:
        """Write the file, and return the graph that is in it."""
        flat = self.flat()
        tensors = flat.tensors(self.inputs)
        flat(*tensors)  # says what cannot be exported more plainly than a traced call does
        program = export_program(flat, tensors, self.module, self.input_names, self.free)
        exported = program.to_onnx(self.module, self.input_names, self.output_names, self.free)
        _check_size(exported.model)
        exported.model.metadata_props.update(metadata)
        exported.save(path, external_data=False)
        return program


def _check_size(model: Any) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > LARGEST_FILE:
        raise ValueError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file, which holds 2 GiB.")


def _at_least_two_rows(examples: ForwardInputs) -> ForwardInputs:
    """Repeat a single row: ``torch.export`` would take a batch of 1 for a constant."""
    tensors = [leaf for leaf in tree_leaves((examples.args, examples.kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    rows = max((len(tensor) for tensor in tensors), default=2)
    try:
        return first_rows(examples, max(rows, 2))
    except ValueError as error:
        raise ValueError(
            "dimension 0 of all inputs is the batch with dynamic_batch=True, and they pass "
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
                    "must exist and hold two entries or more, since 1 would be taken for a constant."
                )
            free[name][place] = dim
    return free


def _check_names(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    twice = [name for name, count in Counter([*inputs, *outputs]).items() if count > 1]
    if twice:
        raise ValueError(
            f"{twice[0]!r} would name two of the file's inputs and outputs. Pass `input_names` or `output_names`."
        )


def _names(word: str, given: Sequence[str] | None, found: list[str]) -> list[str]:
    if given is not None and len(given) != len(found):
        raise ValueError(f"`{word}` must be {len(found)} names, for {', '.join(found)}; got {list(given)!r}.")
    return list(found if given is None else given)


def _argument_names(module: nn.Module, inputs: ForwardInputs) -> list[str]:
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


def _batch_norms(module: nn.Module, inputs: ForwardInputs) -> dict[str, str]:
    layers = {name: layer for name, layer in module.named_modules() if rounds(layer)}
    convolutions = {name for name, layer in layers.items() if isinstance(layer, CONVOLUTIONS)}
    found = read_graph(module, inputs, convolutions, layers).batch_norms
    return {name: norm for name, norm in found.items() if not rounds_output(layers[name])}  # rounded before the norm


def _metadata(module: nn.Module, metric: Mapping[str, float] | None) -> dict[str, str]:
    metadata = {"lightning_optim.version": __version__, "lightning_optim.plan": _json(plain_plan(module))}
    if metric is not None:
        metadata["lightning_optim.metric"] = _json({name: float(value) for name, value in metric.items()})
    return metadata


def _json(value: Any) -> str:
    return json.dumps(value, default=str, separators=(",", ":"))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a name in the same folder, and leave no file of that name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _verified(
    report: ExportReport,
    module: nn.Module,
    source: _Source,
    path: Path,
    calls: Sequence[ForwardInputs],
    runtime: str,
    least_agreement: float,
) -> ExportReport:
    """Run the file, compare it with the module, and return the report with what was found."""
    loaded = _load(path, runtime)
    flat = _Flat(_deployed(module, rounded=True), source.inputs)
    tensors = [flat.tensors(call) for call in calls]
    comparison = compare([flat(*call) for call in tensors], [loaded.run(call) for call in tensors])
    complaint = comparison.complaint(least_agreement)
    if complaint is not None:
        raise RuntimeError(
            f"the exported file gives other answers in {runtime} than {type(module).__name__}: {complaint}. Nothing "
            "was written. Compare on more rows (`inputs=`), leave sensitive layers float (`exclude=`), or lower "
            "`least_agreement`."
        )
    float_bytes, latency = None, None
    if any(isinstance(layer, QuantizedLayer) for layer in module.modules()):
        with TemporaryDirectory() as folder:
            twin = replace(source, module=_deployed(module, rounded=False))
            convert(twin.module, {})
            file = Path(folder) / "float.onnx"
            twin.write(file, {})
            float_bytes = file.stat().st_size
            latency = compare_latency(loaded, _load(file, runtime), tensors[0])
    note = getattr(loaded, "note", "")  # of an engine that has something to say
    report = replace(report, notes=[*report.notes, note] if note else report.notes)
    return _with_figures(report, runtime, comparison, loaded.kernels(), float_bytes, latency)


def _load(path: Path, runtime: str) -> Runtime:
    try:
        return RUNTIMES.resolve(runtime)(path)
    except ImportError:
        raise
    except Exception as error:  # engines raise classes of their own; all of them mean the same here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = " ".join(lines)[-600:] or type(error).__name__
        raise RuntimeError(
            f"{runtime} cannot load the exported file, so nothing was written: {words}\nWrite it for another engine "
            "with `runtime=`, or without verification with verify=False."
        ) from error


def _with_figures(
    report: ExportReport,
    runtime: str,
    comparison: Comparison,
    kernels: Kernels,
    float_bytes: int | None,
    latency: LatencyResult | None,
) -> ExportReport:
    return replace(
        report,
        runtime=runtime,
        float_bytes=float_bytes,
        latency=latency,
        max_difference=comparison.max_difference,
        mean_difference=comparison.mean_difference,
        agreement=comparison.agreement,
        rows=comparison.rows,
        **vars(kernels),
    )
