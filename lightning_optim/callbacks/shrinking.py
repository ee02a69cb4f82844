"""The channels of a running fit that shrink before they are removed."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.change import Changed
from lightning_optim.functional.regularization import REGULARIZATIONS, Regularization
from lightning_optim.structured.coupled import CoupledUnits

__all__ = ["Shrinking"]

_STEPS = 4
"""Units shrink by at least so many of the smallest relative steps of their dtype, which would otherwise round them."""


class Shrinking:
    """Shrinks channels after each step of the optimizers that hold them.

    What shrinks is known by the names of parameters and the places of their entries. So a resumed run needs no trace of
    the model, and a change of the model is followed as an optimizer's state follows it.

    Args:
        regularization: Name in ``functional.regularization.REGULARIZATIONS``; None: nothing shrinks.
        strength: How much; None: the default of the regularization.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the name is unknown, or the strength is not finite and above 0, or given alone.
    """

    def __init__(self, regularization: str | None, strength: float | None) -> None:
        self.regularization = _regularization(regularization)
        self.strength = _strength(self.regularization, strength)
        self.clear()

    def clear(self) -> None:
        """Let nothing shrink."""
        self.units: dict[str, CoupledUnits] = {}
        self._leaving: dict[str, list[int]] = {}
        self._intact = True
        self._steps = (0, 0)
        self._passed: dict[int, float] = {}

    def __bool__(self) -> bool:
        return self.regularization is not None

    @property
    def chooses(self) -> bool:
        """Whether the channels that shrink are those of the next event."""
        return self.regularization is not None and self.regularization.chooses

    def begin(
        self, units: dict[str, CoupledUnits], leaving: Mapping[str, list[int]], *, since: int, until: int
    ) -> None:
        """Let groups shrink.

        Args:
            units: The groups' coupled weights.
            leaving: Channels that the next event removes, by group.
            since: Step from which they shrink.
            until: Step of the event, or the end of the window.
        """
        if self._steps != (since, until):
            self._passed = {}
        self._steps = (since, until)
        self.units = units
        self._leaving = {name: units[name].units_of(channels) for name, channels in leaving.items()}
        self._intact = True

    def chosen(self) -> dict[str, list[int]] | None:
        """Return the channels that were chosen for this event, by group.

        None if none were, or another technique has changed layers since: then they are to be chosen anew.
        """
        if not self.chooses or not self.units or not self._intact:
            return None
        return {name: self.units[name].channels_of(units) for name, units in self._leaving.items()}

    def after_step(self, module: nn.Module, holder: int, held: set[int], step: int) -> None:
        """Shrink what an optimizer holds, right after its step.

        What acts is the time since the optimizer's last step, so one that steps twice in a batch, or not in each,
        shrinks its parameters by the same in the end.

        Args:
            module: The target, whose parameters the names are.
            holder: Number of the optimizer.
            held: Ids of its parameters.
            step: The step that was counted.
        """
        if self.regularization is None or not self.units:
            return
        since, until = self._steps
        progress = min(max((step - since) / max(until - since, 1), 0.0), 1.0)
        passed = self.regularization.passed(progress)
        amount = self.strength * (passed - self._passed.get(holder, 0.0))
        if amount < self._least(module):
            return
        self._passed[holder] = passed
        # All norms are read before anything shrinks: a weight may belong to two groups.
        rule = self.regularization
        factors = {name: self._factors(rule, module, name, amount) for name in self.units}
        for name, units in self.units.items():
            units.scale(module, factors[name], held)

    def _factors(self, rule: Regularization, module: nn.Module, name: str, amount: float) -> Tensor:
        units = self.units[name]
        device = module.get_parameter(units.parts[0][0]).device
        leaving = torch.zeros(units.number, dtype=torch.bool)
        leaving[self._leaving.get(name, [])] = True
        norms = units.norms(module) if rule.reads_norms else torch.ones(units.number, device=device)
        return rule.factors(norms, leaving.to(device), amount)

    def _least(self, module: nn.Module) -> float:
        dtypes = {module.get_parameter(name).dtype for units in self.units.values() for name, _, _ in units.parts}
        return max((_STEPS * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def leaving_norm(self, module: nn.Module, leaving: Mapping[str, list[int]]) -> float | None:
        """Return the mean norm of channels that leave as a fraction of the mean norm of all in their groups.

        Args:
            module: The target.
            leaving: Channels by group.
        """
        fractions = []
        for name, channels in leaving.items():
            if name in self.units and channels:
                units = self.units[name]
                norms = units.norms(module).cpu()
                fractions += (norms[units.units_of(channels)] / norms.mean().clamp_min(1e-12)).tolist()
        return sum(fractions) / len(fractions) if fractions else None

    def follow(self, changed: Changed, prefix: str) -> None:
        """Follow a change of the model, by this technique or another."""
        before, chosen = self.units, self._leaving
        self.units, self._leaving = {}, {}
        for name, old in before.items():
            units, numbers = old.follow(changed, prefix)
            now = changed.layer(prefix + name)
            if now != prefix + name or len(units.parts) < len(old.parts):
                self._intact = False
            if not units.parts:
                continue
            places = {number: place for place, number in enumerate(numbers)}
            key = name if now is None else now.removeprefix(prefix)
            self.units[key] = units
            self._leaving[key] = [places[unit] for unit in chosen.get(name, ()) if unit in places]

    def place(self, module: nn.Module) -> None:
        """Move what was loaded to the devices of the parameters."""
        self.units = {name: units.to(module) for name, units in self.units.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what shrinks, and how far it is, as plain types and tensors."""
        return {
            "units": {name: units.state_dict() for name, units in self.units.items()},
            "leaving": {name: list(units) for name, units in self._leaving.items()},
            "intact": self._intact,
            "steps": list(self._steps),
            "passed": dict(self._passed),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned; a run without a regularization takes nothing."""
        self.clear()
        if not state or self.regularization is None:
            return
        self.units = {name: CoupledUnits.from_state(units) for name, units in state["units"].items()}
        self._leaving = {name: list(units) for name, units in state["leaving"].items()}
        self._intact, self._passed = state["intact"], dict(state["passed"])
        self._steps = (state["steps"][0], state["steps"][1])


def _regularization(name: str | None) -> Regularization | None:
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"`regularization` must be {_names()} or None, got {name!r}.")
    if name not in REGULARIZATIONS:
        raise ValueError(f"unknown regularization {name!r}; known: {_names()}, or None.")
    return REGULARIZATIONS[name]()


def _names() -> str:
    return ", ".join(repr(name) for name in sorted(REGULARIZATIONS))


def _strength(regularization: Regularization | None, strength: float | None) -> float:
    if strength is None:
        return 0.0 if regularization is None else regularization.strength
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"`strength` must be a number above 0, or None for the default, got {strength!r}.")
    if not 0.0 < strength < math.inf:
        raise ValueError(f"`strength` must be a number above 0, got {strength!r}. For none pass regularization=None.")
    if regularization is None:
        raise ValueError(f"`strength` belongs to a regularization: pass regularization={_names()}, got None.")
    return float(strength)
