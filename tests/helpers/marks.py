"""Marks of tests that try one promise in many ways: some are quick, the rest is slow."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest

__all__ = ["cells"]


def cells(*axes: Sequence[Any], quick: Collection[Any]) -> list[Any]:
    """Return all combinations of some values as test parameters; those that are not among the quick are slow.

    Args:
        axes: The values of each parameter.
        quick: Values, or tuples of several parameters. Together they should hold every value of every axis once.
    """
    combinations = [cell if len(axes) > 1 else cell[0] for cell in product(*axes)]
    unknown = [cell for cell in quick if cell not in combinations]
    if unknown:
        raise ValueError(f"{unknown} are no cells of the matrix.")
    return [
        pytest.param(*(cell if len(axes) > 1 else (cell,)), marks=() if cell in quick else pytest.mark.slow)
        for cell in combinations
    ]
