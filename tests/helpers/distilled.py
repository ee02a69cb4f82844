"""Teachers and distillations that tests share."""

import torch
from torch import nn

from helpers.models import CLASSES, FEATURES, Classifier, ConvNet, new
from lightning_optim.distillation import DistillationModule


class Teacher(nn.Module):
    """Wider than the student, with what misbehaves outside eval mode."""

    def __init__(self, width: int = 24, classes: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))


class ConvTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))

    def forward(self, x):
        return self.head(self.body(x))


def teacher(cls: type = Teacher, seed: int = 11, **init):
    torch.manual_seed(seed)
    return cls(**init)


def distilled(student=None, *, of=None, **words) -> DistillationModule:
    """A distillation of the shared student by the shared teacher."""
    given = teacher() if of is None else of
    return DistillationModule(new(Classifier) if student is None else student, given, **words)


HINT = [("net.2", "body.2", "hint", 0.5)]
IMAGES = [("net.3", "body.2", "hint", 0.5), ("net.5", "body.2", "attention_transfer")]


def conv_distilled(**words) -> DistillationModule:
    return DistillationModule(new(ConvNet), teacher(ConvTeacher), **{"features": IMAGES, **words})
