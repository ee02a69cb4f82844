"""Registries: the one place where a name becomes a function."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from typing import Any, Generic, TypeVar, cast

__all__ = ["Registry"]

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, F], Generic[F]):
    """A read-only mapping from names to functions that grows by decorating functions.

    Callbacks accept a registered name, ``{name: arguments}``, or any callable of the same signature; all go through
    :meth:`resolve`. Error messages, documentation tables and the tests over "every registered ..." read the registry.

    Args:
        kind: What is registered, for error messages ("criterion", "schedule").
        trial: Calls a function that was given arguments once, so that it can reject them when it is made.

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

    def __init__(self, kind: str, *, trial: Callable[[F], Any] | None = None) -> None:
        self.kind = kind
        self._trial = trial
        self._functions: dict[str, F] = {}

    def register(self, name: str, *, needs: tuple[str, ...] = ()) -> Callable[[F], F]:
        """Register the decorated function under a name.

        Args:
            name: The word users write. A name that is taken raises.
            needs: What the caller must prepare for the function (a criterion: of ``gradient``, ``input_norm``,
                ``generator``). The function keeps it as its attribute ``needs``, which an unregistered callable may
                have too.

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

    def resolve(self, wanted: str | Mapping[str, Any] | F) -> F:
        """Return the function of a registered name, the same with arguments, or the given callable itself.

        Args:
            wanted: A name; ``{name: {argument: value}}`` for a function with keyword-only arguments; or a callable.

        Raises:
            ValueError: If the name or an argument is unknown (the error lists the known ones), or a value is rejected.
            TypeError: If it is none of the three.
        """
        if isinstance(wanted, str):
            if wanted not in self._functions:
                raise ValueError(
                    f"unknown {self.kind} {wanted!r}; known: {', '.join(sorted(self))}. "
                    "A callable of the same signature is accepted too."
                )
            return self._functions[wanted]
        if isinstance(wanted, Mapping):
            return self._with_arguments(wanted)
        if not callable(wanted):
            raise TypeError(
                f"a {self.kind} is a registered name ({', '.join(sorted(self))}) or a callable, got {wanted!r}."
            )
        return wanted

    def _with_arguments(self, wanted: Mapping[str, Any]) -> F:
        names, arguments = list(wanted), next(iter(wanted.values()), None)
        if len(names) != 1 or not isinstance(names[0], str) or not isinstance(arguments, Mapping):
            raise TypeError(f"a {self.kind} with arguments is {{name: {{argument: value}}}}, got {dict(wanted)!r}.")
        function = self.resolve(names[0])
        known = [name for name, word in signature(function).parameters.items() if word.kind is word.KEYWORD_ONLY]
        unknown = [argument for argument in arguments if argument not in known]
        if unknown:
            raise ValueError(
                f"{self.kind} {names[0]!r} has no argument {unknown[0]!r}; known: {', '.join(known) or 'none'}."
            )
        made: Any = partial(function, **arguments)
        made.needs = function.needs  # type: ignore[attr-defined]
        if self._trial is not None:
            self._trial(made)
        return cast("F", made)

    def __getitem__(self, name: str) -> F:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)
