"""A distillation module is its student to everybody else: attributes, hyperparameters, and the Trainer's package."""

import inspect
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from lightning_optim.target import lightning_class

__all__ = ["StandsForStudent", "take_settings"]

_PLAIN = (bool, int, float, str, type(None))
_SETTINGS = ("example_input_array", "allow_zero_length_dataloader_with_multiple_devices", "prepare_data_per_node")
_UNSAVED = ("student", "teacher", "optimizer", "task_loss", "example_inputs", "loss", "features")
"""Arguments that may be modules or functions, which would make a checkpoint unloadable."""


def of_student(name: str) -> Any:
    """Return a property that is the student's attribute (or hyperparameter) if it has one, else the module's own.

    Lightning's finders read and set ``lr`` or ``learning_rate`` on the module that the Trainer fits.
    """

    def read(module: Any) -> Any:
        student = _student_of(module)
        if name in module.__dict__:
            return module.__dict__[name]
        if hasattr(student, name):
            return getattr(student, name)
        if name in getattr(student, "hparams", {}):
            return student.hparams[name]
        raise AttributeError(f"neither {type(module).__name__} nor its student has {name!r}.")

    def write(module: Any, value: Any) -> None:
        student = _student_of(module)
        in_arguments = name in getattr(student, "hparams", {})
        if in_arguments:
            student.hparams[name] = value
        if hasattr(student, name):
            setattr(student, name, value)
        elif not in_arguments:
            module.__dict__[name] = value

    return property(read, write, doc=f"The student's ``{name}``, for Lightning's finders.")


class StandsForStudent:
    """Returns the student's attribute if the module around it has none of that name.

    So finetuning callbacks find ``backbone``, tuners ``batch_size``, loggers the hyperparameters, as on the student
    itself. Private names are never the student's. A number or string set from outside goes to the student if only the
    student has the name; layers and tensors that a subclass sets are its own.

    A module around a student of ``pytorch_lightning`` is a LightningModule of that package too, for its Trainer.
    """

    lr = of_student("lr")
    learning_rate = of_student("learning_rate")

    def __new__(cls, student: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Create a module of the student's package."""
        base, created = lightning_class(student), cls  # type: Any, Any
        if base is not None and not issubclass(cls, base):
            created = _of_package(created, base.__module__)
        return object.__new__(created)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            student = _student_of(self)
            if student is None or name.startswith("_"):
                raise
            return getattr(student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        student = _student_of(self)
        if student is not None and isinstance(value, _PLAIN) and not name.startswith("_") and not self._has(name):
            target = student if hasattr(student, name) else self
        else:
            target = self
        if target is self:
            super().__setattr__(name, value)
        else:
            setattr(target, name, value)

    def _has(self, name: str) -> bool:
        own = self.__dict__
        places = (own, own["_parameters"], own["_buffers"], own["_modules"])
        return hasattr(type(self), name) or any(name in place for place in places)

    @property
    def automatic_optimization(self) -> bool:
        """Whether Lightning runs the backward pass and the optimizer: as the student says, if it is a LightningModule.

        The Trainer, its strategies and callbacks ask the module that is fitted.
        """
        student = _student_of(self)
        automatic: bool = (
            super().automatic_optimization  # type: ignore[misc]
            if lightning_class(student) is None
            else student.automatic_optimization
        )
        return automatic

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        student = _student_of(self)
        if lightning_class(student) is None:
            self.__dict__["_automatic_optimization"] = value
        else:
            student.automatic_optimization = value

    @property
    def hparams(self) -> Any:
        """The hyperparameters that a subclass saved, else the student's."""
        own = super().hparams  # type: ignore[misc]
        student = _student_of(self)
        if own or lightning_class(student) is None or self.__dict__.get("_saving", False):
            return own
        return student.hparams

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str | None = None, frame: Any = None, **options: Any
    ) -> None:
        """Save a subclass's arguments as its own, not the student's; never modules or functions."""
        unsaved = [*([ignore] if isinstance(ignore, str) else ignore or ()), *_UNSAVED]
        if frame is None:
            current = inspect.currentframe()
            frame = None if current is None else current.f_back
        self.__dict__["_saving"] = True
        try:
            names = [arg for arg in args if arg not in unsaved]
            super().save_hyperparameters(*names, ignore=unsaved, frame=frame, **options)  # type: ignore[misc]
        finally:
            del self.__dict__["_saving"]

    @property
    def hparams_initial(self) -> Any:
        """The initial hyperparameters, for loggers: the student's and those that a subclass saved."""
        own = super().hparams_initial  # type: ignore[misc]
        student = _student_of(self)
        return own if lightning_class(student) is None else type(own)({**student.hparams_initial, **own})

    @property
    def _log_hyperparams(self) -> bool:
        student = _student_of(self)
        own: bool = self.__dict__.get("_logs_own_hyperparams", False)
        return own or bool(getattr(student, "_log_hyperparams", False))

    @_log_hyperparams.setter
    def _log_hyperparams(self, value: bool) -> None:
        self.__dict__["_logs_own_hyperparams"] = value


def take_settings(module: Any, student: Any) -> None:
    """Copy the settings of a student that Lightning reads from the module it fits, and that every module has."""
    for name in _SETTINGS:
        if getattr(student, name, None) is not None:
            setattr(module, name, getattr(student, name))
    module._strict_loading = student._strict_loading


def _student_of(module: Any) -> Any:
    return module.__dict__.get("_modules", {}).get("student")


@cache
def _of_package(cls: Any, package: str) -> Any:
    """Return a class that is a LightningModule of another package too, whose methods take precedence."""
    other = getattr(import_module(package), "LightningModule")  # noqa: B009
    own = next(base for base in cls.__mro__ if base.__name__ == "LightningModule")
    both = type("LightningModule", (other, own), {"__module__": package})
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (cls, package), *object.__reduce_ex__(self, protocol)[2:]

    return type(cls.__name__, (cls, both), {**names, "__reduce_ex__": reduce})


def _rebuilt(cls: type, package: str) -> Any:
    return object.__new__(_of_package(cls, package))
