"""A distillation module is its student to everybody else: attributes, hyperparameters, and the Trainer's package."""

from functools import cache
from importlib import import_module
from typing import Any

from lightning_optim.target import lightning_class

__all__ = ["StandsForStudent"]

_PLAIN = (bool, int, float, str, type(None))


def of_student(name: str) -> Any:
    """Return a property that is the student's attribute (or hyperparameter) where it has one, else the module's own.

    Lightning's finders read and set ``lr`` or ``learning_rate`` on the module that the Trainer fits.
    """

    def read(module: Any) -> Any:
        student = module._modules.get("student")
        if name in module.__dict__:
            return module.__dict__[name]
        if hasattr(student, name):
            return getattr(student, name)
        if name in getattr(student, "hparams", {}):
            return student.hparams[name]
        raise AttributeError(f"neither {type(module).__name__} nor its student has {name!r}.")

    def write(module: Any, value: Any) -> None:
        student = module.__dict__.get("_modules", {}).get("student")
        in_arguments = name in getattr(student, "hparams", {})
        if in_arguments:
            student.hparams[name] = value
        if hasattr(student, name):
            setattr(student, name, value)
        elif not in_arguments:
            module.__dict__[name] = value

    return property(read, write, doc=f"The student's ``{name}``, for Lightning's finders.")


class StandsForStudent:
    """Answers with what the student has where the module around it has nothing of that name.

    So finetuning callbacks find ``backbone``, tuners ``batch_size``, loggers the hyperparameters, as on the student
    itself. Private names are never the student's. A number or text set from outside goes to the student where only it
    has the name; layers and tensors that a subclass sets are its own.

    A module around a student of ``pytorch_lightning`` is a LightningModule of that package too, for its Trainer.
    """

    def __new__(cls, student: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make a module of the student's package."""
        base, made = lightning_class(student), cls  # type: Any, Any
        if base is not None and not issubclass(cls, base):
            made = _of_package(made, base.__module__)
        return object.__new__(made)

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
    def hparams(self) -> Any:
        """The hyperparameters that a subclass saved, else the student's."""
        own = super().hparams  # type: ignore[misc]
        student = _student_of(self)
        if own or lightning_class(student) is None or self.__dict__.get("_saving", False):
            return own
        return student.hparams

    def save_hyperparameters(self, *args: Any, **options: Any) -> None:
        """Save a subclass's arguments as its own, not among the student's."""
        self.__dict__["_saving"] = True
        try:
            super().save_hyperparameters(*args, **options)  # type: ignore[misc]
        finally:
            del self.__dict__["_saving"]

    @property
    def hparams_initial(self) -> Any:
        """The hyperparameters at the beginning, for loggers: the student's and those that a subclass saved."""
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


def _student_of(module: Any) -> Any:
    return module.__dict__.get("_modules", {}).get("student")


@cache
def _of_package(cls: Any, package: str) -> Any:
    """Return a class that is a LightningModule of another package too, which comes first where both have a name."""
    other = getattr(import_module(package), "LightningModule")  # noqa: B009
    own = next(base for base in cls.__mro__ if base.__name__ == "LightningModule")
    both = type("LightningModule", (other, own), {"__module__": package})
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (cls, package), *object.__reduce_ex__(self, protocol)[2:]

    return type(cls.__name__, (cls, both), {**names, "__reduce_ex__": reduce})


def _rebuilt(cls: type, package: str) -> Any:
    return object.__new__(_of_package(cls, package))
