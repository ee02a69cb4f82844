"""nncf's quantization-aware training: ``nncf.quantize`` where ours begins to round, then the run goes on with its copy.

nncf returns a copy with parameters of its own. Its parameters take the place of the old ones in the optimizer, with
their state and under the same learning-rate schedule, and the scales that nncf adds join the first group, as its
examples train them with the rest. Up to 300 training batches calibrate it, which is its default. Its files are written
by torch's older exporter: the newer one refuses its models. 4 bits are known for its target device NPU alone.
Of the recommender the EmbeddingBag stays float: with it nncf stops with an InternalError.
"""

import copy
import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import nncf
import nncf.torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from task import Task, Trained, Variant, aware_variant, work
from torch import Tensor, nn


class Whole(nn.Module):
    """What nncf gets: it puts its hooks into the root as a child, which an ``nn.Sequential`` would call as a layer."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def root(module: pl.LightningModule, task: Task) -> nn.Module:
    return Whole(module.net) if task.name == "digits" else module.net


def arguments(inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return inputs[0] if len(inputs) == 1 else inputs


def quantized(module: pl.LightningModule, task: Task, bits: int) -> nn.Module:
    words = {}
    if bits < 8:
        weights = QuantizationParameters(num_bits=bits)
        words["target_device"] = nncf.TargetDevice.NPU  # the only one for which it knows 4 bits
        words["advanced_parameters"] = AdvancedQuantizationParameters(weights_quantization_params=weights)
    if task.name == "recommender":  # with it: InternalError, "QP id 10 is already in shared inputs group 0"
        words["ignored_scope"] = nncf.IgnoredScope(types=["embedding_bag"])
    calibration = nncf.Dataset(task.loader(0), lambda batch: arguments(task.net_inputs(batch)))
    return nncf.quantize(root(module, task).eval(), calibration, **words)


def take_over(trainer: pl.Trainer, pl_module: pl.LightningModule, net: nn.Module) -> None:
    """Put the copy in place of the net, and its parameters in place of the old ones in the optimizer."""
    old = dict(pl_module.net.named_parameters())
    pl_module.net = net
    new = {name.removeprefix("layers."): parameter for name, parameter in net.named_parameters()}
    (optimizer,) = trainer.optimizers
    swapped = {id(parameter): new[name] for name, parameter in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [swapped.get(id(parameter), parameter) for parameter in group["params"]]
    for name, parameter in old.items():
        optimizer.state[new[name]] = optimizer.state.pop(parameter)
    added = [parameter for name, parameter in new.items() if name not in old]
    optimizer.param_groups[0]["params"].extend(added)


class Aware(pl.Callback):
    def __init__(self, task: Task, bits: int, *, done: bool = False) -> None:
        self.task, self.bits, self.done = task, bits, done
        self.config: bytes | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.task.epochs // 2 and not self.done:
            take_over(trainer, pl_module, quantized(pl_module, self.task, self.bits))
            self.config = pickle.dumps(nncf.torch.get_config(pl_module.net))
            self.done = True
        pl_module.train()


def restored(module: pl.LightningModule, task: Task, run: Trained, bits: int) -> list[pl.Callback]:
    finished = next(callback for callback in run.callbacks if isinstance(callback, Aware))
    module.net = nncf.torch.load_from_config(root(module, task), pickle.loads(finished.config))
    return [Aware(task, bits, done=True)]


def stripped(module: pl.LightningModule, task: Task) -> nn.Module:
    example = arguments(task.net_inputs(next(iter(task.loader(0)))))
    return nncf.strip(copy.deepcopy(module.net).eval(), example_input=example)


def scored(module: pl.LightningModule, task: Task) -> nn.Module:
    return task.with_net(module, copy.deepcopy(module.net)).eval()


def export(module: pl.LightningModule, task: Task, path: Path) -> None:
    task.trace(module, stripped(module, task), path)


def variant(bits: int) -> Variant:
    return aware_variant(
        "nncf",
        bits,
        callbacks=lambda task: [Aware(task, bits)],
        deploy=scored,
        export=export,
        by_hand={
            "nncf.torch.get_config kept by the user, and load_from_config on the fresh model before fit": partial(
                restored, bits=bits
            )
        },
    )


VARIANTS = [variant(8), variant(4)]


if __name__ == "__main__":
    work(VARIANTS)
