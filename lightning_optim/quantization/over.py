"""Layer classes that compute by the forward of the user's class, for classes that are known by name only."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from lightning_optim.sharding import own_class

__all__ = ["OverOwnClass"]


class OverOwnClass(nn.Module):
    """Base of layer classes that are put before a layer's own class.

    ``QuantizedConv1D.over(layer)`` is a class with the bases ``QuantizedConv1D`` and the layer's own, so that
    ``super().forward`` is the layer's, and ``isinstance`` with the own class stays true.
    """

    float_class: type[nn.Module]
    keeps_name = False
    """Whether the class has the name of the layer's own, which messages show."""

    @classmethod
    def over(cls, layer: nn.Module) -> type[nn.Module]:
        """Return the class for a layer, also for one that is of such a class already."""
        own = own_class(layer)
        return _class_over(cls._base(), getattr(own, "float_class", own), cls.read_names(layer))

    @classmethod
    def _base(cls) -> "type[OverOwnClass]":
        return next(base for base in cls.__mro__ if "float_class" not in vars(base))

    @classmethod
    def read_names(cls, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of parameters that :meth:`read` gives to whoever reads them."""
        return ()

    def read(self, name: str) -> Any:
        """Return what reading a parameter by its name gives."""
        return self._parameters[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made while the program runs, so pickle does not find it by its name.
        # `__getstate__` is the user's: a LightningModule leaves its Trainer out.
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call]
        return _made, (self._base(), self.float_class, self.read_names(self)), dict(state)


_MADE: dict[tuple[type, type, tuple[str, ...]], type[nn.Module]] = {}


def _class_over(cls: type[OverOwnClass], float_class: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    key = (cls, float_class, names)
    if key not in _MADE:
        # It has the name of `cls`: a plan names the technique's class, and the user's module gives the float class.
        named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        readers = {name: _reader(name) for name in names}
        name = float_class.__name__ if cls.keeps_name else cls.__name__
        own = {**named, "float_class": float_class, "forward": _forward_of(cls, float_class), **readers}
        _MADE[key] = type(name, (cls, float_class), own)
    return _MADE[key]


def _forward_of(cls: type[OverOwnClass], float_class: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of a class, with the arguments of the layer's own, by which others call it and name inputs."""

    @wraps(float_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    return forward


def _reader(name: str) -> property:
    return property(lambda self: self.read(name))


def _made(cls: type[OverOwnClass], float_class: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class_over(cls, float_class, names)
    return made.__new__(made)
