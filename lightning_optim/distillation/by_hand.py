"""Students that optimize manually: the teacher's loss joins the loss that their step gives to ``manual_backward``."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optim.distillation.positions import find_logits
from lightning_optim.optimizers import StepWatch

__all__ = ["ManualBackward"]

_NAME = "manual_backward"


class ManualBackward:
    """Stands in for a student's ``manual_backward`` during one training step.

    It is on the instance only while the step runs, so copies and pickles of the student never have it.

    Args:
        student: The student.
        taught: Returns the loss with the teacher's added to it.
        batch_idx: Number of the batch, for messages.
        which: Which call gets the teacher's loss, from 0; None: there must be only one.
        optimizers: Those of the Trainer, whose steps are noted.

    Attributes:
        number: How many calls there were.
        stepped: Whether an optimizer stepped.
        used: Calls of the student, by their number, whose graph a backward pass went through.
    """

    def __init__(
        self,
        student: Any,
        taught: Callable[[Tensor], Tensor],
        *,
        batch_idx: int,
        which: int | None,
        optimizers: Iterable[Any],
    ) -> None:
        self.student = student
        self.number = 0
        self.stepped = False
        self.used: set[int] = set()
        self._taught = taught
        self._batch_idx = batch_idx
        self._which = which
        self._optimizers = list(optimizers)
        self._watches: list[StepWatch] = []
        self._seen = 0
        self._runs = False
        self._by_itself = False

    def __enter__(self) -> "ManualBackward":
        self._replaced = vars(self.student).get(_NAME)
        self._own = getattr(self.student, _NAME)
        vars(self.student)[_NAME] = self
        self._watches = [StepWatch(optimizer, self._after_step) for optimizer in self._optimizers]
        return self

    def __exit__(self, *exception: object) -> None:
        for watch in self._watches:
            watch.remove()
        del vars(self.student)[_NAME]
        if self._replaced is not None:
            vars(self.student)[_NAME] = self._replaced

    def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the student's ``manual_backward``, for one call with the teacher's loss added.

        Raises:
            MisconfigurationException: If it is the second call and nothing says which one is meant.
        """
        number, self.number = self.number, self.number + 1
        if number == 1 and self._which is None:
            raise MisconfigurationException(
                f"{self._who} calls `manual_backward` a second time in batch {self._batch_idx}, and the teacher's loss "
                "belongs to one of them. Say which, counted from 0: module.taught_backward = 0; or add the losses up "
                "and call it once. An optimizer that calls its closure several times a step (LBFGS) cannot be taught "
                "like this: use automatic optimization."
            )
        if number == (self._which or 0):
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                said = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise MisconfigurationException(
                    f"{self._who} gives {said} to `manual_backward` in batch {self._batch_idx}. Give it a loss, one "
                    "number, to which the teacher's can be added."
                )
            loss = self._taught(loss)
        self._runs = True
        try:
            self._own(loss, *args, **kwargs)
        finally:
            self._runs = False

    @property
    def _who(self) -> str:
        return f"the training step of {type(self.student).__name__}"

    def _after_step(self, optimizer: Any) -> None:
        self.stepped = True

    def watch(self, output: Any) -> None:
        """Note a call of the student with gradients: a backward pass that does not come by here will be seen.

        Args:
            output: What it returned.
        """
        number, self._seen = self._seen, self._seen + 1
        logits = find_logits(output)

        def passed(gradient: Tensor) -> None:
            self.used.add(number)
            self._by_itself = self._by_itself or not self._runs

        if logits is not None and logits.requires_grad:
            logits.register_hook(passed)  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Refuse a step that trained without the teacher; one that skipped its batch is fine.

        Raises:
            MisconfigurationException: If it ran a backward pass of its own, or never made the call that was meant.
        """
        if not self.number and self._by_itself:
            raise MisconfigurationException(
                f"{self._who} ran a backward pass in batch {self._batch_idx} without `manual_backward`, so the "
                "teacher's loss was not in it. Call self.manual_backward(loss) instead of loss.backward()."
            )
        if self._which is not None and 0 < self.number <= self._which:
            times = "once" if self.number == 1 else f"{self.number} times"
            raise MisconfigurationException(
                f"{self._who} called `manual_backward` {times} in batch {self._batch_idx}, so there was none to which "
                f"the teacher's loss belongs: module.taught_backward = {self._which}, counted from 0."
            )
