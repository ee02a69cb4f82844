"""Exports a module, float or quantized, to an ONNX file that is written only if its answers are the module's."""

import importlib.util
import json
import zlib
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lightning_optim._upstream import BatchNorm
from lightning_optim._version import __version__
from lightning_optim.checkpoint import plain_plan
from lightning_optim.export.external import DATA_SUFFIX, holds_data, note_on_data, stored_bytes
from lightning_optim.export.integer import convert, rounds, rounds_output
from lightning_optim.export.latency import compare_latency
from lightning_optim.export.mixed import (
    KEEP_FLOAT,
    against_rounded,
    fastest,
    leave_float,
    notes_on_float,
    small_layers,
)
from lightning_optim.export.program import Program
from lightning_optim.export.report import ExportReport, Mix, describe_layers, notes_on
from lightning_optim.export.runtimes import RUNTIMES, Runtime, load_runtime, missing_package
from lightning_optim.export.session import as_fed
from lightning_optim.export.source import Flat, Source, deployed
from lightning_optim.export.targets import Target, find_target_form
from lightning_optim.export.verify import compare
from lightning_optim.files import pair_written_aside
from lightning_optim.measure.latency import LatencyResult
from lightning_optim.modules import CONVOLVING, TRANSPOSED, without_fast_path
from lightning_optim.quantization.graph import read_graph
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows, map_inputs

__all__ = ["export_onnx"]


def export_onnx(
    module: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    verify: bool = True,
    target: str = "onnxruntime",
    runtime: str | None = None,
    inputs: Any = None,
    least_agreement: float = 0.99,
    keep_float: str = "small",
    batch_sizes: Sequence[int] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metric: Mapping[str, float] | None = None,
) -> ExportReport:
    """Export a module to ONNX: int8 where it is quantized, float32 elsewhere.

    Weights are stored as int8 with the integers and scales of fake quantization, activations are rounded to uint8 by
    QuantizeLinear and DequantizeLinear, and BatchNorm is folded into the scales of the convolution before it. Engines
    run such layers with integers. Groups of 16 to 256 whose inputs are float are multiplied as they are stored, with 4
    bits and fewer two in a byte, as tables are; other weights of fewer than 8 bits are stored as int8, and other groups
    computed in float. Attention's own matrix products, norms and additions stay float.

    The file replaces the one at ``path`` only after it ran in the engine and gave the module's answers. Weights of more
    than 1.5 GiB are written to a second file beside it, ``model.onnx.data`` for ``model.onnx``, which it needs under
    that name.

    Args:
        module: A LightningModule or any module, on any device, in any precision and mode. A float32 copy on the CPU, in
            eval mode, is exported; ``module`` is not changed.
        path: The file to write; its folder exists.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments of ``forward``.
        dynamic_batch: Whether dimension 0 of all inputs is free in the file; otherwise the shapes are the examples'.
        dynamic_dims: Other free dimensions: input name -> dimension -> its name; dimensions of one name have one size.
            For a text model ``{"input_ids": {1: "length"}, "attention_mask": {1: "length"}}``. Limits set by the
            module's code (a table of 512 positions) are detected and reported in the notes.
        verify: Whether the file is run and compared.
        target: The engine that the file is written for. "onnxruntime": OpenVINO reads its form too. "openvino": the
            same, but inputs with ``activation_ranges="dynamic"`` are not rounded, which is faster there. "tensorrt":
            int8 activations without zero points, float biases, opset 19. It takes a module quantized with
            ``activation_ranges="symmetric"``, or a float one, and computes all quantized layers with integers
            (``keep_float="none"``). TensorRT itself is not run: the file is checked by rules, and verified in
            ``runtime``.
        runtime: "onnxruntime" or "openvino": the engine that runs the file, on one thread of the CPU. Default: the
            target, or "onnxruntime" for "tensorrt".
        inputs: Inputs to compare on, like ``example_inputs``, or a list of such; default the example inputs. Some
            hundred rows of held-out data are better.
        least_agreement: Fraction of rows whose class must be the module's. Outputs without classes may differ by 0.05
            of their range.
        keep_float: Which quantized layers the file computes in float, with their integer weights multiplied out when it
            is loaded, and inputs that are not rounded. "small": those that are too small to gain from integers, by
            their shapes: convolutions if all have at most 2,304 weights, and then all layers if no matrix has 16,384.
            "none". "auto": groups of layers are measured in ``runtime``, which takes an export for each, and the
            fastest file is kept; it may differ from one processor to the next. The file is verified against the module
            with these inputs not rounded, and the report says how it agrees with the module itself.
        batch_sizes: Rows of the calls that "auto" measures; default those of ``example_inputs``.
        input_names: Names in the file; default those of ``forward``'s arguments.
        output_names: Names in the file; default "output" (several: "output_0", ...), or the keys of a dict.
        metric: Numbers to write into the file, for example the validation metrics.

    Returns:
        The contents of the file, its difference to the module, its integer kernels, size and latency.

    Raises:
        ValueError: If the inputs do not fit ``forward``, quantization has not begun or observed no input of a layer, or
            the module cannot be exported.
        RuntimeError: If the file's answers are not the module's; nothing is written then.
        ImportError: If a package is missing; the message names the extra.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     report = export_onnx(net, Path(folder, "net.onnx"), torch.zeros(1, 8), inputs=torch.randn(256, 8))
        >>> report.agreement  # doctest: +SKIP
        1.0
    """
    path = Path(path)
    if not 0.0 <= least_agreement <= 1.0:
        raise ValueError(f"`least_agreement` must be a fraction in [0, 1], got {least_agreement!r}.")
    _check_packages()
    form = find_target_form(target)
    runtime = form.runtime if runtime is None else runtime
    RUNTIMES.resolve(runtime)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(path)!r} does not exist. Create it first.")
    _check_ranges(module)
    kept_float = form.check(module, keep_float)
    examples = map_inputs(as_fed, as_forward_inputs(example_inputs))
    batches = _batches(examples, keep_float, batch_sizes, dynamic_batch)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_fast_path():
        source = Source.of(module, examples, dynamic_batch, dynamic_dims or {}, input_names, output_names)
        source = replace(source, opset=form.opset)
        kept, mixes = _kept_float(module, source, form, kept_float, batches, runtime)
        reference = deployed(module, rounded=True)
        leave_float(reference, kept)
        notes = form.prepare(reference)
        source = replace(source, module=deployed(reference, rounded=True))
        with pair_written_aside(path, DATA_SUFFIX, is_pair=holds_data) as temporary:
            folded, program = _write(source, form, temporary, _metadata(module, metric))
            form.check_file(temporary)
            held = program.held(source.flat())
            limits = [
                f"{name} is at most {size} in this file, as in the module." for name, size in program.largest.items()
            ]
            report = ExportReport(
                path,
                None,
                form.opset,
                source.shapes(),
                tuple(source.output_names),
                describe_layers(reference, source.module, folded, held),
                [
                    *limits,
                    *notes,
                    *notes_on(reference, source.module, held),
                    *notes_on_float(kept, kept_float),
                    *note_on_data(temporary, path),
                ],
                stored_bytes(temporary),
                kept_float=kept,
                mixes=mixes,
                target=target,
            )
            if verify:
                calls = source.calls_of(examples, inputs)
                report = _verified(report, module, reference, source, form, temporary, calls, runtime, least_agreement)
    return report


def _batches(
    examples: ForwardInputs, keep_float: str, batch_sizes: Sequence[int] | None, dynamic_batch: bool
) -> list[ForwardInputs]:
    """Return the calls that are timed to choose what stays float."""
    if keep_float not in KEEP_FLOAT:
        raise ValueError(f"`keep_float` must be one of {', '.join(KEEP_FLOAT)}, got {keep_float!r}.")
    if batch_sizes is None:
        return [examples]
    if keep_float != "auto":
        raise ValueError(f'`batch_sizes` are timed with keep_float="auto"; got keep_float={keep_float!r}.')
    if not dynamic_batch:
        raise ValueError("`batch_sizes` need a file whose batch is free; with dynamic_batch=False leave them out.")
    sizes = list(batch_sizes)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"`batch_sizes` must be whole numbers >= 1, got {batch_sizes!r}.")
    return [first_rows(examples, size) for size in sizes]


def _kept_float(
    module: nn.Module,
    source: Source,
    form: Target,
    keep_float: str,
    batches: Sequence[ForwardInputs],
    runtime: str,
) -> tuple[tuple[str, ...], tuple[Mix, ...]]:
    """Return the quantized layers that the file computes in float, and what was timed to find them."""
    if keep_float != "auto":
        return (small_layers(source.module) if keep_float == "small" else ()), ()

    def write(layers: Collection[str], file: Path) -> None:
        mixed = deployed(module, rounded=True)
        leave_float(mixed, layers)
        form.prepare(mixed)
        _write(replace(source, module=mixed), form, file, {})

    with TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        _write(replace(source, module=deployed(module, rounded=False)), form, file, {})
        tensors = [source.flat().tensors(batch) for batch in batches]
        best, mixes = fastest(source.module, write, file, tensors, runtime)
    return best.layers, mixes


def _write(source: Source, form: Target, file: Path, metadata: Mapping[str, str]) -> tuple[dict[str, str], Program]:
    """Convert a copy to integers and write it; return the BatchNorms folded into convolutions, and the graph."""
    folded, returned = _graph_facts(source.module, source.inputs)
    convert(source.module, folded, returned)
    form.finish(source.module)
    return folded, source.write(file, metadata)


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, "onnx")


def _check_ranges(module: nn.Module) -> None:
    """Check that the quantized layers of a module can be deployed with integers.

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
            used = rounds(layer) if which in layer.operands else rounds_output(layer)
            if used and int(layer.state_of(which)["batches"]) == 0:
                raise ValueError(
                    f"the {which} of {name} is quantized, and no batch was observed for its range. Train or calibrate "
                    f"first, or exclude {name}."
                )


def _graph_facts(module: nn.Module, inputs: ForwardInputs) -> tuple[dict[str, str], frozenset[str]]:
    """Return the BatchNorms that are folded, by the layer before them, and the convolutions that are only returned."""
    layers = {name: layer for name, layer in module.named_modules() if rounds(layer)}
    if not layers or not any(isinstance(layer, (BatchNorm, *TRANSPOSED)) for layer in module.modules()):
        return {}, frozenset()  # reading the graph of a large model takes as long as exporting it
    products = {name for name, layer in layers.items() if isinstance(layer, (*CONVOLVING, nn.Linear))}
    facts = read_graph(module, inputs, products, layers)
    # An output that is rounded before the BatchNorm does not fold.
    followers = {name: norm for name, norm in facts.batch_norms.items() if not rounds_output(layers[name])}
    return followers, facts.returned


def _metadata(module: nn.Module, metric: Mapping[str, float] | None) -> dict[str, str]:
    # A plan repeats itself layer by layer: as plain JSON it was a fifth of a small file.
    plan = b64encode(zlib.compress(_json(plain_plan(module)).encode(), 9)).decode()
    metadata = {"lightning_optim.version": __version__, "lightning_optim.plan": plan}
    if metric is not None:
        metadata["lightning_optim.metric"] = _json({name: float(value) for name, value in metric.items()})
    return metadata


def _json(value: Any) -> str:
    return json.dumps(value, default=str, separators=(",", ":"))


def _verified(
    report: ExportReport,
    module: nn.Module,
    reference: nn.Module,
    source: Source,
    form: Target,
    path: Path,
    calls: Sequence[ForwardInputs],
    runtime: str,
    least_agreement: float,
) -> ExportReport:
    """Run the file, compare it with the module, and return the report with the results."""
    loaded = load_runtime(path, runtime)
    flat = Flat(reference, source.inputs)
    tensors = [flat.tensors(call) for call in calls]
    answers = [loaded.run(call) for call in tensors]
    comparison = compare([flat(*call) for call in tensors], answers)
    complaint = comparison.complaint(least_agreement)
    if complaint is not None:
        raise RuntimeError(
            f"the exported file gives other answers in {runtime} than {type(module).__name__}: {complaint}. Nothing "
            "was written. Compare on more rows (`inputs=`), keep sensitive layers float (`exclude=`), or lower "
            "`least_agreement`."
        )
    notes = [*report.notes, *filter(None, [getattr(loaded, "note", "") if form.runs_here else ""])]
    if report.kept_float:
        rounded = Flat(deployed(module, rounded=True), source.inputs)
        notes.append(against_rounded(compare([rounded(*call) for call in tensors], answers)))
    float_bytes, latency = None, None
    if any(isinstance(layer, QuantizedLayer) for layer in module.modules()):
        float_bytes, latency = _against_float(module, source, form, loaded, runtime, tensors[0])
    return replace(
        report,
        runtime=runtime,
        notes=notes,
        float_bytes=float_bytes,
        latency=latency,
        max_difference=comparison.max_difference,
        mean_difference=comparison.mean_difference,
        agreement=comparison.agreement,
        rows=comparison.rows,
        **vars(form.kernels(path, loaded)),
    )


def _against_float(
    module: nn.Module, source: Source, form: Target, loaded: Runtime, runtime: str, tensors: Sequence[torch.Tensor]
) -> tuple[int, LatencyResult | None]:
    """Return the size of the float32 export of the same module, and the latency of the loaded file against it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        _write(replace(source, module=deployed(module, rounded=False)), form, file, {})
        latency = compare_latency(loaded, load_runtime(file, runtime), tensors) if form.runs_here else None
        return stored_bytes(file), latency
