"""Registries: the one place where a name becomes a function."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Registry"]

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, F], Generic[F]):
    """A read-only mapping from names to functions that grows by decorating functions.

    Callbacks accept a registered name or any callable of the same signature; both go through :meth:`resolve`.
    Error texts, documentation tables and the tests over "every registered ..." read the registry itself.

    Args:
        kind: What is registered, for error texts ("criterion", "schedule").

    Examples:
        >>> SHAPES = Registry("shape")
        >>> @SHAPES.register("square")
        ... def square(side: float) -> float:
        ...     return side**2
        >>> SHAPES["square"](3)
        9
        >>> SHAPES.resolve("circle")
        Traceback (most recent call last):
            ...
        ValueError: unknown shape 'circle'; known: square. A callable of the same signature is accepted too.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, F] = {}

    def register(self, name: str, *, needs: tuple[str, ...] = ()) -> Callable[[F], F]:
        """Register the decorated function under a name.

        Args:
            name: The word users write. A name that is taken raises.
            needs: What the caller must prepare for the function (a criterion: of ``gradient``, ``input_norm``,
                ``generator``). It is kept on the function as ``needs``, so an unregistered callable may carry
                the same attribute.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self._functions:
            raise ValueError(f"{self.kind} {name!r} is already registered; choose another name.")

        def add(function: F) -> F:
            function.needs = needs  # type: ignore[attr-defined]
            self._functions[name] = function
            return function

        return add

    def resolve(self, name_or_function: str | F) -> F:
        """Return the function of a registered name, or the given callable itself.

        Raises:
            ValueError: If the name is unknown; the known ones are listed.
            TypeError: If it is neither a name nor a callable.
        """
        if isinstance(name_or_function, str):
            if name_or_function not in self._functions:
                raise ValueError(
                    f"unknown {self.kind} {name_or_function!r}; known: {', '.join(sorted(self))}. "
                    "A callable of the same signature is accepted too."
                )
            return self._functions[name_or_function]
        if not callable(name_or_function):
            raise TypeError(
                f"a {self.kind} is a registered name ({', '.join(sorted(self))}) or a callable, "
                f"got {name_or_function!r}."
            )
        return name_or_function

    def __getitem__(self, name: str) -> F:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)
