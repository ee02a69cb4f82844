"""Searches for the recipe with the best trade-off between accuracy and what the deployed model costs."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_optim.checks import check_choice, check_count, check_mapping, check_name, check_names
from lightning_optim.export.runtimes import RUNTIMES, missing_package
from lightning_optim.report.comparison import EXPORTERS
from lightning_optim.search.objectives import Limit, Objective, check_noise, limits_of, objectives_of
from lightning_optim.search.report import SearchReport
from lightning_optim.search.space import Space
from lightning_optim.search.training import Evaluate, Setting

__all__ = ["search"]

OPTIONS = ("engines", "batch_size", "weights", "size", "export", "accuracy")
"""Of :func:`~lightning_optim.compare`, that a search may set."""


def search(
    *,
    space: Mapping[str, Any] | str | Path,
    make_module: Callable[[], pl.LightningModule],
    make_trainer: Callable[..., pl.Trainer],
    evaluate: Evaluate,
    objectives: Sequence[str] | Mapping[str, Literal["min", "max"]] = ("accuracy", "bits"),
    trials: int = 20,
    storage: Any = None,
    name: str | None = None,
    seed: int = 0,
    budget: Mapping[str, Any] | None = None,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    teacher: Any = None,
    example_inputs: Any = None,
    n_startup: int = 5,
    progress: bool = True,
    val_dataloaders: Any = None,
    monitor: str | None = None,
    monitor_mode: Literal["max", "min"] = "max",
    stop_early: bool = True,
    noise: Mapping[str, float] | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> SearchReport:
    """Search for the recipe with the best trade-off between accuracy and what the deployed model costs.

    Optuna proposes the recipes (its TPE sampler, also for several objectives and with constraints). Trial 0 is the
    dense model. Every trial trains a new module with the same random numbers, and is measured by
    :func:`~lightning_optim.compare` beside the dense model: the same engine, the same ranges. A trial that raises is
    recorded with its error, and the search goes on; the dense model must succeed.

    Args:
        space: A recipe with open arguments: ``(low, high)`` (whole numbers if both ends are), ``(low, high, "log")``,
            or a list of values; None in a list leaves a technique out. Or a YAML file, where ranges are
            ``{low: 0.2, high: 0.8}``.
        make_module: Returns a new LightningModule, to be trained from its first step on.
        make_trainer: Returns a new Trainer. It gets the recipe's callbacks if it has an argument ``callbacks`` (or one
            positional argument), and must pass them on; otherwise they are added to its Trainer.
        evaluate: Function of the trained model (a copy in eval mode, without gradients) that returns its held-out
            accuracy, or several metrics by name.
        objectives: Names of ``compare``'s columns, each of which knows its direction: "accuracy", "parameters",
            "nonzero", "bits", "bytes", "macs", "file" (the ONNX file), "latency" (one call in the engine, as a ratio to
            the dense model), "latency_batch", "P". A mapping to "min" or "max" adds metrics of ``evaluate``.
        trials: How many trials the study is to have, the dense model and those that failed included. A later call with
            a larger number goes on.
        storage: None keeps the study in memory. A URL such as "sqlite:///study.db" lets a search that was killed go on,
            and several processes share it. Or a storage of Optuna.
        name: Of the study in its storage; default "search".
        seed: Of the proposals and of every training. The same seed gives the same proposals.
        budget: Bounds that a model must keep: ``{"latency": 0.5, "accuracy": ">=0.92"}``; a bare number is an upper
            bound of what should be small. With one objective it is a search under constraints.
        train_dataloaders: As for ``fit``.
        datamodule: As for ``fit``.
        teacher: As :class:`~lightning_optim.DistillationModule` takes it, where the space distills.
        example_inputs: What the model's forward receives; default its ``example_input_array``, else caught from the
            first training batch.
        n_startup: Number of random proposals, and of complete trials before one is stopped early.
        progress: Whether to show a progress bar (on rank zero).
        val_dataloaders: As for ``fit``.
        monitor: Name of a metric that the module logs in validation, for stopping hopeless trials early; None calls
            ``evaluate`` after each validation.
        monitor_mode: Whether that metric is to be large or small.
        stop_early: Whether hopeless trials stop: those whose compression has ended and whose accuracy is below the
            median of the finished trials that are no larger, at the same epoch.
        noise: Half width within which values of a metric count as equal, by objective: ``{"accuracy": 0.005}``. Times
            have the ranges that ``compare`` measures, counts have no noise.
        comparison: More arguments of ``compare``: ``engines`` (the first one's times count; default the first inference
            engine that is installed), ``batch_size``, ``weights``, ``size``, ``export``, ``accuracy`` (name of the
            metric that is the accuracy).

    Returns:
        The report of all trials of the study, on every rank.

    Raises:
        ValueError: If nothing in the space is open, a recipe rejects a value of it, an objective is unknown, or the
            storage holds another study of that name.
        ImportError: If Optuna or a needed engine is not installed; the message names the extra.

    References:
        Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework"; Bergstra et al. 2011,
        "Algorithms for Hyper-Parameter Optimization" (TPE); Golovin et al. 2017, "Google Vizier" (median rule).

    Examples:
        >>> import lightning.pytorch as pl
        >>> from lightning_optim.demo import DigitsData, DigitsNet
        >>> report = search(  # doctest: +SKIP
        ...     space={"channel_pruning": [None, {"pruning_ratio": (0.2, 0.7)}]},
        ...     make_module=DigitsNet,
        ...     make_trainer=lambda callbacks: pl.Trainer(max_epochs=10, callbacks=callbacks),
        ...     evaluate=accuracy,  # accuracy(net) -> float, on held-out data
        ...     datamodule=DigitsData(),
        ...     trials=20,
        ... )
        >>> print(report.best(accuracy=">=0.98").recipe)  # doctest: +SKIP
    """
    check_count("trials", trials)
    check_count("n_startup", n_startup)
    check_name("name", name, "search")
    check_name("monitor", monitor, "val_acc")
    check_choice("monitor_mode", monitor_mode, ("max", "min"))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be a whole number in [0, 2**32), got {seed!r}.")
    for argument, function in (("make_module", make_module), ("make_trainer", make_trainer), ("evaluate", evaluate)):
        if not callable(function):
            raise TypeError(f"`{argument}` must be a function, got {function!r}.")
    if comparison is not None:
        check_mapping("comparison", comparison, "arguments of compare")
        check_names("comparison", comparison, OPTIONS)
    options = dict(comparison or {})
    parsed = Space(space)
    _check_teacher(parsed, teacher)
    accuracy = options.pop("accuracy", "accuracy")
    engine = _engine(options)
    wanted = objectives_of(objectives, engine, accuracy)
    limits = limits_of(budget, wanted, engine, accuracy)
    measured = _asked(wanted, limits)
    widths = check_noise(noise, [objective.name for objective in measured])
    setting = Setting(
        make_module=make_module,
        make_trainer=make_trainer,
        evaluate=evaluate,
        data=_data(train_dataloaders, val_dataloaders, datamodule),
        teacher=teacher,
        example_inputs=example_inputs,
        options=_options(options, measured, engine),
        accuracy=accuracy,
        seed=seed,
    )
    if not _is_installed("optuna"):
        raise missing_package("optuna", "search")
    from lightning_optim.search.loop import Loop  # loads Optuna

    loop = Loop(
        setting=setting,
        space=parsed,
        objectives=wanted,
        limits=limits,
        noise=widths,
        trials=trials,
        name=name or "search",
        n_startup=n_startup,
        progress=progress,
        monitor=monitor,
        monitor_mode=monitor_mode,
        stop_early=stop_early,
    )
    with isolate_rng():
        return loop.run(storage)


def _data(train: Any, val: Any, datamodule: Any) -> dict[str, Any]:
    if datamodule is not None and (train is not None or val is not None):
        raise ValueError("pass `datamodule`, or `train_dataloaders` and `val_dataloaders`, not both.")
    given = {"train_dataloaders": train, "val_dataloaders": val, "datamodule": datamodule}
    return {name: value for name, value in given.items() if value is not None}


def _check_teacher(space: Space, teacher: Any) -> None:
    if teacher is not None and not space.distils():
        raise ValueError(
            "the space has no `distillation`, and a teacher was given. Add distillation: true, or take it out."
        )
    if teacher is None and space.distils():
        raise ValueError("the space distills, and there is no `teacher`. Pass one, or remove `distillation`.")


def _engine(options: Mapping[str, Any]) -> str:
    """Return the engine whose times count."""
    engines = options.get("engines")
    if engines is not None:
        if isinstance(engines, str) or not engines:
            raise ValueError(f"`engines` must be a list of at least one name, got {engines!r}.")
        return str(engines[0])
    can_export = options.get("export") is not False and all(map(_is_installed, EXPORTERS))
    return next((name for name in RUNTIMES if can_export and _is_installed(name)), "torch")


def _asked(objectives: Sequence[Objective], limits: Sequence[Limit]) -> tuple[Objective, ...]:
    """Return what has to be measured, once each."""
    bounded = {limit.objective.name: limit.objective for limit in limits}
    return tuple({**{objective.name: objective for objective in objectives}, **bounded}.values())


def _options(given: Mapping[str, Any], measured: Sequence[Objective], engine: str) -> dict[str, Any]:
    """Return the arguments of ``compare``: nothing is exported or timed in an engine that no objective asks for."""
    needs = {objective.needs for objective in measured}
    options = {**given, "times": "time" in needs}
    if "time" not in needs:
        options.setdefault("batch_size", None)  # a larger call is for times: ragged inputs need not be cut
    by_score = any(objective.column.endswith("P") for objective in measured)
    if not by_score:
        options["weights"] = {"size": 1}  # P is not asked for, and must not demand an accuracy in [0, 1]
    named = [name for name in ("torch", *RUNTIMES) if any(m.column.startswith(f"{name}_") for m in measured)]
    in_engine = "time" in needs
    if "engines" not in options:
        options["engines"] = list(dict.fromkeys([*([engine] if in_engine else []), *named])) or ["torch"]
    exports = "file" in needs or any(name != "torch" for name in options["engines"])
    if "file" in needs:
        for package in EXPORTERS:
            if not _is_installed(package):
                raise missing_package(package, "onnx")
    if "export" not in options:
        options["export"] = None if exports else False
    if exports and options["export"] is False:
        raise ValueError("an objective needs the exported file, and export=False writes none. Remove one of the two.")
    return options


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
