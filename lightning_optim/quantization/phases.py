"""The phase of a run, and the layers that are in another one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.quantization.layers import PHASES, QuantizedLayer

__all__ = ["LayerPhases", "observing_steps", "phase_at", "rounds"]


def rounds(phase: str) -> bool:
    """Whether weights and inputs are rounded in a phase."""
    return phase in ("fake_quantize", "frozen")


def phase_at(step: int, start: int | None, observed_until: int | None, freeze: int | None) -> str:
    """Return the phase that is due at a step; "off" while the window is not resolved."""
    if start is None or observed_until is None or freeze is None:
        return "off"
    return PHASES[sum(step >= bound for bound in (start, observed_until, freeze))]


def observing_steps(start: int, freeze: int, steps: int, *, movable: bool, fast_dev_run: bool) -> tuple[int, int]:
    """Return the first step of observing and the first step after it.

    Args:
        start: The window's first step.
        freeze: The step from which ranges are fixed.
        steps: Number of steps to observe; a ``fast_dev_run`` observes fewer if it is shorter.
        movable: Whether ``start`` was given as a fraction, so that it can move forward to make room.
        fast_dev_run: Whether the Trainer runs a few batches only.

    Raises:
        MisconfigurationException: If observing does not end by ``freeze``.
    """
    if fast_dev_run:
        steps = min(steps, freeze)
    if start + steps > freeze and (fast_dev_run or movable):
        start = max(0, freeze - steps)
    if start + steps > freeze or steps == 0:
        raise MisconfigurationException(
            f"ranges are observed for {steps} steps from `start` (step {start}), which is not over by `freeze` "
            f"(step {freeze}). Start earlier, freeze later, or lower `observe_steps`."
        )
    return start, start + steps


@dataclass
class LayerPhases:
    """The layers whose phase differs from the run's.

    Attributes:
        rounded: Layers that were rounded when the fit began: they stay so while the others are off or observed.
        unseen: Layers whose input was never seen: they are observed until it is, and stay float once ranges are
            frozen.
    """

    rounded: list[str] = field(default_factory=list)
    unseen: set[str] = field(default_factory=set)

    def wanted(self, names: Iterable[str], due: str) -> dict[str, str]:
        """Return the phase of each layer where ``due`` is the run's."""
        return {name: self._of(name, due) for name in names}

    def _of(self, name: str, due: str) -> str:
        if name in self.unseen:
            return "off" if due == "frozen" else "observe"
        return "fake_quantize" if name in self.rounded and due in ("off", "observe") else due

    def reached(self, layers: Mapping[str, QuantizedLayer]) -> str:
        """Return the earliest phase that a layer is in, apart from those whose input was never seen."""
        seen = [layer for name, layer in layers.items() if name not in self.unseen] or layers.values()
        return PHASES[min((PHASES.index(layer.quantization_phase) for layer in seen), default=0)]

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Follow layers that got another name, and drop those that got none."""
        self.rounded = [new for old in self.rounded if (new := names.get(old)) is not None]
        self.unseen = {new for old in self.unseen if (new := names.get(old)) is not None}
