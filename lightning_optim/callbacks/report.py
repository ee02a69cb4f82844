"""ReportCallback: a page with the targets and results of a run."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optim.callbacks.base import CompressionCallback, compressions
from lightning_optim.callbacks.logged import MetricsSince
from lightning_optim.checks import check_flags, check_folder, check_name, check_path
from lightning_optim.distillation.module import DistillationModule
from lightning_optim.export.runtimes import missing_package
from lightning_optim.measure.size import SIZES
from lightning_optim.registry import Registry
from lightning_optim.report.columns import Column, Row
from lightning_optim.report.document import Card, Report, Section, as_json
from lightning_optim.report.layers import against_reference, layer_facts, layer_rows
from lightning_optim.report.styles import styles_of
from lightning_optim.target import find_target
from lightning_optim.techniques import TECHNIQUES

__all__ = ["ReportCallback"]

_log = logging.getLogger(__name__)

START, END = "at fit start", "at fit end"
UNBEGUN = "off"
COUNTED = ("parameters", "nonzero", "bits")

COLUMNS = [
    Column("name", "model"),
    Column("parameters", "parameters", "{:,.0f}"),
    Column("nonzero", "non-zero", "{:,.0f}"),
    Column("bits", "bits / 32", "{:,.0f}"),
]
NOTE = (
    "The model at the end of the run, not the best checkpoint. Zeros make a compressed file smaller and dense kernels "
    "no faster; what the deployed model gains is measured by lightning_optim.compare."
)


class ReportCallback(pl.Callback):
    """Write ``report.html``, ``report.md`` and ``report.json`` at the end of a fit, and pass them to the loggers.

    The report shows the target and the achieved value of each compression callback, each layer compared with the model
    at fit start (width, zeros, bits), P, its terms and the other metrics over the epochs, and when the events happened.
    Works with any callbacks, in any order, and alone.

    Args:
        dirpath: The folder; files of the same names are replaced.
        title: Title of the report; default the class of the module.
        log: Whether table and figures also go to the Trainer's loggers (TensorBoard, Weights & Biases, MLflow; other
            loggers cannot show them).

    State: the metrics of every epoch, the events and the facts at the first fit start, so the report of a resumed run
    covers the whole run. An epoch has only the metrics that it logged; values that a compression callback logged at
    its last event describe the model until the next one. Rank zero writes; if a strategy shards the model, all ranks
    count. Nothing is written by ``fast_dev_run`` or after an exception. The state key holds the folder, so several
    instances with different folders can run together; a run that is resumed into another folder takes over the state of
    the file's one report (Lightning warns that the file's callback is missing).

    A logger that raises when it receives table and figures does not end the fit: the report is already written, and a
    warning names the logger and its error.

    Costs a pass over the weights at the start and at the end; in a training step it only checks whether an event
    happened.

    Raises:
        ImportError: In ``setup``, if matplotlib is missing; the message names the extra.
        OSError: In ``setup`` of a fit, if ``dirpath`` is not writable: it is a file or below one (NotADirectoryError),
            or the system refuses.

    Examples:
        >>> from lightning_optim import Recipe
        >>> recipe = Recipe(channel_pruning=0.5, quantization=True)
        >>> callbacks = [*recipe.callbacks(), ReportCallback("reports/run", title="Half the channels, 8 bits")]
    """

    def __init__(self, dirpath: str | Path, *, title: str | None = None, log: bool = True) -> None:
        super().__init__()
        check_path("dirpath", dirpath)
        check_name("title", title, "Digits, pruned")
        check_flags(log=log)
        self.dirpath = Path(dirpath)
        self.title = title
        self.log_to_loggers = log
        self._fitted: tuple[Any, Any] | None = None
        self._restored = False
        self._trainer: Any = None
        self._forget()

    def _forget(self) -> None:
        """Begin a new run."""
        self._epochs: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._seen: dict[str, str] = {}
        self._last: dict[str, float] = {}
        self._start: dict[str, Any] = {}
        self._logged = MetricsSince()
        self._open = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check early what the end of the fit needs."""
        if stage != "fit":
            return
        if find_spec("matplotlib") is None:
            raise missing_package("matplotlib", "report")
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            check_folder("dirpath", self.dirpath)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the model as it is, unless this fit continues a run."""
        goes_on = self._fitted is not None and (self._fitted[0]() is trainer and self._fitted[1]() is pl_module)
        if not self._restored and not goes_on:
            self._forget()
            self._start = _facts(pl_module)
        self._fitted = (weakref.ref(trainer), weakref.ref(pl_module))
        self._trainer = weakref.ref(trainer)

    # What is collected.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record events of the previous batch: now all callbacks have logged theirs, whatever their order."""
        self._note_events(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the previous epoch with what later callbacks logged at its end, and begin a new one."""
        self._close_epoch(trainer)
        self._logged.begin(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of the epoch."""
        self._open = True
        if not self._epochs or self._epochs[-1]["epoch"] != trainer.current_epoch:
            self._epochs.append({"epoch": trainer.current_epoch})
        self._refresh(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the last epoch."""
        self._close_epoch(trainer)

    def _close_epoch(self, trainer: pl.Trainer) -> None:
        self._refresh(trainer)
        self._open = False

    def _refresh(self, trainer: pl.Trainer) -> None:
        self._note_events(trainer)
        logged = _numbers(self._logged.read(trainer))
        self._last.update(logged)
        if self._open:
            state = tuple(technique.logs for technique in TECHNIQUES.values())
            self._epochs[-1].update({k: v for k, v in self._last.items() if k.startswith(state)} | logged)

    def _note_events(self, trainer: pl.Trainer) -> None:
        for callback in compressions(trainer):
            mark = _mark(callback)
            if mark != self._seen.get(callback.state_key, UNBEGUN):
                self._seen[callback.state_key] = mark
                technique = TECHNIQUES.of(callback)
                logs = "" if technique is None else technique.logs
                metrics = {k: v for k, v in _numbers(trainer.callback_metrics).items() if k.startswith(logs)}
                event = {"step": callback.window.last_event, "callback": type(callback).__name__}
                self._events.append({**event, **metrics})

    @property
    def state_key(self) -> str:
        """Class name with the folder: several instances can run together."""
        return self._generate_state_key(dirpath=str(self.dirpath))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of a run with another folder, if there is one report on either side."""
        states = checkpoint["callbacks"]
        saved = [key for key in states if str(key).partition("{")[0] == type(self).__qualname__]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        mine = [callback for callback in callbacks if type(callback) is type(self)]
        if self.state_key not in states and len(saved) == len(mine) == 1:
            states[self.state_key] = states[saved[0]]

    def state_dict(self) -> dict[str, Any]:
        """Return the collected facts as plain types; a file saved at the end of an epoch has all of that epoch."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            self._refresh(trainer)
        return {
            "epochs": [dict(epoch) for epoch in self._epochs],
            "events": [dict(event) for event in self._events],
            "seen": dict(self._seen),
            "last": dict(self._last),
            "start": dict(self._start),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._epochs, self._events = list(state_dict["epochs"]), list(state_dict["events"])
        self._seen, self._last = dict(state_dict["seen"]), dict(state_dict["last"])
        self._start = dict(state_dict["start"])
        self._restored = bool(self._start)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the Trainer."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the Trainer: Lightning calls no ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        self._trainer, self._restored, self._open = None, False, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fitted": None, "_trainer": None}

    # What is written.

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report and pass it to the loggers."""
        end = _facts(pl_module)  # on every rank: a divided model is counted together
        if not trainer.is_global_zero:
            return
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("ReportCallback: fast_dev_run writes no report.")
            return
        taught = [pl_module.last_line()] if isinstance(pl_module, DistillationModule) else []
        asked = [*taught, *(callback.last_line(pl_module) for callback in compressions(trainer))]
        report = self._report(trainer, pl_module, end, asked)
        page = report.write(self.dirpath, {"report.json": self._as_json(report.title, end, asked)})
        rank_zero_info(f"ReportCallback: wrote {page}.")
        if self.log_to_loggers:
            for logger in trainer.loggers:
                _try_hand_over(logger, report, trainer.global_step)

    def _as_json(self, title: str, end: Mapping[str, Any], asked: Sequence[str]) -> str:
        found = {"title": title, "asked_and_reached": list(asked), "start": self._start, "end": dict(end)}
        return as_json({**found, "epochs": self._epochs, "events": self._events})

    def _report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, end: Mapping[str, Any], asked: Sequence[str]
    ) -> Report:
        rows = [
            {"name": START, "kind": "dense", **{name: self._start[name] for name in COUNTED}},
            {"name": END, "kind": "compressed", **{name: end[name] for name in COUNTED}},
        ]
        layers = against_reference(end["layers"], self._start["layers"])
        return Report(
            title=self.title or f"A run of {type(getattr(pl_module, 'optim_target', pl_module)).__name__}",
            summary=f"{len(self._epochs)} epochs, {trainer.global_step} optimizer steps.",
            columns=COLUMNS,
            rows=rows,
            notes=[*asked, NOTE],
            notes_title="Asked and reached" if asked else "How to read it",
            figures=_figures(rows, self._epochs, self._events),
            sections=[*_layer_sections(layers, rows), *_logged_sections(self._epochs, self._events)],
            cards=_cards(rows, self._epochs),
        )


def _mark(callback: CompressionCallback) -> str:
    """Return what changes at an event: the step; for quantization, which acts at every step, the phase."""
    if callback.window.last_event < 0:
        return UNBEGUN
    return str(getattr(callback, "phase", callback.window.last_event))


def _facts(pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return sizes and layers of the compressed module."""
    target: nn.Module = find_target(pl_module)[1]
    return {**{name: SIZES[name](target) for name in COUNTED}, "layers": layer_facts(target)}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if getattr(value, "numel", lambda: 1)() == 1}


def _cards(rows: Sequence[Row], epochs: Sequence[Mapping[str, Any]]) -> list[Card]:
    start, end = rows
    words = {"parameters": "parameters left", "nonzero": "non-zero left", "bits": "bits left"}
    left = [(f"{end[name] / start[name]:.1%}", words[name]) for name in COUNTED if start[name]]
    last = epochs[-1] if epochs else {}
    named = {"P/unguarded": "P", "P/raw/accuracy": "accuracy"}
    score = [(f"{last[name]:.4g}", word) for name, word in named.items() if name in last]
    return [Card(END, [*left, *score])]


def _figures(rows: Sequence[Row], epochs: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[Any]:
    from lightning_optim.report.figures import SCORE_PANELS, score_figures, sparsity_figure

    known = {name for name, *_ in SCORE_PANELS}
    logged = {name for epoch in epochs for name in epoch}
    others = sorted(name for name in logged - known if name.startswith(("val", "train")))
    panels = [*SCORE_PANELS, *((name, name, False, f"{name}, as it was logged.") for name in others)]
    drawn = score_figures(rows, {END: epochs}, [panel for panel in panels if panel[0] != "pruning/sparsity"])
    series = [
        (event["step"], event["pruning/asked"], event["pruning/sparsity"])
        for event in events
        if {"pruning/asked", "pruning/sparsity"} <= event.keys()
    ]
    if series:
        caption = "Target (line) and achieved (marks) sparsity at each event."
        drawn.append(("sparsity", caption, sparsity_figure(rows, {END: series})))
    return drawn


def _layer_sections(layers: list[dict[str, Any]], rows: Sequence[Row]) -> list[Section]:
    from lightning_optim.report.figures import LAYER_COLUMNS, layer_picture

    drawn = layer_picture("layers", f"{END}, against {START}", layers, styles_of(rows)[END])
    figures = [] if drawn is None else [drawn]
    return [Section("Layers", figures=figures, columns=LAYER_COLUMNS, rows=layer_rows(layers))] if layers else []


def _logged_sections(epochs: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Section]:
    sections = []
    if events:
        names = list(dict.fromkeys(name for event in events for name in event if "/" in name))
        columns = [Column("callback", "event of"), Column("step", "step"), *(Column(n, n, "{:.4g}") for n in names)]
        sections.append(Section("Events", columns=columns, rows=[dict(event) for event in events]))
    if epochs:
        rows = [{"name": name, "value": value} for name, value in epochs[-1].items() if name != "epoch"]
        columns = [Column("name", "metric"), Column("value", "value", "{:.6g}")]
        sections += [Section("Logged in the last epoch", columns=columns, rows=rows)] if rows else []
    return sections


# Loggers.


Handler = Callable[[Any, Report, int], None]

HANDLERS: Registry[Handler] = Registry("logger")
"""Name of a logger's class -> function that passes it the report; a subclass is handled like its base."""


def hand_over(logger: Any, report: Report, step: int) -> None:
    """Pass table and figures to a logger that can show them; others are named at debug level."""
    name = next((cls.__name__ for cls in type(logger).__mro__ if cls.__name__ in HANDLERS), None)
    if name is None:
        _log.debug("ReportCallback: %s cannot show tables and figures.", type(logger).__name__)
        return
    HANDLERS[name](logger, report, step)


def _try_hand_over(logger: Any, report: Report, step: int) -> None:
    """Pass the report on; a logger that raises is named in a warning, since the report is already written."""
    try:
        hand_over(logger, report, step)
    except Exception as error:  # noqa: BLE001 - loggers raise what they like
        rank_zero_warn(
            f"ReportCallback: {type(logger).__name__} did not accept the report ({type(error).__name__}: {error}). The "
            "files are written; log=False turns logging off."
        )


@HANDLERS.register("TensorBoardLogger")
def _to_tensorboard(logger: Any, report: Report, step: int) -> None:
    logger.experiment.add_text("report", report.to_markdown(), step)
    for name, _, figure in report.all_figures():
        logger.experiment.add_figure(f"report/{name}", figure, step, close=False)


@HANDLERS.register("WandbLogger")
def _to_wandb(logger: Any, report: Report, step: int) -> None:
    columns = [column.title for column in report.columns]
    cells = [[column.cell(row) for column in report.columns] for row in report.rows]
    logger.log_table("report", columns=columns, data=cells, step=step)
    for name, caption, figure in report.all_figures():
        logger.log_image(f"report/{name}", [figure], step=step, caption=[caption])


@HANDLERS.register("MLFlowLogger")
def _to_mlflow(logger: Any, report: Report, step: int) -> None:
    logger.experiment.log_text(logger.run_id, report.to_markdown(), "report/report.md")
    logger.experiment.log_text(logger.run_id, report.to_html(), "report/report.html")
    for name, _, figure in report.all_figures():
        logger.experiment.log_figure(logger.run_id, figure, f"report/{name}.png")
