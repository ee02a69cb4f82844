"""Compares models as they are deployed, with one of them as the reference."""

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import compress

import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from lightning_optim._upstream import tree_leaves
from lightning_optim.checks import check_count, check_mapping, check_names
from lightning_optim.export.latency import runtime_latencies
from lightning_optim.export.onnx import export_onnx
from lightning_optim.export.report import ExportReport
from lightning_optim.export.runtimes import RUNTIMES, missing_package
from lightning_optim.export.session import ExportedModel, as_fed
from lightning_optim.functional.score import Terms, checked_weights, performance_score
from lightning_optim.measure.latency import LatencyResult, latencies
from lightning_optim.measure.macs import count_macs
from lightning_optim.measure.size import SIZES
from lightning_optim.modules import copy_module
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.report.columns import Row
from lightning_optim.report.document import environment
from lightning_optim.report.layers import layer_facts
from lightning_optim.report.result import RESERVED, ComparisonReport
from lightning_optim.target import ForwardInputs, as_forward_inputs, first_rows, move_inputs

__all__ = ["ComparisonReport", "compare"]

EXPORTERS = ("onnx", "onnxscript")

EXPORT_OPTIONS = [
    name for name, word in inspect.signature(export_onnx).parameters.items() if word.kind is word.KEYWORD_ONLY
]
"""Of :func:`export_onnx`."""

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    reference: str | None = None,
    batch_size: int | None = 32,
    engines: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    size: str | Callable[[nn.Module], float] = "parameters",
    export: Mapping[str, Any] | bool | None = None,
    accuracy: str = "accuracy",
    controls: Iterable[str] = (),
    samples: int | None = None,
    progress_bar: bool = True,
    times: bool = True,
) -> ComparisonReport:
    """Measure models side by side: size, operations, latency in each engine, accuracy, and the score P.

    Each model is exported to ONNX, verified, and timed as it is deployed; if an export fails, the report's notes give
    the reason. Times are ratios: calls of all models alternate, on one thread, in the same eight rounds, and every
    model moves to another place in memory in each round. Everything is measured on copies: weights, modes and the
    random numbers are left as they were. Costs one more copy of every model, its file loaded in every engine, up to
    eight more copies while it is timed (fewer if memory is short), and about a second per model, engine and batch size.

    Args:
        models: Name -> model, all on one device and with the same inputs.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments of ``forward``.
        evaluate: Function of a model in eval mode that returns its held-out accuracy, or several metrics by name. It is
            called without gradients.
        reference: Name of the model that ratios refer to; default the first.
        batch_size: Rows of the second, larger call; one row is timed too. None uses the inputs as they are, for a
            single call (ragged inputs).
        engines: Any of "torch", "onnxruntime", "openvino"; None: torch and all that are installed. The inference time
            in ``P`` is that of the first; ``P`` with every engine is listed too.
        weights: Weights of the terms of P, as for :class:`~lightning_optim.PerformanceScore`. Training time is not
            measured here, so its weight must be 0.
        size: S in P: "parameters", "nonzero", "bits", or a function of the module.
        export: Options of :func:`~lightning_optim.export_onnx`, such as ``dynamic_dims`` or held-out ``inputs`` for
            the verification; False exports nothing.
        accuracy: Name of the metric that is A in P, in [0, 1].
        controls: Names of models that the others must beat (from scratch, pruned at random); marked in figures.
        samples: Number of held-out samples behind each accuracy. With it the verdict says whether two accuracies in
            [0, 1] are told apart.
        progress_bar: Whether to show a progress bar (on rank zero).
        times: Whether calls are timed. Without times there is no P unless ``weights`` gives the inference time 0.

    Returns:
        A row per model; ``str(report)`` is a table.

    Raises:
        TypeError: If ``models`` is not a mapping of names to modules, or ``controls`` not a list of names.
        ValueError: If a name or an export option is unknown, the reference has no size, the batch size is invalid, the
            models are on different devices, A is not in [0, 1], or ``samples`` are given without ``evaluate``.
        ImportError: If a named engine is not installed; the message names the extra.

    Examples:
        >>> big, small = nn.Linear(8, 64), nn.Linear(8, 8)
        >>> report = compare({"big": big, "small": small}, torch.zeros(1, 8), export=False, progress_bar=False)
        >>> report["small"]["parameters"]
        72
    """
    check_mapping("models", models, "name -> nn.Module")
    models, controls = dict(models), _checked_controls(controls)
    reference = _checked_names(models, reference, controls)
    for name, count in (("batch_size", batch_size), ("samples", samples)):
        if count is not None:
            check_count(name, count)
    if samples is not None and evaluate is None:
        raise ValueError(
            "`samples` is the number behind the accuracy that `evaluate` returns, and there is no `evaluate`."
        )
    bench = _Bench(
        as_forward_inputs(example_inputs),
        batch_size,
        _checked_engines(engines, export),
        _checked_export(export),
        evaluate,
        accuracy,
        _checked_weights(weights),
        _checked_size(size, reference, models[reference]),
        _device(models),
    )
    order = [reference, *(name for name in models if name != reference)]
    hidden = not progress_bar or getattr(rank_zero_only, "rank", 0) != 0
    rows: dict[str, Row] = {}
    with TemporaryDirectory() as folder, isolate_rng(), torch.no_grad():
        bench.folder = Path(folder)
        for name in track(order, "comparing", disable=hidden):
            kind = "dense" if name == reference else "control" if name in controls else "compressed"
            rows[name] = {"name": name, "kind": kind, **bench.measure(name, models[name])}
        timed = track(bench.engines if times else [], "timing", disable=hidden)
        for name, row in bench.times_and_scores({name: rows[name].get(accuracy) for name in order}, timed).items():
            rows[name] |= row
        bench.subjects.clear()  # an open file cannot be deleted on every system
    return ComparisonReport(
        reference=reference,
        engines=list(bench.engines),
        batch_size=batch_size,
        accuracy=accuracy,
        metrics=bench.metrics,
        weights=bench.weights,
        rows=[rows[name] for name in models],
        layers={name: layer_facts(model) for name, model in models.items()},
        notes=bench.notes,
        environment=environment(),
        samples=samples,
    )


# Checks of the arguments.


def _checked_names(models: Mapping[str, nn.Module], reference: str | None, controls: set[str]) -> str:
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f"`models` must be name -> nn.Module, got the name {name!r}. Name each with a string.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"`models` must be name -> nn.Module, got {type(model).__name__} for {name!r}.")
    if not models:
        raise ValueError("`models` is empty: give at least one model by name.")
    named = {"controls": controls, "reference": {next(iter(models)) if reference is None else reference}}
    for word, names in named.items():
        unknown = sorted(names - models.keys())
        if unknown:
            raise ValueError(
                f"`{word}` names {unknown[0]!r}, which is not a model; the models are {', '.join(models)}."
            )
    return named["reference"].pop()


def _checked_controls(controls: Iterable[str]) -> set[str]:
    """Return the names of the controls."""
    names = None if isinstance(controls, (str, bytes)) or not isinstance(controls, Iterable) else list(controls)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`controls` must be a list of names of models, got {controls!r}. Put each name in a list.")
    return set(names)


def _checked_size(
    size: str | Callable[[nn.Module], float], reference: str, model: nn.Module
) -> Callable[[nn.Module], float]:
    """Return the function for S; the reference's S divides those of the others, so it must be positive."""
    size_of = SIZES.resolve(size)
    found = size_of(model)
    if not found > 0:
        raise ValueError(
            f"the size of the reference must be above 0, since other sizes are divided by it, got {found:g} for "
            f"{reference!r}. Choose a `reference` that has parameters."
        )
    return size_of


def _checked_engines(engines: Sequence[str] | None, export: Mapping[str, Any] | bool | None) -> list[str]:
    """Return the engines to use; named engines must be installed.

    Raises:
        ValueError: If a name is unknown, or an engine runs files and the export is turned off.
        ImportError: If a package is missing.
    """
    if isinstance(engines, str):
        raise TypeError(f"`engines` must be a list of names, got {engines!r}. Put it in a list.")
    if engines is None:
        can_export = export is not False and all(map(_is_installed, EXPORTERS))
        return ["torch", *(name for name in RUNTIMES if can_export and _is_installed(name))]
    for name in engines:
        if name != "torch" and name not in RUNTIMES:
            raise ValueError(f"unknown engine {name!r}; known: torch, {', '.join(sorted(RUNTIMES))}.")
        if name != "torch" and export is False:
            raise ValueError(f"{name} runs exported files, and export=False writes none. Remove one of the two.")
        for package in () if name == "torch" else (name, *EXPORTERS):
            if not _is_installed(package):
                raise missing_package(package, getattr(RUNTIMES[name], "extra", name) if package == name else "onnx")
    if not engines:
        raise ValueError("`engines` is empty: name at least one, or pass None for all that are installed.")
    return list(dict.fromkeys(engines))


def _checked_export(export: Mapping[str, Any] | bool | None) -> dict[str, Any] | None:
    """Return the options of the export; None without an export."""
    if not (export is None or isinstance(export, (bool, Mapping))):
        raise TypeError(f"`export` must be a mapping of options of export_onnx, a bool or None, got {export!r}.")
    if isinstance(export, Mapping):
        check_names("export", export, EXPORT_OPTIONS)
    if export is False or (not isinstance(export, Mapping) and not all(map(_is_installed, EXPORTERS))):
        return None
    options: dict[str, Any] = {} if isinstance(export, bool) or export is None else dict(export)
    installed = [name for name in RUNTIMES if _is_installed(name)]
    return {**({"runtime": installed[0]} if installed else {"verify": False}), **options}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    checked = checked_weights(weights)
    if checked["train_time"]:
        raise ValueError(
            f"`weights` gives train_time {checked['train_time']:g}, and compare does not train. Remove it, or use "
            "PerformanceScore, whose P includes the training time."
        )
    return checked


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    found = {name: next((p.device for p in model.parameters()), None) for name, model in models.items()}
    devices = {device for device in found.values() if device is not None}
    if len(devices) > 1:
        words = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"times are compared on one device, but the models are on several: {words}. Move them first.")
    return devices.pop() if devices else torch.device("cpu")


# Measuring.


@dataclass
class _Subject:
    """A measured model that waits to be timed together with the others."""

    size: float
    module: nn.Module
    files: dict[str, ExportedModel]


@dataclass
class _Bench:
    """Measures one model after the other, the reference first, then times them all together."""

    inputs: ForwardInputs
    batch_size: int | None
    engines: list[str]
    options: Mapping[str, Any] | None
    evaluate: Evaluate | None
    accuracy: str
    weights: dict[str, float]
    size: Callable[[nn.Module], float]
    device: torch.device
    folder: Path = Path()

    def __post_init__(self) -> None:
        self.inputs = move_inputs(self.inputs, self.device)
        self.batches = {"": self.inputs}
        if self.batch_size is not None:
            self.batches = {"": first_rows(self.inputs, 1), "_batch": first_rows(self.inputs, self.batch_size)}
        self.notes: list[str] = []
        self.metrics: list[str] = []
        self.subjects: dict[str, _Subject] = {}

    def measure(self, name: str, model: nn.Module) -> Row:
        """Return a model's figures without its times; the first model is the reference."""
        metrics = self._metrics(name, model)
        plain = copy_module(model, rounded=False)  # rounding in PyTorch takes time, deployed integers do not
        files, exported = self._export(name, model)
        self.subjects[name] = subject = _Subject(self.size(model), plain, files)
        if any(isinstance(layer, QuantizedLayer) for layer in model.modules()) and "torch" in self.engines:
            self._note("In PyTorch quantized layers are timed in float: integers run only in the exported files.")
        return {
            **metrics,
            **_counts(model),
            "size_ratio": subject.size / self._first().size,
            **exported,
            "macs": count_macs(plain, self.batches[""]),
        }

    def times_and_scores(self, accuracies: Mapping[str, float | None], engines: Iterable[str]) -> dict[str, Row]:
        """Return times and P of every model; all are timed alternately, in the same rounds."""
        times: dict[str, dict[str, LatencyResult]] = {name: {} for name in self.subjects}
        for engine in engines:
            for key, of_models in self._times(engine).items():
                for name, time in of_models.items():
                    times[name][key] = time
        return {
            name: {
                **{f"{key}_{word}": value for key, time in found.items() for word, value in time_facts(time).items()},
                **self._scored(self.subjects[name], found, accuracies[name]),
            }
            for name, found in times.items()
        }

    def _first(self) -> _Subject:
        return next(iter(self.subjects.values()))

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _metrics(self, name: str, model: nn.Module) -> dict[str, float]:
        if self.evaluate is None:
            if self.weights["accuracy"]:
                self._note("P includes accuracy: pass `evaluate`, or weights without accuracy.")
            return {}
        found = self.evaluate(copy_module(model))
        metrics = {k: float(v) for k, v in (found if isinstance(found, Mapping) else {self.accuracy: found}).items()}
        taken = sorted(RESERVED & metrics.keys())
        if taken:
            raise ValueError(f"`evaluate` returned {taken[0]!r}, which is a column of the report. Rename it.")
        self._check_accuracy(name, metrics)
        self.metrics += [metric for metric in metrics if metric not in self.metrics]
        return metrics

    def _check_accuracy(self, name: str, metrics: Mapping[str, float]) -> None:
        if not self.weights["accuracy"]:
            return
        if self.accuracy not in metrics:
            raise ValueError(
                f"`evaluate` returned {', '.join(metrics) or 'nothing'}, but P needs the metric "
                f"{self.accuracy!r}. Name one of them with `accuracy=`."
            )
        if not 0.0 <= metrics[self.accuracy] <= 1.0:
            raise ValueError(
                f"{self.accuracy} of {name} is {metrics[self.accuracy]:g}, but an accuracy is in [0, 1]. Divide "
                "percent by 100; for another metric pass weights without accuracy."
            )

    def _export(self, name: str, model: nn.Module) -> tuple[dict[str, ExportedModel], Row]:
        """Export, verify and load a model; if that fails, its row has no file and a note gives the reason."""
        if self.options is None:
            self._note("No model was exported, so there are no times in inference engines.")
            return {}, {}
        path = self.folder / f"{len(list(self.folder.iterdir()))}.onnx"
        try:
            report = export_onnx(model, path, self.inputs, **self.options)
        except (ValueError, RuntimeError) as error:
            others = "" if self.subjects else " The others cannot be compared in engines either."
            self._note(f"{name} was not exported, so it has no file and only PyTorch's times: {error}{others}")
            return {}, {}
        return self._load(name, path), _file_facts(report)

    def _load(self, name: str, path: Path) -> dict[str, ExportedModel]:
        """Load a file in each engine; if one fails, a note gives the reason."""
        files: dict[str, ExportedModel] = {}
        for engine in self.engines:
            try:
                files |= {} if engine == "torch" else {engine: ExportedModel(path, engine)}
            except RuntimeError as error:
                self._note(f"{name} has no times in {engine}, which cannot load its file: {error}")
        return files

    def _times(self, engine: str) -> dict[str, dict[str, LatencyResult]]:
        """Return the times in one engine, by batch and model; none if it has no file of the reference."""
        batches = {engine + suffix: inputs for suffix, inputs in self.batches.items()}
        if engine == "torch":
            names = list(self.subjects)
            modules = [subject.module for subject in self.subjects.values()]
            found = latencies(modules, list(batches.values()), seconds=0.5, least=40, most=200)
        else:
            batches = {key: inputs for key, inputs in batches.items() if self._fits_file(inputs)}
            names = [name for name, subject in self.subjects.items() if engine in subject.files]
            if engine not in self._first().files or not batches:
                return {}
            runtimes = [self.subjects[name].files[engine].runtime for name in names]
            found = runtime_latencies(runtimes, [_tensors(inputs) for inputs in batches.values()])
        return {
            key: dict(zip(names, [_against_itself(row[0]), *row[1:]], strict=True))
            for key, row in zip(batches, found, strict=True)
        }

    def _fits_file(self, inputs: ForwardInputs) -> bool:
        """Whether a file accepts a batch; one with a fixed batch accepts the example's."""
        fixed = self.options is not None and self.options.get("dynamic_batch") is False
        return not fixed or [x.shape for x in _tensors(inputs)] == [x.shape for x in _tensors(self.inputs)]

    def _scored(self, subject: _Subject, times: Mapping[str, LatencyResult], accuracy: float | None) -> Row:
        """Return P with the time of each engine, and that of the first as "P"."""
        scores = {}
        for engine in self.engines:
            time = times.get(engine)
            terms = Terms(
                size=subject.size / self._first().size,
                inference_time=None if time is None else time.ratio,
                error=None if accuracy is None else 1 - accuracy,
            )
            score = performance_score(terms, self.weights)
            scores[f"{engine}_P"] = score if score == score else None  # NaN: a term with weight is missing
        return {"P": scores[f"{self.engines[0]}_P"], **scores}


def _counts(model: nn.Module) -> Row:
    counts = {name: SIZES[name](model) for name in ("parameters", "nonzero", "bits")}
    return {
        **counts,
        "parameters": int(counts["parameters"]),
        "nonzero": int(counts["nonzero"]),
        "bytes": _bytes(model),
    }


def _bytes(model: nn.Module) -> int:
    """Return the bytes of the compressed ``state_dict`` file."""
    file = BytesIO()
    torch.save(model.state_dict(), file)
    return len(compress(file.getvalue(), level=6))


def _file_facts(report: ExportReport) -> Row:
    return {
        "onnx_bytes": report.file_bytes,
        "onnx_agreement": report.agreement,
        "integer_kernels": _sum(report.integer_convolutions, report.integer_matmuls),
        "kernels": _sum(report.convolutions, report.matmuls),
    }


def _sum(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _against_itself(time: LatencyResult) -> LatencyResult:
    """Return the reference's time with the ratio 1 instead of its noise, and a range that includes 1."""
    low, high = (1.0 if bound is None else bound for bound in (time.low, time.high))
    return replace(time, ratio=1.0, low=min(low, 1.0), high=max(high, 1.0))


def time_facts(time: LatencyResult) -> Row:
    """Return a measured time as plain values."""
    return {
        "ms": time.milliseconds,
        "ratio": time.ratio,
        "low": time.low,
        "high": time.high,
        "differs": time.differs,
    }


def _tensors(inputs: ForwardInputs) -> list[Tensor]:
    return [as_fed(leaf) for leaf in tree_leaves((inputs.args, inputs.kwargs or {})) if isinstance(leaf, Tensor)]
