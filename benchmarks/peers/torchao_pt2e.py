"""torchao's PT2E quantization-aware training with its X86InductorQuantizer, swapped in where ours begins to round.

Up to there the run is the float run. Then the net is exported with a free batch, prepared and put in place of the
float net: its parameters are the same objects, so optimizer and learning-rate schedule go on. For the last tenth the
observers are switched off, as torchao's guide asks. 4 bits: the quantizer's own configuration with the weights'
``quant_min`` and ``quant_max`` at -8 and 7. The
quantizer leaves an EmbeddingBag float.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from task import Task, Trained, Variant, aware_variant, work
from torch import nn
from torchao.quantization.pt2e import allow_exported_model_train_eval, disable_observer, move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

ENTRIES, ROWS = torch.export.Dim("entries"), torch.export.Dim("batch")
BORDERS = torch.export.Dim("borders", min=3)
FREE = {"digits": ({0: ROWS},), "recommender": ({0: ENTRIES}, {0: BORDERS}, {0: ENTRIES})}
"""Dimensions of the net's inputs, by task."""


def quantizer_of(bits: int) -> X86InductorQuantizer:
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    if bits < 8:
        weight = replace(config.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)
        config = replace(config, weight=weight)
    return X86InductorQuantizer().set_global(config)


def prepared(net: nn.Module, task: Task, bits: int) -> nn.Module:
    example = task.net_inputs(next(iter(task.loader(0))))
    exported = torch.export.export(net.train(), example, dynamic_shapes=FREE[task.name], strict=True).module()
    return allow_exported_model_train_eval(prepare_qat_pt2e(exported, quantizer_of(bits)))


class Aware(pl.Callback):
    def __init__(self, task: Task, bits: int, *, done: bool = False) -> None:
        self.task, self.bits, self.done = task, bits, done

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.task.epochs // 2 and not self.done:
            before = {id(parameter) for parameter in pl_module.parameters()}
            pl_module.net = prepared(pl_module.net, self.task, self.bits)
            assert before == {id(parameter) for parameter in pl_module.parameters()}
            self.done = True
        if trainer.current_epoch >= round(0.9 * self.task.epochs):
            pl_module.net.apply(disable_observer)


def converted(module: pl.LightningModule, task: Task) -> nn.Module:
    return move_exported_model_to_eval(convert_pt2e(copy.deepcopy(module.net)))


def scored(module: pl.LightningModule, task: Task) -> nn.Module:
    return task.with_net(module, converted(module, task))


def export(module: pl.LightningModule, task: Task, path: Path) -> None:
    net, words = converted(module, task), {"dynamo": True, "opset_version": 21, "verbose": False}
    if task.name == "digits":
        program = torch.onnx.export(net, tuple(task.feed(32)), dynamic_shapes=FREE[task.name], **words)
    else:
        from recommender_split import ServedNet

        example = task.padded(2)
        free = {name: {0: ROWS} | ({1: ENTRIES} if name in task.free() else {}) for name in example}
        served = ServedNet(net, module.terms)
        program = torch.onnx.export(served, (), kwargs=example, dynamic_shapes=free, **words)
    program.save(path)


def ready(module: pl.LightningModule, task: Task, run: Trained, bits: int) -> list[pl.Callback]:
    module.net = prepared(module.net, task, bits)
    return [Aware(task, bits, done=True)]


def variant(bits: int) -> Variant:
    return aware_variant(
        "torchao PT2E",
        bits,
        callbacks=lambda task: [Aware(task, bits)],
        deploy=scored,
        export=export,
        by_hand={
            "the fresh model is exported and prepared before fit, so that the checkpoint's keys exist": partial(
                ready, bits=bits
            )
        },
    )


VARIANTS = [variant(8), variant(4)]


if __name__ == "__main__":
    work(VARIANTS)
