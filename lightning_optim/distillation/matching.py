"""The features of a distillation in a run: their losses, their projectors, and what follows a channel removal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim.checks import check_count
from lightning_optim.depth.stacks import hidden_states
from lightning_optim.distillation.arguments import SEVERAL, apply_example
from lightning_optim.distillation.capture import Capture, find_layer, observe
from lightning_optim.distillation.counted import Counted
from lightning_optim.distillation.features import (
    Feature,
    candidate_layers,
    feature_names,
    pair_stacks,
    propose_features,
)
from lightning_optim.distillation.indexed import without_index
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.projectors import Projectors, new_projector
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.distillation.survivors import surviving_channels
from lightning_optim.modules import evaluating
from lightning_optim.sharding import is_sharded
from lightning_optim.structured.groups import Removal
from lightning_optim.tables import render
from lightning_optim.target import ForwardInputs, as_forward_inputs, averaged_copies, batch_inputs, map_inputs

__all__ = ["FeatureMatching"]


class FeatureMatching:
    """Matches layers of a distillation's student with layers of its teacher.

    Args:
        points: The distillation module.
        live: Its teacher.
        example_inputs: The arguments of the student's forward, which size projectors; None: the module's
            ``example_input_array``, or else the first training batch.
    """

    def __init__(self, points: SubclassPoints, live: LiveTeacher, example_inputs: Any) -> None:
        self.points = points
        self.live = live
        self.example = None if example_inputs is None else as_forward_inputs(example_inputs)

    def check_layers(self) -> None:
        """Check that the student has the layers that arguments name.

        Raises:
            ValueError: If it does not.
        """
        find_layer(self.points.student, self.points.logits_from, "logits_from")
        for feature in self.points.features:
            find_layer(self.points.student, feature.student, "feature")

    # The loss.

    def losses(
        self, captured: Capture, layers: Mapping[str, Tensor], call: int, item: Any, loss: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the loss of each feature by its name.

        Args:
            captured: What the student's layers returned.
            layers: What the teacher's layers returned, by name.
            call: Number of the student's call in this step.
            item: The batch without its index.
            loss: The loss that the student computed in this call, which tells whether it shifts the labels.
        """
        losses: dict[str, Tensor] = {}
        counted: Counted | None = None
        for position, (name, feature) in enumerate(self._named()):
            outputs = captured.outputs(feature.student)
            if call >= len(outputs):
                raise RuntimeError(f"feature {name!r}: the student's step never called its layer {feature.student!r}.")
            ours, theirs = outputs[call], layers[feature.teacher]
            if ours.ndim == 3 and counted is None:
                inputs, output = captured.calls[self.points.logits_from][call]
                counted = Counted.of_call(self.points, output, inputs, item, loss)
            mask = None if counted is None or ours.shape[:2] != theirs.shape[:2] else counted.of(feature.student, ours)
            if str(position) in self.points.projectors:
                ours = self.points.projectors[str(position)](ours)
            with torch.autocast(ours.device.type, enabled=False):
                losses[name] = feature.loss_of(ours, theirs, mask)
        return losses

    def weighted(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the loss of each feature times its weight."""
        return [feature.weight * losses[name] for name, feature in self._named()]

    def _named(self) -> list[tuple[str, Feature]]:
        features = self.points.features
        return list(zip(feature_names(features), features, strict=True))

    # Example inputs.

    def note_example(self, inputs: ForwardInputs) -> None:
        """Keep references to the inputs of a call: surviving channels are found with them."""
        if self.points.projectors:
            self.example = map_inputs(Tensor.detach, inputs)

    def _example_inputs(self) -> tuple[ForwardInputs, Any]:
        """Return the arguments of the student's forward, and the batch that they come from, if any."""
        example, item = self.example, None
        if example is None and self.points.example_input_array is not None:
            example = as_forward_inputs(self.points.example_input_array)
        if example is None:
            item = self._first_batch()
            example = batch_inputs(self.points._called, item)
        return apply_example(example, next(self.points.student.parameters(), None)), item

    def _teacher_inputs(self, inputs: ForwardInputs, item: Any) -> ForwardInputs:
        if item is None and is_overridden("teacher_inputs", self.points, SubclassPoints):
            item = self._first_batch()  # example inputs are the student's alone
        return self.live.inputs_for(inputs, item)

    def _first_batch(self) -> Any:
        """Return the first training batch, and leave loader and random state as they were."""
        if self.points._trainer is None:
            raise ValueError(
                "layers are sized by a forward pass: pass `example_inputs`. A module that overrides `teacher_inputs` "
                "needs a run's batch: call it during `fit`."
            )
        loader = self.points.trainer.fit_loop._data_source.dataloader()
        state = loader.state_dict() if hasattr(loader, "state_dict") else None
        with isolate_rng():
            batch = apply_to_collection(loader, DataLoader, lambda single: next(iter(single)))
            batch = next(iter(loader)) if batch is loader else batch
        if state is not None:
            loader.load_state_dict(state)
        return without_index(batch)

    # Projectors.

    def all_projectors(self) -> list[Projectors]:
        """Return the projectors of the module and of its averaged copies."""
        trainer = self.points._trainer
        copies: list[Any] = [] if trainer is None else averaged_copies(trainer)
        return [module.projectors for module in (self.points, *copies)]

    def size_projectors(self) -> None:
        """Create missing projectors, sized by one dry forward pass of student and teacher."""
        points = self.points
        missing = [
            i for i, feature in enumerate(points.features) if feature.projects and str(i) not in points.projectors
        ]
        if not missing:
            return
        if is_sharded(points.student):
            raise MisconfigurationException(
                "projectors are sized while the student is whole, and its own `configure_model` shards it. Let "
                "OptimFSDP2 shard it, or choose features that need no projector."
            )
        ours, theirs = self._observed([points.features[i] for i in missing])
        for i in missing:
            feature = points.features[i]
            projector = new_projector(ours[feature.student], theirs[feature.teacher], f"{feature.student}.{i}")
            for projectors in self.all_projectors():
                projectors.put(str(i), projector)

    def _observed(self, features: Sequence[Feature]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the layers of student and teacher return in one dry forward pass, by name."""
        teacher = self.live.required()
        inputs, item = self._example_inputs()
        with isolate_rng():
            ours = observe(self.points.student, self.points._called, inputs, [feature.student for feature in features])
            names = dict.fromkeys(feature.teacher for feature in features)
            with Capture(teacher.networks[0], names, "feature of the teacher") as captured:
                teacher(self._teacher_inputs(inputs, item))
        return ours, {name: captured.outputs(name)[0] for name in names}

    def join_optimizer(self, trainer: pl.Trainer) -> None:
        """Add projectors to the first group of the first optimizer.

        In place: a group of their own would break schedulers, which know the number of groups.
        """
        optimizers = trainer.optimizers
        if len(optimizers) > 1 and self.points.automatic_optimization:
            raise MisconfigurationException(SEVERAL.format(len(optimizers)))
        present = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.points.projectors.parameters() if id(p) not in present]
        if missing and not optimizers:
            raise MisconfigurationException("projectors are learned, and the student configures no optimizer.")
        if missing:
            optimizers[0].param_groups[0]["params"].extend(missing)

    # Proposals and removals.

    def propose(self, example_inputs: Any, loss: str, count: int | None) -> list[Feature]:
        """Propose pairs of layers, and print them as a table."""
        if count is not None:
            check_count("pairs", count)
        if example_inputs is not None:
            self.example = as_forward_inputs(example_inputs)
        student, called = self.points.student, self.points._called
        teacher = self.live.required().networks[0]
        inputs, item = self._example_inputs()
        teacher_inputs = self._teacher_inputs(inputs, item)
        stacks = _hidden_states(student, called, inputs), _hidden_states(teacher, teacher, teacher_inputs)
        ours, theirs = (_merged(blocks) for blocks in stacks)
        pairs = pair_stacks(*stacks, loss=loss, pairs=count)
        if not pairs:
            with isolate_rng():
                ours = observe(student, called, inputs, candidate_layers(student))
                theirs = observe(teacher, teacher, teacher_inputs, candidate_layers(teacher))
            pairs = propose_features(ours, theirs, loss, count)
        rows = [
            (
                pair.student,
                str(tuple(ours[pair.student].shape[1:])),
                pair.teacher,
                str(tuple(theirs[pair.teacher].shape[1:])),
            )
            for pair in pairs
        ]
        rank_zero_info(render("Proposed features", ("student", "shape", "teacher", "shape"), rows))
        return pairs

    def follow_removal(self, target: nn.Module, removal: Removal) -> Callable[[pl.Trainer], None]:
        """Return a function that removes the projectors' inputs after channels were removed from the student.

        Args:
            target: The student, or the module below it that loses channels.
            removal: What is kept of ``target``, before the removal.
        """
        points = self.points
        if not points.projectors:
            return lambda trainer: None
        inside = next(f"{name}." if name else "" for name, module in points.student.named_modules() if module is target)
        removal = Removal(
            {inside + name: kept for name, kept in removal.kept.items()},
            {inside + name: shape for name, shape in removal.shapes.items()},
            {(inside + name).rstrip("."): values for name, values in removal.attributes.items()},
        )
        projected = {i: points.features[int(i)].student for i in points.projectors}
        inputs, _ = self._example_inputs()
        kept = surviving_channels(points.student, points.logits_from, inputs, set(projected.values()), removal)

        def follow(trainer: pl.Trainer) -> None:
            for i, layer in projected.items():
                if layer in kept:
                    for projectors in self.all_projectors():
                        projectors.keep_inputs(i, kept[layer], trainer.optimizers)

        return follow


def _hidden_states(network: nn.Module, called: nn.Module, inputs: ForwardInputs) -> dict[str, dict[str, Tensor]]:
    """Return the stacks of a network and the hidden states of their blocks, from one call of a part of it."""
    with evaluating(network):
        return hidden_states(network, lambda _: [inputs.call(called)])


def _merged(stacks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {block: state for blocks in stacks.values() for block, state in blocks.items()}
