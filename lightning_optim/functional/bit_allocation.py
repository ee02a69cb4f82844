"""Bits of layers: the choice that costs least under a budget."""

from collections.abc import Mapping

import numpy as np

__all__ = ["allocate_bits"]


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], effective_bits: float
) -> dict[str, int]:
    """Return the bits of each layer whose summed cost is least, with a mean of at most ``effective_bits`` a weight.

    Solved to optimality by scipy's ``milp``, as a multiple-choice knapsack.

    Args:
        costs: Layer -> bits -> cost >= 0, the same bits for all.
        sizes: Layer -> how many weights it has.
        effective_bits: Mean bits of a weight, at least the smallest that a layer may have.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        ValueError: If the smallest bits are more than the budget.

    Examples:
        >>> costs = {"a": {2: 9.0, 4: 1.0, 8: 0.0}, "b": {2: 2.0, 4: 1.0, 8: 0.0}}
        >>> allocate_bits(costs, {"a": 10, "b": 10}, 5.0)
        {'a': 8, 'b': 2}
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("bits='auto' needs scipy: pip install 'lightning-optim[bits]'.") from error
    choices = [(name, bits) for name, each in costs.items() for bits in each]
    names = list(costs)
    smallest = sum(sizes[name] * min(costs[name]) for name in names)
    budget = effective_bits * sum(sizes[name] for name in names)
    if smallest > budget * (1 + 1e-9):
        raise ValueError(f"{effective_bits:g} bits a weight are less than the fewest bits that layers may have.")
    objective = np.array([costs[name][bits] for name, bits in choices])
    one_each = np.array([[name == other for other, _ in choices] for name in names], dtype=float)
    used = np.array([[sizes[name] * bits for name, bits in choices]], dtype=float) / max(budget, 1.0)
    result = milp(
        objective / (objective.max() or 1.0),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(used, -np.inf, 1 + 1e-9)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if result.x is None:
        raise ValueError(f"no choice of bits was found: {result.message}")
    return {name: bits for (name, bits), taken in zip(choices, result.x, strict=True) if taken > 0.5}
