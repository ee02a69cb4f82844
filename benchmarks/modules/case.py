"""One module of a package through every technique: train, resume, reload, export."""

import json
import random
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "integration"))

import numpy as np
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from zoo import EPOCHS, TECHNIQUES, FilePerEpoch, same

from lightning_optim import DistillationModule, Recipe, export_onnx, load_from_checkpoint
from lightning_optim.target import ForwardInputs, detached

__all__ = ["ALONE", "COLUMNS", "Case", "outcomes"]

ALONE = "alone"


def of_numbers(recipe: Recipe) -> Recipe:
    """Return a recipe of the zoo for modules whose outputs are numbers, not classes."""
    words = recipe.as_plain()
    return Recipe(**{**words, "distillation": {"alpha": 0.5, "loss": "mse"}}) if "distillation" in words else recipe


RECIPES = {name: of_numbers(recipe) for name, recipe in TECHNIQUES.items()}
COLUMNS = (ALONE, *RECIPES)


@dataclass(frozen=True)
class Case:
    """A module of a package, made and trained as the package's documentation does.

    Attributes:
        make: Makes the module by a seed.
        data: What ``Trainer.fit`` gets besides: a DataLoader or a DataModule.
        trainer: The Trainer's class; of ``lightning`` or of ``pytorch_lightning``, as the package imports it.
        options: The Trainer's arguments that the documentation gives.
        inputs: What forward receives, where the training step calls something else; for ``example_inputs`` too.
        logits_from: The layer that the step calls for its answers then.
        class_dim: Of answers in more dimensions than a classifier's, as :class:`DistillationModule` asks for it.
    """

    make: Callable[[int], Any]
    data: Callable[[], Any]
    trainer: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Any] | None = None
    logits_from: str = ""
    class_dim: int | None = None

    def fresh(self, seed: int = 3) -> Any:
        seed_everything(seed)
        return self.make(seed)

    def fit(self, recipe: Recipe | None, *callbacks: Any, resume: Path | None = None) -> tuple[Any, Any, Any]:
        """Return what was fitted, the module in it, and the Trainer."""
        module = self.fresh()
        fitted, ours = module, []
        if recipe is not None:
            if recipe.distillation is not None:
                fitted = recipe.wrap(module, self.fresh(4), logits_from=self.logits_from)
                fitted.class_dim = self.class_dim
            ours = recipe.callbacks(example_inputs=None if self.inputs is None else self.inputs())
        trainer = self.trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Seeded(), *ours, *callbacks],
            **self.options,
        )
        seed_everything(5)
        trainer.fit(fitted, with_own_base_seed(self.data()), ckpt_path=resume, weights_only=False)
        return fitted, module, trainer


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def with_own_base_seed(data: Any) -> Any:
    """Let a loader draw the seed of its workers elsewhere.

    A run draws it after ``on_train_epoch_start``, a resumed one before, and the order of the rows comes next.
    """
    if isinstance(data, DataLoader):
        data.generator = torch.Generator().manual_seed(0)
        return data
    original = data.train_dataloader
    data.train_dataloader = lambda: with_own_base_seed(original())
    return data


class Seeded(Callback):
    """Randomness that a resumed run repeats: shuffling by the epoch, the rest by the step."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        seed_everything(1000 + trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seed_everything(trainer.global_step)


class FirstCall(Callback):
    """Keeps what the module's forward received first."""

    inputs: ForwardInputs | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = pl_module.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = detached(ForwardInputs(args, kwargs))
        self.handle.remove()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()


def outcomes(case: Case, folder: Path, *, keep: bool = False) -> dict[str, str]:
    """Return by column "yes", or where it ends and why. ``folder`` gets the tracebacks, and the cells one by one.

    The module alone comes first: what it cannot do by itself is not asked of it with a technique, except to train.
    """
    file = folder / "outcomes.json"
    known: dict[str, str] = json.loads(file.read_text()) if keep and file.exists() else {}
    if set(known) == set(COLUMNS):
        return known
    alone = Alone()
    found = {ALONE: told(partial(alone.run, case, folder), folder / f"{ALONE}.txt")}
    for name, recipe in RECIPES.items():
        found[name] = known.get(name) or told(partial(compressed, case, recipe, folder, alone), folder / f"{name}.txt")
        file.write_text(json.dumps(found))
    return found


class Ends(Exception):
    """A step failed; the text begins with its name."""


@dataclass
class Alone:
    """What the module does by itself."""

    resumes: bool = False
    loads_by_class: bool = False
    exports: bool = False
    dynamic_batch: bool = True
    inputs: Any = None

    def run(self, case: Case, folder: Path) -> None:
        first, last, call = folder / "first.ckpt", folder / "last.ckpt", FirstCall()
        fitted, _, trainer = step("train", lambda: case.fit(None, FilePerEpoch(first), call))
        trainer.save_checkpoint(last)
        self.inputs = call.inputs if case.inputs is None else case.inputs()
        self.loads_by_class = any(loads_by_class(fitted, last, **words) for words in ({}, {"weights_only": False}))
        resumed, *_ = step("resume", lambda: case.fit(None, resume=first))
        self.resumes = same(resumed, fitted)
        if not self.resumes:
            raise Ends("resume: without a technique too the resumed run is another")
        try:
            step("export", lambda: export(fitted, self.inputs, folder))
        except Ends as ends:
            self.dynamic_batch = False
            self.exports = exports_as_it_is(fitted, self.inputs, folder)
            raise Ends(f"{ends} (with dynamic_batch=False: yes)" if self.exports else str(ends)) from ends
        self.exports = True


def exports_as_it_is(module: Any, inputs: Any, folder: Path) -> bool:
    try:
        export(module, inputs, folder, dynamic_batch=False)
    except Exception:  # noqa: BLE001 - the other reason is told
        return False
    return True


def loads_by_class(fitted: Any, file: Path, **words: Any) -> bool:
    try:
        return same(type(fitted).load_from_checkpoint(file, **words), fitted)
    except Exception:  # noqa: BLE001 - not every class makes itself from its file
        return False


def compressed(case: Case, recipe: Recipe, folder: Path, alone: Alone) -> None:
    first, last = folder / "first.ckpt", folder / "last.ckpt"
    fitted, module, trainer = step("train", lambda: case.fit(recipe, FilePerEpoch(first)))
    trainer.save_checkpoint(last)
    if alone.resumes:
        resumed, *_ = step("resume", lambda: case.fit(recipe, resume=first))
        if not same(resumed, fitted):
            raise Ends("resume: the resumed run is another")
    step("reload", lambda: reload(case, recipe, fitted, last, by_class=alone.loads_by_class))
    if alone.exports:
        step("export", lambda: export(module, alone.inputs, folder, dynamic_batch=alone.dynamic_batch))


def reload(case: Case, recipe: Recipe, fitted: Any, file: Path, *, by_class: bool) -> None:
    """Load into another module, and by the class where it makes itself from its file."""
    taught = recipe.distillation is not None
    fresh = case.fresh(6)
    loaded = [load_from_checkpoint(DistillationModule(fresh) if taught else fresh, file, weights_only=False)]
    if by_class and not taught:
        loaded.append(load_from_checkpoint(type(fitted), file, weights_only=False))
    if not all(same(each, fitted) for each in loaded):
        raise ValueError("the file is another")


def export(module: Any, inputs: Any, folder: Path, *, dynamic_batch: bool = True) -> None:
    """Export and compare by the distance of the numbers: the largest of a row of forecasts is no class."""
    options = {"inputs": inputs, "least_agreement": 0.0, "dynamic_batch": dynamic_batch}
    export_onnx(module, folder / "module.onnx", inputs, **options)


def step(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise Ends(f"{name}: {first_words(error)}") from error


def first_words(error: Exception) -> str:
    """Return the first sentence of an error, or as much of it as fits into a footnote."""
    sentences = re.split(r"(?<=[\w)`'\"]{2}\.) (?=[A-Z`])", " ".join(str(error).split()))  # not after "e.g."
    text = re.sub(r"/\S*/site-packages/", "", sentences[0]).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200].rpartition(' ')[0]} ..."


def told(call: Callable[[], None], traces: Path) -> str:
    try:
        call()
    except Ends as ends:
        traces.write_text("".join(traceback.format_exception(ends)), encoding="utf-8")
        return str(ends)
    traces.unlink(missing_ok=True)
    return "yes"
