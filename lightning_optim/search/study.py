"""The study of a search: Optuna's storage, sampler and trials, and what a second process finds there."""

import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from lightning_optim.search.objectives import Objective

__all__ = ["ABOUT", "DENSE", "Study", "counts", "open_study", "quietly", "whose"]

Study = optuna.Study

ABOUT = "lightning_optim"
"""Attribute of a study that says what it searches."""

AGREE = ("space", "objectives", "budget", "seed", "comparison")
"""What two processes of a study must agree on."""

DENSE = "dense"
"""Attribute of the trial that measures the model as it is."""

ATTEMPTS = 10
"""To open a storage while another process makes its tables."""

HEARTBEAT_S, GRACE_S = 20, 120
"""How often a running trial says that it lives, and after how long a silent one counts as lost."""


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Optuna's own lines, and its warnings of what is experimental there, off the screen."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # `weighing` sees to the direction; few trials have equal importances, which says enough
            warnings.filterwarnings(
                "ignore", message="PedAnovaImportanceEvaluator computes|Target and region quantiles"
            )
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(
    storage: Any, name: str, objectives: tuple[Objective, ...], about: Mapping[str, Any], seed: int, n_startup: int
) -> Study:
    """Make a study, or go on with the one of that name.

    Args:
        storage: None (in memory), the URL of a database, or a storage of Optuna.
        name: Of the study.
        objectives: Whose directions it has.
        about: What the study searches; one that goes on must agree.
        seed: Of the proposals.
        n_startup: How many proposals are random.

    Raises:
        ValueError: If the storage cannot be opened, or holds another study of that name.
    """
    with quietly():
        study = _created(_storage(storage), name, objectives)
        known = study.user_attrs.get(ABOUT)
        if known is None and study.get_trials(deepcopy=False):
            raise ValueError(f"the storage holds a study {name!r} that `search` did not make. Choose another `name`.")
        if known is None:
            study.set_user_attr(ABOUT, dict(about))
            study.set_metric_names([objective.name for objective in objectives])
        else:
            _check_same(name, known, about)
    study.sampler = _Sampler(seed, n_startup)
    _drop_lost(study)
    return study


def _storage(storage: Any) -> Any:
    if storage is None or isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not isinstance(storage, str) or "://" not in storage:
        raise ValueError(f"`storage` must be the URL of a database such as 'sqlite:///study.db', got {storage!r}.")
    from sqlalchemy.exc import SQLAlchemyError

    waits = {"connect_args": {"timeout": 120}} if storage.startswith("sqlite") else {}  # several processes write
    for place in range(ATTEMPTS):
        try:
            return optuna.storages.RDBStorage(
                storage, engine_kwargs=waits, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
            )
        except (SQLAlchemyError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if "already exists" in reason and place + 1 < ATTEMPTS:
                time.sleep(1)  # another process makes the tables now
                continue
            raise ValueError(
                f"the storage {storage!r} cannot be opened: {reason}. Pass a URL of SQLAlchemy."
            ) from error
    raise AssertionError("unreachable")


def _created(storage: Any, name: str, objectives: tuple[Objective, ...]) -> Study:
    directions = [objective.direction for objective in objectives]
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    except ValueError as error:  # another number of objectives
        raise ValueError(f"the storage holds a study {name!r} of other objectives. Choose another `name`.") from error
    return study


def _check_same(name: str, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse to go on with a study that searches something else."""
    for key in AGREE:
        value = about[key]
        if known.get(key) != value:
            raise ValueError(
                f"the storage holds a study {name!r} with another {key}: {known.get(key)!r} instead of {value!r}. "
                "Choose another `name`, or pass what it was begun with."
            )


class _Sampler(optuna.samplers.BaseSampler):
    """Optuna's TPE, seeded by the number of the trial.

    A proposal then depends on the seed and the trials before it alone: a study that was killed goes on with the
    proposals that it would have had, and two processes on one storage propose different ones.
    """

    def __init__(self, seed: int, n_startup: int) -> None:
        self._seed = seed
        self._n_startup = n_startup
        self._of: dict[int, optuna.samplers.TPESampler] = {}

    def _inner(self, trial: FrozenTrial) -> optuna.samplers.TPESampler:
        if trial.number not in self._of:
            self._of = {
                trial.number: optuna.samplers.TPESampler(
                    seed=1_000_003 * self._seed + trial.number,
                    n_startup_trials=self._n_startup + 1,  # the dense model is one of them
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            }
        return self._of[trial.number]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Ask the sampler of this trial."""
        return self._inner(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the sampler of this trial."""
        return self._inner(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Ask the sampler of this trial."""
        return self._inner(trial).sample_independent(study, trial, param_name, param_distribution)


# Trials of processes that are gone.


def whose() -> dict[str, Any]:
    """Return which process runs a trial: host, process and when that began, since numbers of processes are reused."""
    return {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid())}


def _began(process: int) -> str | None:
    """Return when a process began, in the kernel's ticks; "" if that cannot be told, None if there is no process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            facts = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if facts[0] == "Z" else facts[19]


def _drop_lost(study: Study) -> None:
    """Mark running trials as failed whose process is gone from this machine; heartbeats tell of other machines."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        if owner is None or owner["host"] != socket.gethostname():
            continue
        if _began(int(owner["process"])) != owner["began"]:
            with quietly():
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study: not one that was lost with its process, which is made up for."""
    return trial.state != TrialState.FAIL or "error" in trial.user_attrs
