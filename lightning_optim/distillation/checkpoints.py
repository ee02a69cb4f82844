"""What a distillation adds to a checkpoint and reads from it: projectors, ramps, and a record of what was taught."""

from dataclasses import dataclass
from typing import Any

from lightning_optim.distillation.features import feature_names
from lightning_optim.distillation.step import Step
from lightning_optim.distillation.student import (
    HYPERPARAMETERS,
    KEY,
    load_student,
    own_hyperparameters,
    plain_hyperparameters,
    save_student,
)
from lightning_optim.provenance import as_plain
from lightning_optim.sharding import own_class

__all__ = ["Checkpoints"]


@dataclass(eq=False)
class Checkpoints:
    """Writes and reads the checkpoints of a distillation, and tells what it did."""

    step: Step

    def write(self, file: dict[str, Any], recipe: Any) -> None:
        """Add the distillation to a checkpoint; the student's own hook sees the file as its own.

        Args:
            file: The checkpoint.
            recipe: The recipe's arguments for the distillation, if it was made by one.
        """
        points: Any = self.step.points
        hyperparameters = save_student(points.student, file)
        if points.hparams is getattr(points.student, "hparams", None):  # Lightning took them for this module's own
            for key in HYPERPARAMETERS:
                file.pop(key, None)
        file[KEY] = {
            "version": 1,
            "recipe": recipe,
            "student": plain_hyperparameters(hyperparameters),
            "windows": self.step.ramps.state_dict(),
            "asked": self._asked(),
            "batches": self.step.batches,
            "steps": self.step.ramps.step,
            "taught_by": dict(self.step.comparison.compared_by),
            "layers": [feature.student for feature in points.features],
        }

    def read(self, file: dict[str, Any]) -> None:
        """Give projectors the sizes in a checkpoint (this needs no teacher), and restore a run that continues."""
        points: Any = self.step.points
        for projectors in self.step.matching.all_projectors():
            projectors.conform(file["state_dict"], points.device, points.dtype)
        state = file.get(KEY)
        saved = {} if state is None else state.get("student", {}).get("keys")
        load_student(points.student, file, saved or own_hyperparameters(points.student))
        if state is None or points._trainer is None or points._trainer.state.fn != "fit":
            return
        layers = state.get("layers", [])
        if len(layers) == len(points.features):  # blocks of the student may have moved since the features were named
            points.name_features(layers)
        self.step.ramps.load_state_dict(state["windows"])
        self.step.batches = state.get("batches", 0)
        self.step.ramps.step = state.get("steps", 0)
        self.step.comparison.compared_by = dict(state.get("taught_by", {}))

    def _asked(self) -> dict[str, Any]:
        """Return the losses, features and teachers, for the reader of a checkpoint."""
        points, ramps, teacher = self.step.points, self.step.ramps, self.step.live.teacher
        asked = {
            "loss": self.step.comparison.compared_by or points._objective.weights,
            "alpha": ramps.alpha.ramp,
            "temperature": None if ramps.temperature is None else ramps.temperature.ramp,
            "features": points.features,
            "teacher": [] if teacher is None else [own_class(network).__name__ for network in teacher.networks],
        }
        return {name: as_plain(value) for name, value in asked.items()}

    def sentence(self) -> str:
        """Return the sentence that says what was asked, and in how many batches it ran."""
        asked = self._asked()
        names = [*self.step.comparison.compared_by, *feature_names(self.step.points.features)]
        by = f" by {', '.join(asked['teacher'])}" if asked["teacher"] else ""
        if not self.step.batches:
            return f"Distillation: asked {', '.join(asked['loss'])}{by}; no batch was taught."
        batches = "1 batch" if self.step.batches == 1 else f"{self.step.batches} batches"
        return f"Distillation: {', '.join(names)}{by}, in {batches}."
