"""Writes this folder's checkpoints with the installed lightning_optim: run once per release, from ``tests/``.

``python -m released.write`` writes, for each technique, a file from the middle of its run and one from the end, with
the outputs that the finished model gives, to a folder named after the version.
"""

import tempfile
from pathlib import Path

import torch

import lightning_optim
from helpers.distilled import teacher
from helpers.models import ROWS, Classifier, ConvNet, Files, data, fit, new
from lightning_optim import ChannelPruning, DistillationModule, QuantizationAwareTraining, WeightPruning

MIDDLE, EPOCHS = 1, 4
"""Epoch of the first file, and number of epochs; eight steps each."""


def weights():
    """Return a callback whose window is half over in the middle file."""
    return WeightPruning(0.75, start=4, end=24, every_n_steps=4)


def channels():
    """Return a callback whose window is half over in the middle file."""
    return ChannelPruning(0.5, start=4, end=24, events=4)


def integers():
    """Return a callback that rounds from the middle file on."""
    return QuantizationAwareTraining(start=8, observe_steps=4, freeze=28)


CASES = {
    "weights": (Classifier, weights),
    "2-of-4": (Classifier, lambda: WeightPruning(granularity="2:4", start=4, end=24, every_n_steps=4)),
    "2-of-4-conv": (ConvNet, lambda: WeightPruning(granularity="2:4", start=4, end=24, every_n_steps=4)),
    "channels": (Classifier, channels),
    "channels-conv": (ConvNet, channels),
    "integers": (ConvNet, integers),
    "together": (Classifier, lambda: [channels(), weights(), integers()]),
    "distilled": (Classifier, channels),
}
"""Name -> class, callbacks."""


def module(name):
    """Return the module of a case as it is before training."""
    student = new(CASES[name][0])
    return DistillationModule(student, teacher()) if name == "distilled" else student


def callbacks(name):
    """Return the callbacks of a case."""
    made = CASES[name][1]()
    return made if isinstance(made, list) else [made]


def main():
    """Write the files."""
    folder = Path(__file__).parent / lightning_optim.__version__
    inputs = data().tensors[0][:ROWS]
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            trained = module(name)
            fit(Path(scratch), trained, Files(Path(scratch)), *callbacks(name), max_epochs=EPOCHS)
            for kind, epoch in (("middle", MIDDLE), ("end", EPOCHS - 1)):
                file = torch.load(Path(scratch) / f"{epoch}.ckpt", weights_only=True)
                if kind == "end":
                    with torch.no_grad():
                        file["outputs"] = trained.eval()(inputs)
                torch.save(file, folder / f"{name}-{kind}.ckpt")


if __name__ == "__main__":
    main()
