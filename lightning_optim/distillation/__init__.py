"""Distillation: a student learns from a teacher that no checkpoint, optimizer or strategy ever sees."""

from lightning_optim.distillation.cache import LogitCache
from lightning_optim.distillation.features import Feature
from lightning_optim.distillation.indexed import Indexed, IndexedCollate, IndexedDataset
from lightning_optim.distillation.module import DistillationModule
from lightning_optim.distillation.ramp import Ramp
from lightning_optim.distillation.student import student_only
from lightning_optim.distillation.teacher import Teacher

__all__ = [
    "DistillationModule",
    "Feature",
    "Indexed",
    "IndexedCollate",
    "IndexedDataset",
    "LogitCache",
    "Ramp",
    "Teacher",
    "student_only",
]
