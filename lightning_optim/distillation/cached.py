"""The cached teacher of a distillation: its file is built at fit start where it is missing, and then read."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_optim.distillation.cache import LogitCache
from lightning_optim.distillation.cache_file import LOWEST, Identity
from lightning_optim.distillation.cache_parts import Part, join_parts, parts_of, remove_parts, samples_in
from lightning_optim.distillation.heads import Answer, rows_of_answer
from lightning_optim.distillation.indexed import batches_once, dataset_length, reading, without_index
from lightning_optim.distillation.layout import Layout
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.positions import Positions, one_a_row
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.functional.chunks import RowPlaces, chunk_rows
from lightning_optim.functional.losses import TopK, top_k_of
from lightning_optim.progress import progress_bar
from lightning_optim.target import ForwardInputs, batch_inputs, map_inputs

__all__ = ["CachedAnswers", "CachedTeacher"]

Result = TypeVar("Result")

_CLOSE = 2e-2
_FINAL = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MisconfigurationException)
"""Errors that come again with the same data: what was written before them is of no use."""
_SHARED = (*_FINAL, RuntimeError, OSError)


@dataclass(eq=False)
class CachedTeacher:
    """Builds and reads the file of a distillation's teacher, on a disk that all ranks see.

    Each rank writes its batches to a part beside the file; rank 0 joins them. A run that is killed leaves the parts,
    and the next one goes on with the samples that they lack.
    """

    points: SubclassPoints
    live: LiveTeacher
    path: Path
    top_k: int | None = None
    cache: LogitCache | None = None
    _proven: bool = True

    def open(self, trainer: Any, checksum: str | None) -> None:
        """Open the file on every rank; if it does not exist, all ranks write it first.

        Args:
            trainer: The run.
            checksum: The teacher's; None: any.

        Raises:
            ValueError: If it is of another teacher, dataset or k, or damaged.
        """
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        rows = dataset_length(loader)
        if not trainer.strategy.broadcast(self.path.exists(), src=0):
            self._build(trainer, loader, checksum)
        expected: dict[str, Any] = {"teacher": checksum, "top_k": self.top_k or 0, "chosen": self._chosen()}
        self.cache = _together(trainer, lambda: LogitCache(self.path, rows=rows, **expected))
        rank_zero_info(_summary(self.cache))
        self._proven = False

    def _chosen(self) -> str:
        """Return what identifies ``teacher_classes`` if the k likeliest are among them."""
        chosen = self.points.teacher_classes
        if self.top_k is None or chosen is None:
            return ""
        return hashlib.blake2b(repr(chosen).encode(), digest_size=8).hexdigest()

    def _build(self, trainer: Any, loader: Any, checksum: str | None) -> None:
        rank = trainer.global_rank

        def missing() -> list[Sequence[int]]:
            """Return the batches with samples that no part holds; rank 0 decides, for all read other files by now."""
            self.live.required()
            if rank:
                return []
            expected = {"teacher": checksum, "top_k": self.top_k or 0, "chosen": self._chosen()}
            held = samples_in(parts_of(self.path), dataset_length(loader), **expected)
            return [batch for batch in batches_once(loader) if not held[list(batch)].all()]

        with isolate_rng():
            batches = trainer.strategy.broadcast(_together(trainer, missing), src=0)
            part = Part(self.path.with_name(f".{self.path.name}.part{rank}"))
            try:
                _together(trainer, lambda: self._write(trainer, part, loader, batches, checksum))
            finally:
                part.close()
        _together(trainer, lambda: None if rank else self._join(dataset_length(loader)))

    def _join(self, samples: int) -> None:
        parts = parts_of(self.path)
        join_parts(self.path, parts, samples)
        remove_parts(parts)

    def _write(
        self, trainer: Any, part: Part, loader: Any, batches: Sequence[Sequence[int]], checksum: str | None
    ) -> None:
        """Ask the teacher for this rank's batches, and append its answers to this rank's part.

        Every rank calls it as often as the others, because the forward of a teacher that is divided among them waits
        for all: one without a batch left repeats the first.
        """
        own = list(batches[trainer.global_rank :: trainer.world_size])
        asked = [*own, *batches[:1]] if len(own) < -(-len(batches) // trainer.world_size) else own
        positions = Positions()  # a build leaves no trace in what training decides later
        try:
            with progress_bar(f"teacher logits -> {self.path.name}", len(asked), shown=_has_bar(trainer)) as advance:
                for number, batch in enumerate(reading(loader, asked)):
                    identity, index, counts, answers = self._answer(batch, positions, checksum, dataset_length(loader))
                    if number < len(own):
                        part.add(identity, index, counts, answers)
                    advance()
        except _FINAL:
            part.close()
            remove_parts([part.path])
            raise

    def _answer(
        self, batch: Any, positions: Positions, checksum: str | None, samples: int
    ) -> tuple[Identity, Tensor, Tensor, Tensor | TopK]:
        """Return what the cache is of, and the samples of a batch, the number of their rows, and the rows."""
        points, item = self.points, without_index(batch)
        index = torch.as_tensor(points.sample_index(batch)).reshape(-1).cpu()
        inputs = map_inputs(lambda tensor: tensor.to(points.device), batch_inputs(points._called, item))
        answers, logits, layout = self._ask(inputs, item, positions)
        answered = layout.answered(logits, points)
        places = RowPlaces.of(logits, layout.dim, _on(answered, logits))
        classes = logits.shape[layout.dim]
        if self.top_k is not None and points.teacher_classes is not None:
            classes = len(points.teacher_classes)
        if self.top_k is not None and self.top_k > classes:
            raise ValueError(
                f"`cache_top_k` is {self.top_k}, and the teacher has {classes} classes. Pass at most that many, or "
                "leave it out: then the logits of all are cached."
            )
        class_dim = 1 if layout.dim == 1 and logits.ndim > 2 else -1
        identity = Identity(str(checksum), samples, classes, self.top_k, self._chosen(), class_dim)
        counts = _counts(answered, logits, layout.dim, len(index))
        return identity, index, counts, self._kept(answers, places)

    def _ask(self, inputs: ForwardInputs, item: Any, positions: Positions) -> tuple[list[Answer], Tensor, Layout]:
        """Return what each teacher answers, a tensor of the shape of the first one's logits, and how they lie.

        Where k words are kept, a head that can be called alone is called later, for some rows at a time.
        """
        points, live = self.points, self.live
        own = map_inputs(lambda tensor: tensor.to(points.device), live.inputs_for(inputs, item))
        answers = [
            one_a_row(answer) if isinstance(answer, Tensor) else answer
            for answer in live.answers(own, classes=self._least_classes())
        ]
        logits = answers[0] if isinstance(answers[0], Tensor) else answers[0].like()
        layout = Layout.of(points, logits, inputs, item, positions=positions)
        if layout.dim != logits.ndim - 1:  # the classes of a Linear's output are last: it is another layout
            answers = [answer if isinstance(answer, Tensor) else answer.whole() for answer in answers]
        return answers, logits, layout

    def _least_classes(self) -> int | None:
        """Return how many outputs the teacher's head has at least; None if all logits are kept."""
        chosen = self.points.teacher_classes
        if self.top_k is None:
            return None
        return self.top_k if chosen is None else max(self.top_k, len(chosen))

    def _rows(self, answers: Sequence[Answer], places: RowPlaces, part: slice, *, choose: bool) -> Tensor:
        """Return the logits of all teachers combined for some rows: of all classes, or of those chosen of them."""
        own = [rows_of_answer(answer, places, part) for answer in answers]
        rows = self.live.combine(own, -1, one_logit=own[0].shape[-1] == 1)
        chosen = self.points.teacher_classes
        return rows[:, chosen] if choose and chosen is not None else rows

    def _kept(self, answers: Sequence[Answer], places: RowPlaces) -> Tensor | TopK:
        """Return what the file keeps of the rows; k words are found some rows at a time."""
        if self.top_k is None:
            return self._rows(answers, places, slice(None), choose=False)
        size = max(chunk_rows("auto", len(places), answers[0].shape[places.dim]), 1)
        parts = [
            top_k_of(self._rows(answers, places, slice(start, start + size), choose=True), self.top_k)
            for start in range(0, max(len(places), 1), size)
        ]
        return TopK(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def answers(self, inputs: ForwardInputs, batch: Any) -> "CachedAnswers":
        """Return the cached answers to a batch.

        Args:
            inputs: The arguments of the student's forward. In the first batch the teacher, if there is one, answers
                them too.
            batch: The batch with its index.

        Raises:
            ValueError: If the teacher's answers to the first batch differ from the cached ones.
        """
        if self.cache is None:
            raise RuntimeError("no cache is open.")
        index = torch.as_tensor(self.points.sample_index(batch)).reshape(-1).cpu()
        cached = CachedAnswers(self.cache, index, self.points)
        if not self._proven and self.live.teacher is not None:
            self._proven = True
            self._prove(cached, inputs, without_index(batch))
        return cached

    def _prove(self, cached: "CachedAnswers", inputs: ForwardInputs, item: Any) -> None:
        answers, logits, layout = self._ask(inputs, item, Positions())
        answered = layout.answered(logits, self.points)
        places = RowPlaces.of(logits, layout.dim, _on(answered, logits))
        live = self._rows(answers, places, slice(None), choose=True).float()
        stored = cached.rows(logits, layout, answered, live.shape[-1])
        if isinstance(stored, TopK):
            scale = live.masked_fill(live.isinf(), 0.0).abs().amax(-1, keepdim=True)  # of the rounding of logits
            distance = live.log_softmax(-1).gather(-1, stored.words).clamp_min(LOWEST) - stored.log_probabilities
            close = bool((distance.abs() <= _CLOSE * (1.0 + scale)).all())
        else:
            close = live.shape == stored.shape and torch.allclose(live, stored, rtol=_CLOSE, atol=_CLOSE)
        if not close:
            raise ValueError(
                f"the cache {str(self.path)!r} does not hold the teacher's answers to this batch. The inputs must "
                "be the same each time (no augmentation, no shuffling before IndexedDataset); if student and "
                "teacher read batches differently, override `teacher_inputs(batch)`."
            )


@dataclass(frozen=True)
class CachedAnswers:
    """A teacher's answers to the samples of one batch, in a file.

    Attributes:
        cache: The file.
        index: The samples, ``[n]``.
        points: The distillation.
    """

    cache: LogitCache
    index: Tensor
    points: SubclassPoints

    @property
    def class_dim(self) -> int:
        """The dimension of the teacher's output that holds the classes."""
        return self.cache.identity.class_dim

    def rows(self, logits: Tensor, layout: Layout, keep: Tensor | None, classes: int) -> Tensor | TopK:
        """Return the answers for the rows that count, on the device of the logits.

        Args:
            logits: The student's.
            layout: How they lie.
            keep: The positions that count, ``[rows, positions...]``; None: all.
            classes: Number of classes that are compared.

        Returns:
            Logits ``[rows, classes]``, or the k likeliest classes of each row.

        Raises:
            ValueError: If other positions count than when the file was written, or the classes differ.
        """
        answered = layout.answered(logits, self.points)
        self._check_classes(classes)
        self._check(_counts(answered, logits, layout.dim, len(self.index)))
        stored = self.cache.read(self.index)
        chosen = self.points.teacher_classes
        if isinstance(stored, Tensor) and chosen is not None:
            stored = stored[:, chosen]
        which = None
        if keep is not None:
            which = (keep if answered is None else keep[answered.to(keep.device)]).reshape(-1)
        if isinstance(stored, TopK):
            moved = TopK(*(tensor.to(logits.device) for tensor in stored))
            return moved if which is None else moved.rows(which.to(logits.device))
        moved_logits = stored.to(logits.device)
        return moved_logits if which is None else moved_logits[which.to(logits.device)]

    def _check_classes(self, classes: int) -> None:
        chosen, stored = self.points.teacher_classes, self.cache.identity.classes
        if self.cache.identity.top_k is None and chosen is not None:
            stored = len(chosen)
        if classes != stored:
            raise ValueError(
                f"the student has {classes} classes, and the cache {str(self.cache.path)!r} is of a teacher with "
                f"{stored}. If the teacher has other classes, pass the student's as `teacher_classes`; if the file is "
                "of another model, delete it, or pass another path as `cache`."
            )

    def _check(self, counts: Tensor) -> None:
        stored = self.cache.counts(self.index)
        if not torch.equal(stored, counts):
            place = int((stored != counts).nonzero()[0])
            raise ValueError(
                f"the cache {str(self.cache.path)!r} holds {int(stored[place])} rows of sample "
                f"{int(self.index[place])}, and {int(counts[place])} of its positions count in this batch. Which "
                "positions count must not depend on the batch: label padding -100, or pass an attention mask; if the "
                "student's step makes its labels itself, override `targets(batch)`. If labels or texts have changed, "
                "delete the file, and it is computed again."
            )


def _on(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(logits.device)


def _counts(answered: Tensor | None, logits: Tensor, dim: int, samples: int) -> Tensor:
    """Return how many rows of logits belong to each sample, ``[samples]``."""
    if logits.shape[0] % max(samples, 1) or not samples:
        raise ValueError(
            f"the logits have {logits.shape[0]} rows for {samples} samples, so the rows of a sample are not known. "
            "Override `get_logits(output)`: [samples, classes], or [samples, positions, classes]."
        )
    if answered is None:
        return torch.full((samples,), logits.numel() // logits.shape[dim] // samples)
    return answered.reshape(samples, -1).sum(1).cpu()


def _has_bar(trainer: Any) -> bool:
    return bool(getattr(trainer.progress_bar_callback, "is_enabled", False))


def _summary(cache: LogitCache) -> str:
    """Return the line that says what the file holds, and what it takes."""
    identity = cache.identity
    kept = f"logits of {identity.classes:,} classes"
    if identity.top_k is not None:
        kept = f"the {identity.top_k:,} likeliest of {identity.classes:,} classes and the rest"
    unit = "sample" if cache.rows == identity.samples else "position"
    of = "" if cache.rows == identity.samples else f" of {identity.samples:,} samples"
    size = f"{cache.rows:,} {unit}s{of}, {cache.path.stat().st_size / 1e6:,.1f} MB"
    return f"Teacher from {str(cache.path)!r}: {kept}, {cache.bytes_per_row:,} bytes a {unit}, {size}."


def _together(trainer: Any, work: Callable[[], Result]) -> Result:
    """Do a part of the work on every rank; an error of one is raised on all, or the others would wait forever."""
    problem: Exception | None = None
    result: Any = None
    try:
        result = work()
    except _SHARED as error:
        problem = error
    if trainer.world_size > 1:
        strategy = trainer.strategy
        if not strategy.reduce_boolean_decision(problem is None, all=True):
            problems = [strategy.broadcast(problem, src=rank) for rank in range(trainer.world_size)]
            problem = problem or next(other for other in problems if other is not None)
    if problem is not None:
        raise problem
    return result  # type: ignore[no-any-return]
