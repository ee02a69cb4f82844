"""DistillationModule: a student learns from its labels and from a teacher, inside the Trainer it has."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_optim import checkpoint
from lightning_optim.checks import check_path, listed
from lightning_optim.distillation.arguments import (
    SEVERAL,
    apply_example,
    check_student,
    classes_of,
    optimizers_of,
    temperature_of,
)
from lightning_optim.distillation.cache import Indexed, LogitCache, dataset_length, every_sample_once, shared_cache
from lightning_optim.distillation.features import (
    Capture,
    Feature,
    candidate_layers,
    feature_names,
    find_layer,
    observe,
    propose_features,
    surviving_channels,
)
from lightning_optim.distillation.hooks import (
    HYPERPARAMETERS,
    as_student,
    call_student,
    install_hooks,
    install_plain_steps,
    is_lightning,
    student_view,
)
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.positions import (
    Positions,
    find_labels,
    find_logits,
    find_loss,
    find_mask,
    fitting_mask,
    named_inputs,
    one_a_row,
)
from lightning_optim.distillation.projectors import Projectors, new_projector
from lightning_optim.distillation.ramp import Ramp, RampState
from lightning_optim.distillation.student import KEY, own_hyperparameters, plain_hyperparameters
from lightning_optim.distillation.teacher import Teacher, shared_parameters
from lightning_optim.distillation.wrapper import StandsForStudent, of_student
from lightning_optim.functional.losses import Loss
from lightning_optim.functional.rows import task_cross_entropy
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import is_sharded
from lightning_optim.strategies.common import check_supported
from lightning_optim.structured.groups import Removal
from lightning_optim.tables import render
from lightning_optim.target import (
    ForwardInputs,
    as_forward_inputs,
    averaged_copies,
    batch_inputs,
    lightning_class,
    map_inputs,
)
from lightning_optim.window import planned_steps

__all__ = ["DistillationModule"]

_PASSED_ON = ("example_input_array", "allow_zero_length_dataloader_with_multiple_devices", "prepare_data_per_node")


class DistillationModule(StandsForStudent, pl.LightningModule):
    """Train a student with ``(1 - alpha) * task + alpha * distillation + sum of weighted features``.

    The student's own step, optimizer, metrics and hooks run as they are; with ``alpha=0`` the run is the student's own,
    bit for bit. Its inputs and outputs are seen by a hook, and the teacher gets the same inputs. The teacher is in no
    checkpoint, optimizer, DDP bucket, averaged copy or pickle; a file loads without it, and validating, testing,
    predicting and exporting need none. Compression callbacks act on the student (:attr:`optim_target`).

    Whether a teacher helps has to be measured: with all labels and a teacher that knows them by heart the gain was
    nothing, and label smoothing (``loss="label_smoothing"``) as good; with few labels and unlabelled data it was large.

    Args:
        student: A LightningModule with automatic optimization and one optimizer, or a plain module.
        teacher: A module (a LightningModule, a compressed one too), several in a list, or ``[(module, weight), ...]``:
            the log of their mean probability. It is frozen in place. None where nothing is trained. It may share no
            parameter with the student; for self-distillation give a deep copy.
        loss: Name in ``functional.losses.LOSSES``, a callable of the same signature, or ``{name: weight}`` for several.
            None: ``"kd"``, and ``"bce"`` where a row has one logit.
        alpha: Weight of the distillation loss in [0, 1], or a :class:`Ramp`.
        temperature: > 0, or a :class:`Ramp`; None: the default of each loss, which is what its paper takes (kd 4,
            dkd 4, logit_std 2, dist 1). Losses without temperature do not get it.
        logits_from: Name of the student's layer whose output are the logits, where its step does not call its own
            ``forward`` but, say, ``self.net(x)``: ``"net"``.
        features: ``(student layer, teacher layer[, loss[, weight]])`` each, or :class:`Feature`; see
            :meth:`match_features`. Features are those of the first teacher.
        cache: File for the teacher's logits: computed once at fit start, then read. The training dataset must be an
            :class:`IndexedDataset` without augmentation.
        teacher_classes: Of the teacher's outputs, the ones that are the student's, in the student's order.
        teacher_autocast: Dtype of the teacher's autocast (``torch.bfloat16``); None: its own precision.
        example_inputs: What the student's forward receives; sizes projectors. Default: its ``example_input_array``,
            else the first training batch.
        optimizer: For a plain student: ``parameters -> optimizer``, such as ``partial(torch.optim.Adam, lr=1e-3)``.
        task_loss: For a plain student: ``(logits, targets) -> scalar``; default the ``loss`` in its output, where it
            has one, else cross-entropy (binary of one logit a row).

    Which rows are compared: logits are ``[rows, ..., classes]``, or ``[rows, classes, ...]`` where the labels have that
    shape without dimension 1. Positions labelled -100 are left out; samples labelled -100 are not, since a teacher
    needs no label, but losses that do skip them. A mask of the output's positions counts too: a decoder's, not its
    encoder's. Where the model compares each position with the label after it, as causal language models of Hugging
    Face do, so do the losses here. Calls of the student without gradient do not count.

    Subclass points: :meth:`get_logits`, :meth:`teacher_inputs`, :meth:`targets`, :meth:`padding_mask`,
    :meth:`sample_index`, :meth:`kd_loss`, :meth:`task_loss`, ``configure_optimizers``; :attr:`class_dim` and
    :attr:`shift_labels`.

    Logged: ``distillation/task``, ``distillation/kd`` (all losses of logits together; of several each as
    ``distillation/kd/<name>``), ``distillation/<student layer>``: means over the epoch, unweighted by ``alpha``.

    State: ``student.*`` and ``projectors.*`` in ``state_dict()``; windows of ramps. A resumed run continues bit for bit
    where the student's own would. Strategies: a single device, DDP, and all that divide the model (the teacher is whole
    on every device). Inference is not faster by this: the student is.

    Raises:
        TypeError: If ``student`` or ``teacher`` is no module.
        ValueError: If an argument is out of range, a layer does not exist, or teacher and student share parameters.
        MisconfigurationException: If the student optimizes manually.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any = None,
        *,
        loss: str | Loss | Mapping[str, float] | None = None,
        alpha: float | Ramp | Mapping[str, Any] = 0.5,
        temperature: float | Ramp | Mapping[str, Any] | None = None,
        logits_from: str = "",
        features: Sequence[Any] = (),
        cache: str | Path | None = None,
        teacher_classes: Sequence[int] | None = None,
        teacher_autocast: torch.dtype | None = None,
        example_inputs: Any = None,
        optimizer: Callable[[Any], Optimizer] | None = None,
        task_loss: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_student(student, optimizer, task_loss)
        if not isinstance(logits_from, str):
            raise TypeError(f"`logits_from` must be the name of a layer of the student, got {logits_from!r}.")
        self.projectors = Projectors()
        self.logits_from = logits_from
        self.features = [Feature.of(each) for each in listed("features", features, "pairs of layers")]
        self.teacher_classes = None if teacher_classes is None else classes_of(teacher_classes)
        self.student = student  # what is public and set from here on may be the student's
        self._alpha = RampState("alpha", alpha, 0.0, 1.0, "must be a weight in [0, 1]")
        self._temperature = temperature_of(temperature)
        self._objective = LogitLosses.of(loss)
        self._positions = Positions()
        if cache is not None:
            check_path("cache", cache)
        self._cache_path = None if cache is None else Path(cache)
        if cache is not None and features:
            raise ValueError(
                "`features` need the teacher's layers, so its logits need no `cache`. Give one of the two."
            )
        self._cache: LogitCache | None = None
        self._unproven = False
        self._optimizer, self._task_loss = optimizer, task_loss
        self._example = None if example_inputs is None else as_forward_inputs(example_inputs)
        self._taught_batches = 0
        self._taught_by: dict[str, float] = {}
        self._sums: dict[str, Tensor | float] = {}
        self._rows = 0
        self._restored = False
        self._autocast = teacher_autocast
        self._teacher: Teacher | None = None
        self.set_teacher(teacher)
        self._take_over(student)

    def _take_over(self, student: Any) -> None:
        checkpoint.share_plan(self, "student")
        if not is_lightning(student):
            self._check_layers()
            install_plain_steps(self)
            return
        for name in _PASSED_ON:
            if getattr(student, name, None) is not None:
                setattr(self, name, getattr(student, name))
        self._strict_loading = student._strict_loading
        install_hooks(self, student)
        if not self._builds_in("setup", "configure_model"):  # its layers are all there
            self._check_layers()

    def _builds_in(self, *hooks: str) -> bool:
        """Whether the student may make layers in one of these hooks."""
        student = self.student
        if not is_lightning(student):
            return False
        return any(is_overridden(hook, student, lightning_class(student)) for hook in hooks)

    def _check_layers(self) -> None:
        find_layer(self.student, self.logits_from, "logits_from")
        for feature in self.features:
            find_layer(self.student, feature.student, "feature")

    # What others ask.

    @property
    def optim_target(self) -> nn.Module:
        """The module that compression callbacks act on."""
        return self.student

    recipe: Mapping[str, Any] | None = None
    """The words of the recipe it was made from that it runs itself, for the checkpoint."""
    class_dim: int | None = None
    """Which dimension of the logits holds the classes, 1 or -1; None: as the labels' shape says."""
    shift_labels: bool | None = None
    """Whether each position predicts the label after it; None: as the student's own loss says, else its class."""
    lr = of_student("lr")
    learning_rate = of_student("learning_rate")

    @property
    def teacher(self) -> Teacher | None:
        """The teacher's handle; None where there is none."""
        return self._teacher

    def set_teacher(self, teacher: Any) -> None:
        """Give the module its teacher, or None: what the argument ``teacher`` takes.

        Raises:
            TypeError: If it is no module.
            ValueError: If it shares parameters with the student, or lacks a feature's layer.
        """
        handle = Teacher.of(teacher, self._autocast)
        if handle is not None:
            shared = shared_parameters(self.student, handle)
            if shared:
                raise ValueError(
                    f"teacher and student share {len(shared)} parameters ({shared[0]}, ...), and the teacher is "
                    "frozen. For self-distillation give copy.deepcopy(student) as the teacher."
                )
            for feature in self.features:
                find_layer(handle.networks[0], feature.teacher, "feature of the teacher")
            handle.freeze()
        self._teacher = handle

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str | None = None, frame: Any = None, **options: Any
    ) -> None:
        """Save a subclass's arguments, never modules or functions: they would make the file unloadable."""
        given = [ignore] if isinstance(ignore, str) else list(ignore or ())
        unsaved = [*given, "student", "teacher", "optimizer", "task_loss", "example_inputs", "loss", "features"]
        caller = inspect.currentframe() if frame is None else frame
        frame = caller.f_back if frame is None and caller is not None else frame
        args = tuple(arg for arg in args if arg not in unsaved)
        super().save_hyperparameters(*args, ignore=unsaved, frame=frame, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student."""
        return self.student(*args, **kwargs)

    # What a subclass may say differently.

    def get_logits(self, output: Any) -> Tensor:
        """Return the logits in an output of student or teacher: ``[rows, ..., classes]`` or ``[rows, classes, ...]``.

        A tensor itself, ``.logits``, the entry ``"logits"``, both ends of a span, or the first tensor of a tuple, dict,
        dataclass or other object that is neither a scalar nor integers.

        Raises:
            TypeError: If there is none.
        """
        logits = find_logits(output)
        if logits is None:
            raise TypeError(f"no logits in an output of type {type(output).__name__}. Override `get_logits(output)`.")
        return logits

    def teacher_inputs(self, batch: Any) -> Any:
        """Return what the teacher's forward receives, where it is not what the student's receives; else None.

        A tensor, a tuple of arguments, or a dict of keywords: for another tokenizer or another resolution. The batch is
        what the student's own step gets, without the index of an :class:`IndexedDataset`.
        """
        return None

    def targets(self, batch: Any) -> Any:
        """Return the labels in a batch: its second item, or the entry ``labels``, ``label``, ``targets`` or ``y``.

        Unless a subclass says otherwise, labels that the student's forward received come first, and an item of the
        batch that it received for something else is passed over. An override may return None: no labels.

        Raises:
            TypeError: If there are none.
        """
        return _required(find_labels(batch, {}), batch)

    def padding_mask(self, batch: Any, inputs: ForwardInputs) -> Tensor | None:
        """Return which positions of the student's output count, ``[rows, positions]``, True or 1; None: all.

        By default the ``attention_mask`` of what the student's forward received; of a student with encoder and
        decoder its ``decoder_attention_mask``.
        """
        return find_mask(batch, self._received(inputs), self.student)

    def _received(self, inputs: ForwardInputs) -> dict[str, Any]:
        return named_inputs(find_layer(self.student, self.logits_from, "logits_from"), inputs)

    def _labels(self, batch: Any, inputs: ForwardInputs, *, told: bool = True) -> Any:
        """Return the labels of a batch, or None; a subclass's ``targets`` is asked where it is ``told`` to."""
        if is_overridden("targets", self, DistillationModule):
            return self.targets(batch) if told else None
        return find_labels(batch, self._received(inputs))

    def sample_index(self, batch: Any) -> Any:
        """Return the samples' places in the training dataset, ``[rows]``, for the cache.

        Raises:
            ValueError: If the batch does not say.
        """
        if isinstance(batch, Indexed):
            return batch.index
        if isinstance(batch, Mapping) and "index" in batch:
            return batch["index"]
        raise ValueError(
            "`cache` needs to know which samples a batch holds. Wrap the training dataset: IndexedDataset(dataset)."
        )

    def task_loss(self, output: Any, batch: Any) -> Tensor:
        """Return the loss of a plain student on its labels."""
        own = find_loss(output)
        if self._task_loss is None and own is not None:
            return own
        logits, targets = self.get_logits(output), self.targets(batch)
        if self._task_loss is not None:
            return self._task_loss(logits, targets)
        logits = one_a_row(logits)
        return task_cross_entropy(logits, targets, self._positions.dim_of(logits, targets, told=self.class_dim))

    def kd_loss(self, student_logits: Tensor, teacher_logits: Tensor, **words: Any) -> dict[str, Tensor]:
        """Return each loss of the logits, unweighted, by name.

        Args:
            student_logits: ``[rows, classes]``, padding removed.
            teacher_logits: The same shape.
            words: ``temperature`` and ``targets``; a loss gets those that it takes.
        """
        return self._objective(student_logits, teacher_logits, **words)

    # The step.

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the student's own step, and add what the teacher says about the same inputs."""
        item = batch.item if isinstance(batch, Indexed) else batch
        alpha = self._alpha.value(self._step)
        teaches = alpha > 0.0 or bool(self.features)
        wanted = dict.fromkeys([self.logits_from, *(feature.student for feature in self.features)] if teaches else [])
        with Capture(self.student, wanted, trains=True) as caught:
            result = self._student_step(item, batch_idx, alpha)
            if result is None or not teaches:
                return result
            if not caught.calls[self.logits_from]:
                raise RuntimeError(self._never_called(caught.without_gradient))
            task = result["loss"] if isinstance(result, Mapping) else result
            parts = self._taught(caught, batch, item, batch_idx, alpha, task)
            self._taught_batches += 1
            self._log_parts({"task": task, **parts}, self.get_logits(caught.calls[self.logits_from][0][1]).shape[0])
        loss = self._total(task, parts, alpha)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    @property
    def _step(self) -> int:
        return self._trainer.global_step if self._trainer is not None else 0

    def _student_step(self, batch: Any, batch_idx: int, alpha: float) -> Any:
        student = self.student
        if is_lightning(student):
            takes = len(inspect.signature(student.training_step).parameters)
            with as_student(student, "training_step"):
                return student.training_step(*(batch, batch_idx)[:takes])
        output = batch_inputs(student, batch).call(student)
        if alpha == 1.0:  # the labels do not count: there may be none
            return self.get_logits(output).new_zeros(())
        return self.task_loss(output, batch)

    def _never_called(self, without_gradient: int) -> str:
        names = [name for name, child in self.student.named_children() if any(True for _ in child.parameters())]
        called = f"its layer {self.logits_from!r}" if self.logits_from else "its own forward"
        how = " with gradients (calls under no_grad teach nothing)" if without_gradient else ""
        return (
            f"the training step of {type(self.student).__name__} never called {called}{how}, so its logits are not "
            "seen. Set `logits_from` to the layer whose output are the logits; it has "
            f"{', '.join(names) or 'no layers'}."
        )

    def _taught(
        self, caught: Capture, batch: Any, item: Any, batch_idx: int, alpha: float, task: Tensor
    ) -> dict[str, Tensor]:
        """Return the parts of the loss by metric name, each a mean over the calls of the student in this step."""
        calls = caught.calls[self.logits_from]
        parts: dict[str, Tensor] = {}
        for turn, (inputs, output) in enumerate(calls):
            self._note_example(inputs)
            answered, layers = self._ask_teacher(inputs, batch, item)
            found = self._feature_losses(caught, layers, turn)
            if alpha > 0.0:
                loss = find_loss(output)
                loss = task if loss is None and len(calls) == 1 else loss
                logits = one_a_row(self.get_logits(output))
                with _no_autocast(logits):
                    found |= self._logit_losses(logits, answered, inputs, item, batch_idx, loss)
            for name, value in found.items():
                parts[name] = parts.get(name, 0.0) + value / len(calls)
        return parts

    def _ask_teacher(self, inputs: ForwardInputs, batch: Any, item: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return each teacher's logits and the first one's layers' outputs; none where no loss asks for a teacher."""
        if self._cache is not None:
            return [self._cached(inputs, batch, item)], {}
        if not self._needs_teacher:
            return [], {}
        teacher = self._required_teacher()
        names = dict.fromkeys(feature.teacher for feature in self.features)
        with Capture(teacher.networks[0], names, "feature of the teacher") as caught:
            logits = [self.get_logits(answer) for answer in teacher(self._inputs_of_teacher(inputs, item))]
        for name in names:
            if not caught.calls[name]:
                raise RuntimeError(f"the teacher's layer {name!r} is never called by its forward. Name another layer.")
        return logits, {name: caught.outputs(name)[0] for name in names}

    def _inputs_of_teacher(self, inputs: ForwardInputs, item: Any) -> ForwardInputs:
        if item is None and is_overridden("teacher_inputs", self, DistillationModule):  # sized by example inputs
            item = self._first_batch()
        own = self.teacher_inputs(item)
        return inputs if own is None else as_forward_inputs(own)

    def _cached(self, inputs: ForwardInputs, batch: Any, item: Any) -> Tensor:
        if self._cache is None:
            raise RuntimeError("no cache is open.")
        logits = self._cache.read(self.sample_index(batch)).to(self.device)
        if self._unproven and self._teacher is not None:  # once: are these the inputs that were cached?
            self._unproven = False
            live = self._together(self._teacher, inputs, item)
            if live.shape != logits.shape or not torch.allclose(live.to(logits), logits, rtol=2e-2, atol=2e-2):
                raise ValueError(
                    f"the cache {str(self._cache.path)!r} does not hold what the teacher says about this batch. The "
                    "inputs must be the same each time (no augmentation, no shuffling before IndexedDataset); where "
                    "student and teacher read batches differently, override `teacher_inputs(batch)`."
                )
        return logits

    @property
    def _needs_teacher(self) -> bool:
        return bool(self.features) or not (self._objective.teacher_free or self._alpha.never)

    @property
    def lacks_teacher(self) -> bool:
        """Whether a fit would need a teacher, or a cache of its logits, and there is neither."""
        return self._needs_teacher and self._cache_path is None and self._teacher is None

    def _required_teacher(self) -> Teacher:
        if self._teacher is None:
            raise MisconfigurationException(
                "distillation needs a teacher to train: DistillationModule(student, teacher), or `set_teacher`. A "
                "checkpoint never holds one, and a spawned process does not get one (take strategy='ddp')."
            )
        return self._teacher

    def _logit_losses(
        self,
        student: Tensor,
        answers: Sequence[Tensor],
        inputs: ForwardInputs,
        item: Any,
        batch_idx: int,
        loss: Tensor | None,
    ) -> dict[str, Tensor]:
        needs_labels = "targets" in self._objective.needs
        labels = self._labels(item, inputs, told=needs_labels or student.ndim > 2)
        mask = self.padding_mask(item, inputs) if student.ndim > 2 else None
        matters = not self._objective.elementwise
        dim = self._positions.dim_of(student, labels, mask=mask, told=self.class_dim, matters=matters)
        if not is_overridden("padding_mask", self, DistillationModule):
            mask = fitting_mask(mask, student, labels, dim)
        teacher = self._combined(answers, dim, student.shape[dim] == 1) if answers else student.detach()
        self._check_answer(student, teacher, batch_idx)
        rows = self._positions.read(
            student, labels, mask, student=self.student, dim=dim, loss=loss, shifts=self.shift_labels
        )
        ours, theirs = rows.of(student), rows.of(teacher)
        if not len(ours):  # no position has a label: nothing to learn, and no mean of nothing
            return {"kd": ours.float().sum()}
        words: dict[str, Any] = {"targets": _tensor(rows.targets, item)} if needs_labels else {}
        if self._temperature is not None:
            words["temperature"] = self._temperature.value(self._step)
        losses = self.kd_loss(ours, theirs, **words)
        self._taught_by = self._objective.of_classes(ours.shape[-1]).weights
        each = {f"kd/{name}": value.detach() for name, value in losses.items()} if len(losses) > 1 else {}
        return {"kd": self._objective.total(losses), **each}

    def _combined(self, answers: Sequence[Tensor], dim: int, one: bool) -> Tensor:
        """Return the logits of all teachers together, those of the student's classes."""
        answers = [one_a_row(answer) for answer in answers]
        binary = one or self._objective.binary
        together = answers[0]
        if len(answers) > 1:
            together = self._required_teacher().combine(answers, dim=dim, binary=binary)
        if self.teacher_classes is not None:
            together = together.movedim(dim, -1)[..., self.teacher_classes].movedim(-1, dim)
        return together.float()

    def _check_answer(self, student: Tensor, teacher: Tensor, batch_idx: int) -> None:
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}. Where the "
                "teacher has other classes, say which are the student's with `teacher_classes`; where its inputs "
                "differ, override `teacher_inputs(batch)`; where its output is nested, `get_logits(output)`."
            )
        looks = teacher.device.type == "cpu" or batch_idx % 50 == 0  # elsewhere each look waits for the device
        if looks and bool(teacher.isnan().any()):
            raise ValueError(
                "the teacher returns NaN. Look at its weights and inputs; a half-precision teacher may overflow: give "
                "it in float32, or `teacher_autocast=torch.bfloat16`."
            )

    def _feature_losses(self, caught: Capture, layers: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
        found = {}
        for position, (name, feature) in enumerate(zip(feature_names(self.features), self.features, strict=True)):
            outputs = caught.outputs(feature.student)
            if turn >= len(outputs):
                raise RuntimeError(f"feature {name!r}: the student's step never called its layer {feature.student!r}.")
            ours = outputs[turn]
            if str(position) in self.projectors:
                ours = self.projectors[str(position)](ours)
            with _no_autocast(ours):
                found[name] = feature.function(ours, layers[feature.teacher])
        return found

    def _total(self, task: Tensor, parts: Mapping[str, Tensor], alpha: float) -> Tensor:
        loss = task if alpha == 0.0 else (1.0 - alpha) * task
        if alpha == 1.0:  # labels do not count: of a batch without any, cross-entropy is NaN
            loss = torch.zeros_like(task)
        if alpha > 0.0:
            loss = loss + alpha * parts["kd"]
        for name, feature in zip(feature_names(self.features), self.features, strict=True):
            loss = loss + feature.weight * parts[name]
        return loss

    def _log_parts(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Add the parts up; they are logged once an epoch: a call of ``self.log`` takes as long as a small step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + rows * value.detach().float()
        self._rows += rows

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means of the parts of the loss."""
        if self._rows and not self.trainer.barebones:
            means = {f"distillation/{name}": total / self._rows for name, total in self._sums.items()}
            self.log_dict(means, sync_dist=True)
        self._sums, self._rows = {}, 0

    def _note_example(self, inputs: ForwardInputs) -> None:
        if self.projectors:  # a reference: what channels survive is found with it
            self._example = map_inputs(Tensor.detach, inputs)

    # A plain student's other steps, as far as they go without more being said.

    def plain_step(self, stage: str, batch: Any) -> Any:
        """Validate or test a plain student by its task loss, or predict with it."""
        item = batch.item if isinstance(batch, Indexed) else batch
        output = batch_inputs(self.student, item).call(self.student)
        if stage == "predict":
            return output
        rows = self.get_logits(output).shape[0]
        self.log(f"{stage}_loss", self.task_loss(output, item), sync_dist=True, batch_size=rows)
        return None

    def configure_optimizers(self) -> Any:
        """Return the student's optimizer; projectors join its first group at fit start.

        Raises:
            MisconfigurationException: If there are several, or a plain student has none.
        """
        if is_lightning(self.student):
            configured = call_student(self.student, "configure_optimizers")
            several = [each for each in optimizers_of(configured) if isinstance(each, (Optimizer, Mapping))]
            if len(several) > 1:
                raise MisconfigurationException(SEVERAL.format(len(several)))
            return configured
        if self._optimizer is None:
            raise MisconfigurationException(
                "a plain module as student needs an optimizer: optimizer=partial(torch.optim.Adam, lr=1e-3), or "
                "override `configure_optimizers`."
            )
        return self._optimizer(self.student.parameters())

    # Around a run.

    def setup(self, stage: str) -> None:
        """Run the student's ``setup``, check what the run needs, and size projectors before anything is loaded."""
        if is_lightning(self.student):
            call_student(self.student, "setup", stage)
        if stage != "fit":
            return
        check_student(self.student, self._optimizer, self._task_loss)
        check_supported("DistillationModule", self.trainer.strategy)
        if self.lacks_teacher:
            self._required_teacher()
        if not self._builds_in("configure_model"):
            self._check_layers()
            self._size_projectors()

    def before_sharding(self, trainer: pl.Trainer) -> None:
        """Size the projectors of layers that ``configure_model`` built, while the student is whole."""
        if trainer.state.fn == "fit":
            self._check_layers()
            self._size_projectors()

    def on_fit_start(self) -> None:
        """Resolve ramps, compare teachers between ranks, open the cache, and hand projectors to the optimizer."""
        self._check_layers()
        self._size_projectors()
        self._begin_ramps()
        self._adopt_projectors()
        checksum = self._same_teacher_everywhere()
        if self._cache_path is not None and not self._alpha.never:
            self._open_cache(self._cache_path, checksum)
        if is_lightning(self.student):
            call_student(self.student, "on_fit_start")

    def _begin_ramps(self) -> None:
        ramps = [ramp for ramp in (self._alpha, self._temperature) if ramp is not None and not ramp.constant]
        planned = planned_steps(self.trainer) if ramps else 0.0
        for ramp in ramps:
            ramp.begin(planned, fresh=not self._restored)
        self._restored = False

    def _adopt_projectors(self) -> None:
        optimizers = self.trainer.optimizers
        if len(optimizers) > 1:
            raise MisconfigurationException(SEVERAL.format(len(optimizers)))
        held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
        missing = [p for p in self.projectors.parameters() if id(p) not in held]
        if missing and not optimizers:
            raise MisconfigurationException("projectors are learned, and the student configures no optimizer.")
        if missing:  # in place: a group of their own would break schedulers that know how many there are
            optimizers[0].param_groups[0]["params"].extend(missing)

    def _same_teacher_everywhere(self) -> str | None:
        """Return the teacher's checksum where it is needed; all ranks must hold the same teacher."""
        several = self.trainer.world_size > 1
        if not several and self._cache_path is None:
            return None
        own = None if self._teacher is None else self._teacher.checksum()
        if several:
            first = self.trainer.strategy.broadcast(own, src=0)
            if not self.trainer.strategy.reduce_boolean_decision(own == first, all=True):
                raise MisconfigurationException(
                    "the teacher's weights differ between ranks, so each would learn from another. Load the teacher "
                    "from one file on every rank, or seed before it is made."
                )
        return own

    def teardown(self, stage: str) -> None:
        """Run the student's ``teardown``; what was changed in the student is then in its own checkpoints too."""
        if is_lightning(self.student):
            call_student(self.student, "teardown", stage)
        checkpoint.share_plan(self, "student")

    # Projectors.

    def _size_projectors(self) -> None:
        """Make the projectors that are missing, by one dry forward of student and teacher."""
        missing = [i for i, each in enumerate(self.features) if each.projects and str(i) not in self.projectors]
        if not missing:
            return
        if is_sharded(self.student):
            raise MisconfigurationException(
                "projectors are sized while the student is whole, and its own `configure_model` divides it. Let "
                "OptimFSDP2 divide it, or take features that need no projector."
            )
        ours, theirs = self._observed([self.features[i] for i in missing])
        for i in missing:
            feature = self.features[i]
            projector = new_projector(ours[feature.student], theirs[feature.teacher], f"{feature.student}.{i}")
            for each in self._all_projectors():
                each.put(str(i), projector)

    def _observed(self, features: Sequence[Feature]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return features of one dry forward by layer name."""
        teacher = self._required_teacher()
        inputs, item = self._example_inputs()
        called = find_layer(self.student, self.logits_from, "logits_from")
        with isolate_rng():
            ours = observe(self.student, called, inputs, [feature.student for feature in features])
            names = dict.fromkeys(feature.teacher for feature in features)
            with Capture(teacher.networks[0], names, "feature of the teacher") as caught:
                teacher(self._inputs_of_teacher(inputs, item))
        return ours, {name: caught.outputs(name)[0] for name in names}

    def _example_inputs(self) -> tuple[ForwardInputs, Any]:
        given = self._example
        if given is None and self.example_input_array is not None:
            given = as_forward_inputs(self.example_input_array)
        item = None
        if given is None:
            item = self._first_batch()
            given = batch_inputs(find_layer(self.student, self.logits_from, "logits_from"), item)
        return apply_example(given, next(self.student.parameters(), None)), item

    def _first_batch(self) -> Any:
        """Return the first training batch; the loader is where it was, and no random number is drawn."""
        if self._trainer is None:
            raise ValueError(
                "layers are sized by a forward pass: give `example_inputs`; your `teacher_inputs` needs a run's batch."
            )
        loader = self.trainer.fit_loop._data_source.dataloader()
        state = loader.state_dict() if hasattr(loader, "state_dict") else None
        with isolate_rng():
            batch = apply_to_collection(loader, DataLoader, lambda each: next(iter(each)))
            batch = next(iter(loader)) if batch is loader else batch
        if state is not None:
            loader.load_state_dict(state)
        return batch.item if isinstance(batch, Indexed) else batch

    def _all_projectors(self) -> "list[Projectors]":
        """Return the projectors of this module and of its averaged copies."""
        copies: list[Any] = [] if self._trainer is None else averaged_copies(self._trainer)
        return [each.projectors for each in (self, *copies)]

    def follow_removal(self, target: nn.Module, removal: Removal) -> Callable[[pl.Trainer], None]:
        """Say how projectors follow when channels leave the student; asked before, the answer is called after.

        Raises:
            ValueError: If the channels of a projected feature cannot be followed.
        """
        if not self.projectors:
            return lambda trainer: None
        inside = next(f"{name}." if name else "" for name, each in self.student.named_modules() if each is target)
        removal = Removal(
            {inside + name: kept for name, kept in removal.kept.items()},
            {inside + name: shape for name, shape in removal.shapes.items()},
            {(inside + name).rstrip("."): values for name, values in removal.attributes.items()},
        )
        projected = {i: self.features[int(i)].student for i in self.projectors}
        inputs, _ = self._example_inputs()
        kept = surviving_channels(self.student, self.logits_from, inputs, set(projected.values()), removal)

        def follow(trainer: pl.Trainer) -> None:
            for i, layer in projected.items():
                if layer in kept:
                    for each in self._all_projectors():
                        each.keep_inputs(i, kept[layer], trainer.optimizers)

        return follow

    def match_features(self, example_inputs: Any = None, *, loss: str = "hint") -> list[Feature]:
        """Propose pairs of layers, and print them: what ``features`` takes.

        Images pair by resolution (the last layer of each), all else by relative depth. It is a proposal: look at it.

        Args:
            example_inputs: What the student's forward receives; default as for the argument of the class.
            loss: Of every pair.

        Raises:
            MisconfigurationException: If there is no teacher.
        """
        if example_inputs is not None:
            self._example = as_forward_inputs(example_inputs)
        teacher = self._required_teacher().networks[0]
        inputs, item = self._example_inputs()
        called = find_layer(self.student, self.logits_from, "logits_from")
        with isolate_rng():
            ours = observe(self.student, called, inputs, candidate_layers(self.student))
            theirs = observe(teacher, teacher, self._inputs_of_teacher(inputs, item), candidate_layers(teacher))
        pairs = propose_features(ours, theirs, loss)
        rows = [
            (
                each.student,
                str(tuple(ours[each.student].shape[1:])),
                each.teacher,
                str(tuple(theirs[each.teacher].shape[1:])),
            )
            for each in pairs
        ]
        rank_zero_info(render("Proposed features", ("student", "shape", "teacher", "shape"), rows))
        return pairs

    # The cache.

    def _open_cache(self, path: Path, checksum: str | None) -> None:
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        rows = dataset_length(loader)
        self._cache = shared_cache(self.trainer, path, checksum, rows, partial(self._build_cache, path, loader, rows))
        self._unproven = True

    def _build_cache(self, path: Path, loader: Any, rows: int) -> None:
        teacher = self._required_teacher()
        bar = getattr(self.trainer.progress_bar_callback, "is_enabled", False)
        with isolate_rng():
            once = every_sample_once(loader)
            answers = (self._answer_for_cache(batch) for batch in once)
            LogitCache.build(path, answers, teacher=teacher.checksum(), rows=rows, batches=len(once), progress=bar)

    def _answer_for_cache(self, batch: Any) -> tuple[Any, Tensor]:
        index = self.sample_index(batch)
        item = batch.item if isinstance(batch, Indexed) else batch
        inputs = batch_inputs(find_layer(self.student, self.logits_from, "logits_from"), item)
        inputs = map_inputs(lambda tensor: tensor.to(self.device), inputs)
        return index, self._together(self._required_teacher(), inputs, item)

    def _together(self, teacher: Teacher, inputs: ForwardInputs, item: Any) -> Tensor:
        """Return the logits that are cached: all of one teacher's, or of several together."""
        own = map_inputs(lambda tensor: tensor.to(self.device), self._inputs_of_teacher(inputs, item))
        answers = [self.get_logits(answer) for answer in teacher(own)]
        if len(answers) == 1:
            return answers[0].float()
        first = one_a_row(answers[0])
        labels = self._labels(item, inputs, told=first.ndim > 2)
        matters = not self._objective.elementwise
        dim = self._positions.dim_of(first, labels, told=self.class_dim, matters=matters)
        binary = first.shape[dim] == 1 or self._objective.binary
        return teacher.combine([one_a_row(answer) for answer in answers], dim=dim, binary=binary).reshape(
            answers[0].shape
        )

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write ramps' windows and the student's hyperparameters; the student's own hook sees the file as its own."""
        student: Any = self.student
        hyperparameters = own_hyperparameters(student)
        if is_lightning(student):
            with student_view(checkpoint, hyperparameters) as view:
                call_student(student, "on_save_checkpoint", view)
                hyperparameters = {key: view[key] for key in hyperparameters if key in view}
        if self.hparams is getattr(student, "hparams", None):  # Lightning took them for this module's arguments
            for key in HYPERPARAMETERS:
                checkpoint.pop(key, None)
        ramps = {"alpha": self._alpha, "temperature": self._temperature}
        checkpoint[KEY] = {
            "version": 1,
            "recipe": self.recipe,
            "student": plain_hyperparameters(hyperparameters),
            "windows": {name: ramp.window.state_dict() for name, ramp in ramps.items() if ramp is not None},
            "asked": self._words(),
            "batches": self._taught_batches,
            "taught_by": dict(self._taught_by),
        }

    def _words(self) -> dict[str, Any]:
        """Return what is taught, and by whom, for the reader of a checkpoint."""
        words = {
            "loss": self._taught_by or self._objective.weights,
            "alpha": self._alpha.ramp,
            "temperature": None if self._temperature is None else self._temperature.ramp,
            "features": self.features,
            "teacher": [] if self._teacher is None else [type(each).__name__ for each in self._teacher.networks],
        }
        return {name: as_plain(value) for name, value in words.items()}

    def last_line(self) -> str:
        """Return the sentence that says what was asked, and in how many batches it ran."""
        asked = self._words()
        names = [*self._taught_by, *feature_names(self.features)]
        by = f" by {', '.join(asked['teacher'])}" if asked["teacher"] else ""
        if not self._taught_batches:
            return f"Distillation: asked {', '.join(asked['loss'])}{by}; no batch was taught."
        batches = "1 batch" if self._taught_batches == 1 else f"{self._taught_batches} batches"
        return f"Distillation: {', '.join(names)}{by}, in {batches}."

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give projectors the file's sizes (no teacher is needed), and take up the windows of a run that goes on."""
        for each in self._all_projectors():
            each.conform(checkpoint["state_dict"], self.device, self.dtype)
        if is_lightning(self.student):
            saved = checkpoint.get(KEY, {}).get("student", {}).get("keys") or own_hyperparameters(self.student)
            with student_view(checkpoint, saved) as view:
                call_student(self.student, "on_load_checkpoint", view)
        state = checkpoint.get(KEY)
        if state is None or self._trainer is None or self._trainer.state.fn != "fit":
            return
        for name, ramp in (("alpha", self._alpha), ("temperature", self._temperature)):
            if ramp is not None and name in state["windows"]:
                ramp.window.load_state_dict(state["windows"][name])
        self._taught_batches, self._taught_by = state.get("batches", 0), dict(state.get("taught_by", {}))
        self._restored = True


def _required(labels: Any, batch: Any) -> Any:
    if labels is None:
        raise TypeError(f"no labels in a batch of type {type(batch).__name__}. Override `targets(batch)`.")
    return labels


def _tensor(labels: Any, batch: Any) -> Tensor:
    if not isinstance(_required(labels, batch), Tensor):
        raise TypeError(
            f"the losses need labels as a tensor, one class a row, got {type(labels).__name__}. Override "
            "`targets(batch)`."
        )
    return cast("Tensor", labels)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
