"""DistillationModule: a student trained on its labels and a teacher, inside the Trainer that it has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import checkpoint
from lightning_optim.change import Changed
from lightning_optim.checks import check_flags, listed
from lightning_optim.distillation.arguments import (
    SEVERAL,
    check_cache,
    check_chunk_size,
    check_student,
    classes_of,
    optimizers_of,
)
from lightning_optim.distillation.cached import CachedTeacher
from lightning_optim.distillation.checkpoints import Checkpoints
from lightning_optim.distillation.features import Feature
from lightning_optim.distillation.hooks import builds_layers_in, call_student, install_hooks, is_lightning
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.logits import LogitComparison
from lightning_optim.distillation.matching import FeatureMatching
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.places import followed
from lightning_optim.distillation.positions import Positions
from lightning_optim.distillation.projectors import Projectors
from lightning_optim.distillation.ramp import Ramp, Ramps
from lightning_optim.distillation.step import Step
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.distillation.teacher import Teacher
from lightning_optim.distillation.wrapper import StandsForStudent, take_settings
from lightning_optim.functional.losses import Loss
from lightning_optim.strategies.common import check_supported
from lightning_optim.structured.groups import Removal

__all__ = ["DistillationModule"]


class DistillationModule(StandsForStudent, SubclassPoints):
    """Train a student with ``(1 - alpha) * task + alpha * distillation + sum of weighted features``.

    The student's own step, optimizer, metrics and hooks run unchanged; with ``alpha=0`` the run is the student's own,
    bit for bit. A hook records its inputs and outputs, and the teacher gets the same inputs. The teacher is in no
    checkpoint, optimizer, DDP bucket, averaged copy or pickle; a file loads without it, and validating, testing,
    predicting and exporting need none. Compression callbacks act on the student (:attr:`optim_target`).

    Measure whether a teacher helps: with all labels and a teacher that knows them by heart there was no gain, and label
    smoothing (``loss="label_smoothing"``) was as good; with few labels and unlabeled data the gain was large.

    Args:
        student: A LightningModule, or a plain module. If it optimizes manually, the teacher's loss joins the loss that
            its step gives to ``manual_backward``, once a batch; it may have several optimizers then.
        teacher: A module (a LightningModule, also a compressed one), several in a list, or ``[(module, weight), ...]``:
            the log of their mean probability. It is frozen in place. None if nothing is trained. It must not share
            parameters with the student; for self-distillation pass a deep copy.
        loss: Name in ``functional.losses.LOSSES``, a callable of the same signature, or ``{name: weight}`` for several.
            None: ``"kd"``, or ``"bce"`` if a row has one logit.
        alpha: Weight of the distillation loss in [0, 1], or a :class:`Ramp`.
        temperature: > 0, or a :class:`Ramp`; None: each loss uses the value of its paper (kd 4, dkd 4, logit_std 2,
            dist, jsd and reverse_kd 1). Losses without temperature do not get it.
        logits_from: Name of the student's layer whose output are the logits, if its step does not call its own
            ``forward`` but, for example, ``self.net(x)``: ``"net"``.
        features: ``(student layer, teacher layer[, loss[, weight]])`` each, or :class:`Feature`; see
            :meth:`match_features`. Features are those of the first teacher. ``"model.layers.-1"`` is the last block of
            a stack, whichever it is. The feature of a layer that returns several tensors is the first.
        cache: File for the teacher's logits: computed once at fit start, then read. The training dataset must be an
            :class:`IndexedDataset` without augmentation. Texts may differ in length; positions that do not count are
            not stored. A run that is killed meanwhile goes on where it stopped.
        cache_top_k: Keep only the k likeliest classes of each row and the probability of the rest, 6 k + 2 bytes, for
            large vocabularies: losses compare k + 1 classes (``functional.losses.over_top_k``). k = classes equals the
            live teacher within float16. For losses that compare probabilities (kd, reverse_kd, jsd, listwise).
        teacher_classes: Indices of the teacher's outputs that are the student's classes, in the student's order.
        teacher_autocast: Dtype of the teacher's autocast (``torch.bfloat16``); None: its own precision.
        chunk_size: Rows (samples, or positions of sequences) that are compared at a time, so that no loss keeps tensors
            of the logits' size; the gradients are the same. An int >= 1; ``"auto"``: all at once below 64 MB of
            float32 logits, else 16 MB; None: all at once. The head of a teacher that returns its last Linear's output
            is called for the same rows, so its logits are never whole.
        divide_teacher: Whether strategies that divide the student and free its units (``optim_fsdp``, ``optim_hsdp``,
            ``optim_2d``) divide the teacher too, in place: each device holds a shard, and gathers a block while it
            computes. False: whole on every device, as under all other strategies; faster if it fits.
        example_inputs: Arguments of the student's forward, which size projectors. Default: its ``example_input_array``,
            or else the first training batch.
        optimizer: For a plain student: ``parameters -> optimizer``, such as ``partial(torch.optim.Adam, lr=1e-3)``.
        task_loss: For a plain student: ``(logits, targets) -> scalar``; default the ``loss`` in its output if it has
            one, or else cross-entropy (binary if a row has one logit).

    Which rows are compared: logits are ``[rows, ..., classes]``, or ``[rows, classes, ...]`` if the labels have that
    shape without dimension 1. Positions labeled -100 are left out; samples labeled -100 are not, since a teacher needs
    no label, but losses that need labels skip them. A mask of the output's positions counts too: a decoder's, not its
    encoder's. If the model compares each position with the next label, as causal language models of Hugging Face do,
    the losses here do the same. Calls of the student without gradients do not count. Features of sequences are compared
    at the same positions; where the logits have none, at those that are no padding.

    Subclass points: :meth:`get_logits`, :meth:`teacher_inputs`, :meth:`targets`, :meth:`padding_mask`,
    :meth:`sample_index`, :meth:`kd_loss`, :meth:`task_loss`, ``configure_optimizers``; :attr:`class_dim` and
    :attr:`shift_labels`; :attr:`taught_backward` and :attr:`accumulated_batches` for manual optimization.

    Logged: ``distillation/task``, ``distillation/<loss>`` for each loss of logits, ``distillation/<student layer>``:
    means over the epoch, not weighted by ``alpha``. Until 0.4 also ``distillation/kd``, the weighted sum of the losses
    of logits, whatever their names (of several each as ``distillation/kd/<loss>`` too).

    State: ``student.*`` and ``projectors.*`` in ``state_dict()``; windows of ramps. A resumed run continues bit for bit
    if the student's own would. Strategies: a single device, DDP, and all that shard the model. Inference is not faster
    by this: the student is.

    Raises:
        TypeError: If ``student`` or ``teacher`` is not a module.
        ValueError: If an argument is out of range, a layer does not exist, or teacher and student share parameters.
        MisconfigurationException: In the run, if a student that optimizes manually calls ``manual_backward`` several
            times a batch or not at all, or accumulates batches, and the module is not told how (``taught_backward``,
            ``accumulated_batches``).

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".

    Examples:
        >>> from lightning_optim.demo import DigitsNet
        >>> module = DistillationModule(DigitsNet(8), DigitsNet(32), alpha=0.5, temperature=4.0)
        >>> losses = {"kd": 1.0, "dist": 0.5}
        >>> module = DistillationModule(DigitsNet(8), DigitsNet(32), loss=losses, features=[("net.3", "net.3", "hint")])
    """

    recipe: Mapping[str, Any] | None = None
    """The part of a recipe that made this module, for the checkpoint."""

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
        cache_top_k: int | None = None,
        teacher_classes: Sequence[int] | None = None,
        teacher_autocast: torch.dtype | None = None,
        chunk_size: int | str | None = "auto",
        divide_teacher: bool = True,
        example_inputs: Any = None,
        optimizer: Callable[[Any], Optimizer] | None = None,
        task_loss: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_student(student, optimizer, task_loss)
        if not isinstance(logits_from, str):
            raise TypeError(f"`logits_from` must be the name of a layer of the student, got {logits_from!r}.")
        check_flags(divide_teacher=divide_teacher)
        self.projectors = Projectors()
        self.logits_from = logits_from
        self.features = [Feature.of(feature) for feature in listed("features", features, "pairs of layers")]
        self.teacher_classes = None if teacher_classes is None else classes_of(teacher_classes)
        self.student = student  # from here on, a public attribute that is set may be the student's
        self._optimizer, self._task_loss = optimizer, task_loss
        self._divide_teacher = divide_teacher
        self._ramps = Ramps(alpha, temperature)
        self._objective = LogitLosses.of(loss)
        self._positions = Positions()
        check_cache(cache, cache_top_k, self._objective, features)
        self._live = LiveTeacher(self, teacher_autocast)
        self._cached = None if cache is None else CachedTeacher(self, self._live, Path(cache), cache_top_k)
        self._matching = FeatureMatching(self, self._live, example_inputs)
        comparison = LogitComparison(self, self._ramps, self._live, check_chunk_size(self, chunk_size))
        self._step = Step(self, self._ramps, self._live, self._cached, self._matching, comparison)
        self._checkpoints = Checkpoints(self._step)
        self.set_teacher(teacher)
        checkpoint.share_plan(self, "student")
        if is_lightning(student):
            take_settings(self, student)
        install_hooks(self, student)
        if not builds_layers_in(student, "setup", "configure_model"):
            self._matching.check_layers()

    @property
    def optim_target(self) -> nn.Module:
        """The module that compression callbacks act on."""
        return self.student

    # The teacher.

    @property
    def teacher(self) -> Teacher | None:
        """The teacher's handle; None if there is none."""
        return self._live.teacher

    def set_teacher(self, teacher: Any) -> None:
        """Give the module a teacher, or None: anything that the argument ``teacher`` accepts.

        Raises:
            TypeError: If it is not a module.
            ValueError: If it shares parameters with the student, or lacks the layer of a feature.
        """
        self._live.set(teacher)

    def frozen_beside(self) -> tuple[list[nn.Module], bool]:
        """Return the networks that take memory beside the student, and whether strategies that divide it divide them.

        :func:`~lightning_optim.strategies.recommend` counts them.
        """
        networks = [] if self.teacher is None else self.teacher.networks
        return list(dict.fromkeys(networks)), self._divide_teacher

    @property
    def lacks_teacher(self) -> bool:
        """Whether a fit would need a teacher, or a cache of its logits, and there is neither."""
        return self._step.needs_teacher and self._cached is None and self.teacher is None

    def match_features(
        self, example_inputs: Any = None, *, loss: str = "hint", pairs: int | None = None
    ) -> list[Feature]:
        """Propose pairs of layers, and print them: a value for ``features``.

        Stacks of blocks (those that :class:`~lightning_optim.DepthPruning` finds, from two blocks on) are paired block
        by block and evenly: the last with the last, of 30 and 20 blocks every third of the 30 is left out. Images are
        paired by resolution (the last layer of each), everything else by relative depth. It is a proposal: check it.

        Args:
            example_inputs: Arguments of the student's forward; default as for the argument of the class.
            loss: The loss of every pair.
            pairs: How many pairs a stack gives at most, evenly spaced; 1: its last blocks. None: one for each block of
                the shorter stack.

        Raises:
            MisconfigurationException: If there is no teacher.
        """
        return self._matching.propose(example_inputs, loss, pairs)

    # The student's steps.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the student's own step, and add the losses against the teacher for the same inputs."""
        return self._step.run(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means of the parts of the loss."""
        self._step.log_epoch()

    def configure_optimizers(self) -> Any:
        """Return the student's optimizers; projectors join the first group of the first one at fit start.

        Raises:
            MisconfigurationException: If there are several without manual optimization, or a plain student has none.
        """
        if is_lightning(self.student):
            configured = call_student(self.student, "configure_optimizers")
            optimizers = [entry for entry in optimizers_of(configured) if isinstance(entry, (Optimizer, Mapping))]
            if len(optimizers) > 1 and self.automatic_optimization:
                raise MisconfigurationException(SEVERAL.format(len(optimizers)))
            return configured
        if self._optimizer is None:
            raise MisconfigurationException(
                "a plain module as student needs an optimizer: optimizer=partial(torch.optim.Adam, lr=1e-3), or "
                "override `configure_optimizers`."
            )
        return self._optimizer(self.student.parameters())

    # Around a run.

    def setup(self, stage: str) -> None:
        """Run the student's ``setup``, check what the run needs, and size projectors before weights are loaded."""
        call_student(self.student, "setup", stage)
        if stage != "fit":
            return
        check_student(self.student, self._optimizer, self._task_loss)
        check_supported("DistillationModule", self.trainer.strategy)
        if self.lacks_teacher:
            self._live.required()
        if not builds_layers_in(self.student, "configure_model"):
            self._matching.check_layers()
            self._matching.size_projectors()

    def before_sharding(self, trainer: pl.Trainer) -> None:
        """Size the projectors of layers that ``configure_model`` built, while the student is whole."""
        if trainer.state.fn == "fit":
            self._matching.check_layers()
            self._matching.size_projectors()

    def on_fit_start(self) -> None:
        """Resolve ramps, compare teachers between ranks and divide them, open the cache, give projectors an optimizer.

        The student's own hook runs last: it may read what was prepared here.
        """
        self._matching.check_layers()
        self._matching.size_projectors()
        self._ramps.begin(self.trainer, automatic_optimization=self.automatic_optimization)
        self._matching.join_optimizer(self.trainer)
        checksum = self._live.checksum_for(self.trainer, needed=self._cached is not None)
        self._live.divide(self.trainer, wanted=self._divide_teacher)
        if self._cached is not None and not self._ramps.alpha.never:
            self._cached.open(self.trainer, checksum)
        call_student(self.student, "on_fit_start")

    def teardown(self, stage: str) -> None:
        """Run the student's ``teardown``; changes to the student are then in its own checkpoints too."""
        call_student(self.student, "teardown", stage)
        checkpoint.share_plan(self, "student")

    def follow_removal(self, target: nn.Module, removal: Removal) -> Callable[[pl.Trainer], None]:
        """Return a function that makes projectors follow a removal of channels from the student.

        It is asked before the channels are removed, and the function is called after.

        Raises:
            ValueError: If the channels of a projected feature cannot be followed.
        """
        return self._matching.follow_removal(target, removal)

    def read_layers(self) -> dict[str, str]:
        """Return the layers that features read, by their names in this module, and which feature it is."""
        return {f"student.{feature.student}": f"feature {feature.student!r}" for feature in self.features}

    def follow_layers(self, changed: Changed) -> None:
        """Rename the layers of features after blocks of the student moved; places from the end stay as they are."""
        names = [followed(f"student.{feature.student}".rstrip("."), changed.layer) for feature in self.features]
        self.name_features([name and name.removeprefix("student").removeprefix(".") for name in names])

    def name_features(self, names: Sequence[str | None]) -> None:
        """Give features the present names of their layers; one whose layer is gone keeps its name."""
        self.features = [
            feature if name is None else replace(feature, student=name)
            for feature, name in zip(self.features, names, strict=True)
        ]

    # Checkpoints and reports.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the windows of ramps and the student's hyperparameters."""
        self._checkpoints.write(checkpoint, self.recipe)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give projectors the file's sizes, and restore the windows of a run that continues."""
        self._checkpoints.read(checkpoint)

    def last_line(self) -> str:
        """Return the sentence that says what was asked, and in how many batches it ran."""
        return self._checkpoints.sentence()
