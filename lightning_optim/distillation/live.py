"""The live teacher of a distillation: what it answers to the inputs of the student."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.distillation.capture import Capture, find_layer
from lightning_optim.distillation.divided import check_teacher, divide_teacher, is_divided
from lightning_optim.distillation.heads import (
    Answer,
    Head,
    HeadAnswer,
    find_head,
    is_hugging_face,
    outputs_of,
    proven,
    stopped_at,
    without_labels,
)
from lightning_optim.distillation.positions import one_a_row
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.distillation.teacher import Teacher, shared_parameters
from lightning_optim.sharding import is_sharded
from lightning_optim.target import ForwardInputs, as_forward_inputs

__all__ = ["LiveTeacher"]


@dataclass(eq=False)
class LiveTeacher:
    """Calls a distillation's teacher."""

    points: SubclassPoints
    autocast: torch.dtype | None
    teacher: Teacher | None = None
    _heads: dict[int, Head | None] = field(default_factory=dict)
    """The head of each teacher, by its number; None if it cannot be called alone. Found in the first batch."""

    def set(self, teacher: Any) -> None:
        """Take a teacher, or None.

        Raises:
            TypeError: If it is not a module.
            ValueError: If it shares parameters with the student, lacks the layer of a feature, has no weights yet, or
                is divided already.
        """
        handle = Teacher.of(teacher, self.autocast)
        if handle is not None:
            for network in handle.networks:
                check_teacher(network)
            shared = shared_parameters(self.points.student, handle)
            if shared:
                raise ValueError(
                    f"teacher and student share {len(shared)} parameters ({shared[0]}, ...), and the teacher is "
                    "frozen. For self-distillation pass copy.deepcopy(student) as the teacher."
                )
            for feature in self.points.features:
                find_layer(handle.networks[0], feature.teacher, "feature of the teacher")
            handle.freeze()
        self.teacher, self._heads = handle, {}

    def divide(self, trainer: Any, *, wanted: bool) -> None:
        """Divide the teacher among the devices, if the Trainer's strategy does so and it is wanted."""
        if self.teacher is not None:
            divide_teacher(trainer, self.teacher.networks, wanted=wanted)
            if any(is_divided(network) for network in self.teacher.networks):
                self._heads = {}  # of a divided teacher no layer is called alone

    def required(self) -> Teacher:
        """Return the teacher.

        Raises:
            MisconfigurationException: If there is none.
        """
        if self.teacher is None:
            raise MisconfigurationException(
                "distillation needs a teacher to train: DistillationModule(student, teacher), or `set_teacher`. A "
                "checkpoint never holds one, and a spawned process does not get one (use strategy='ddp')."
            )
        return self.teacher

    def inputs_for(self, inputs: ForwardInputs, item: Any) -> ForwardInputs:
        """Return the arguments of the teacher's forward.

        Args:
            inputs: The arguments of the student's.
            item: The batch without its index.
        """
        own = self.points.teacher_inputs(item)
        return inputs if own is None else as_forward_inputs(own)

    def ask(
        self, inputs: ForwardInputs, item: Any, *, classes: int | None = None
    ) -> tuple[list[Answer], dict[str, Tensor]]:
        """Return what each teacher answers, and the outputs of the first one's layers that features name.

        Args:
            inputs: The arguments of the student's forward.
            item: The batch without its index.
            classes: Number of the student's classes, if it is enough to have the teachers' logits row by row: those of
                a teacher whose head can be called alone are then not computed yet. None: compute them.
        """
        teacher, own = self.required(), self.inputs_for(inputs, item)
        names = dict.fromkeys(feature.teacher for feature in self.points.features)
        answers: list[Answer] = []
        with Capture(teacher.networks[0], names, "feature of the teacher") as captured:
            for number, network in enumerate(teacher.networks):
                answer: Answer | None = None
                if classes is not None:
                    answer = self._up_to_head(number, own, classes, () if number else names)
                if answer is None:
                    if not number:
                        captured.clear()
                    answer = self._logits(network, own)
                answers.append(answer)
        for name in names:
            if not captured.calls[name]:
                raise RuntimeError(f"the teacher's layer {name!r} is never called by its forward. Name another layer.")
        return answers, {name: captured.outputs(name)[0] for name in names}

    def answers(self, inputs: ForwardInputs, *, classes: int | None) -> list[Answer]:
        """Return what each teacher answers to arguments of its forward.

        Args:
            inputs: The arguments.
            classes: As for :meth:`ask`; at least that many.
        """
        found: list[Answer] = []
        for number, network in enumerate(self.required().networks):
            answer = None if classes is None else self._up_to_head(number, inputs, classes, ())
            found.append(self._logits(network, inputs) if answer is None else answer)
        return found

    def _logits(self, network: nn.Module, inputs: ForwardInputs) -> Tensor:
        if is_hugging_face(network):  # it would compute a loss, for which nobody asks
            inputs = replace(inputs, kwargs=without_labels(network, inputs.kwargs or {}))
        return self.points.get_logits(self.required().answer(network, inputs))

    def _up_to_head(
        self, number: int, inputs: ForwardInputs, classes: int, features: Collection[str]
    ) -> HeadAnswer | None:
        """Return the answer of a teacher whose head can be called alone; None if it cannot."""
        teacher, network = self.required(), self.required().networks[number]
        known = self._heads.get(number)
        if known is not None and not is_sharded(known.layer):  # a later fit may have divided it
            layer: nn.Module | None = known.layer
        elif number in self._heads:
            layer = None
        else:
            outputs = classes if self.points.teacher_classes is None else max(self.points.teacher_classes) + 1
            layer = find_head(network, outputs, features)
        self._heads[number] = None
        if layer is None:
            return None
        try:
            with stopped_at(network, layer) as calls:
                logits = self._logits(network, inputs)
        except (ValueError, RuntimeError, AssertionError, ArithmeticError):
            if known is not None:
                raise
            return None  # its forward needs all logits: ask for them
        if len(calls) != 1:
            return None
        hidden, output = calls[0]
        head = known or proven(network, layer, output, logits)
        self._heads[number] = head
        if head is None:
            return None

        def of(rows: Tensor) -> Tensor:
            with torch.no_grad(), teacher.precision(rows.device):
                return head(rows)

        return HeadAnswer(hidden, (*hidden.shape[:-1], outputs_of(layer)), of)

    def combine(self, answers: Sequence[Tensor], dim: int, *, one_logit: bool) -> Tensor:
        """Return the logits of all teachers combined.

        Args:
            answers: The logits of each.
            dim: The dimension that holds the classes.
            one_logit: Whether a row has one logit.
        """
        answers = [one_a_row(answer) for answer in answers]
        if len(answers) == 1:
            return answers[0]
        return self.required().combine(answers, dim=dim, binary=one_logit or self.points._objective.binary)

    def checksum_for(self, trainer: Any, *, needed: bool) -> str | None:
        """Return the teacher's checksum if it is needed or there are several ranks; None: not computed, or no teacher.

        Raises:
            MisconfigurationException: If ranks hold different teachers.
        """
        several = trainer.world_size > 1
        if not several and not needed:
            return None
        own = None if self.teacher is None else self.teacher.checksum()
        if several:
            first = trainer.strategy.broadcast(own, src=0)
            if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
                raise MisconfigurationException(
                    "the teacher's weights differ between ranks, so each rank would learn from another teacher. Load "
                    "the teacher from the same file on every rank, or seed before it is created."
                )
        return own
