"""Errors of a user's model: which ones a forward pass may raise, and the line that says what happened."""

__all__ = ["FAILURES", "first_line"]

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward pass may raise on unsuitable inputs, in a tracer, or after a wrong removal."""


def first_line(error: BaseException, limit: int | None = None) -> str:
    r"""Return the first line of an error's message that is not blank; the name of its class if there is none.

    Args:
        error: The error.
        limit: Maximum number of characters.

    Examples:
        >>> first_line(ValueError("sizes differ\n  at dimension 1"))
        'sizes differ'
        >>> first_line(KeyError())
        'KeyError'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:limit]
