"""NVIDIA ModelOpt's quantization-aware training: ``mtq.quantize`` where ours begins to round, then the run goes on.

It replaces the layers in place and keeps their parameters, so optimizer and learning-rate schedule go on. Eight
training batches calibrate it with its ``INT8_DEFAULT_CFG`` (symmetric, weights per channel, ranges fixed from then on);
4 bits are the same with the weights' quantizer at 4. Its files are written by torch's older exporter, as its guide
does. That guide deploys on TensorRT, which needs a GPU: the times in these engines are not those it aims at. Its
pruning was not tried.
"""

import copy
from functools import partial
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from task import CALIBRATION, Task, Trained, Variant, aware_variant, work
from torch import nn


def quantize(net: nn.Module, task: Task, bits: int) -> None:
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    if bits < 8:
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"] == "*weight_quantizer":
                entry["cfg"]["num_bits"] = bits

    def calibrate(model: nn.Module) -> None:
        for batch in islice(task.loader(0), CALIBRATION):
            model(*task.net_inputs(batch))

    mtq.quantize(net, config, calibrate)


class Aware(pl.Callback):
    def __init__(self, task: Task, bits: int, *, done: bool = False) -> None:
        self.task, self.bits, self.done = task, bits, done

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.task.epochs // 2 and not self.done:
            quantize(pl_module.net.eval(), self.task, self.bits)
            pl_module.train()
            self.done = True


def restored(module: pl.LightningModule, task: Task, run: Trained, bits: int) -> list[pl.Callback]:
    mto.restore_from_modelopt_state(module.net, mto.modelopt_state(run.module.net))
    return [Aware(task, bits, done=True)]


def scored(module: pl.LightningModule, task: Task) -> nn.Module:
    return task.with_net(module, copy.deepcopy(module.net)).eval()


def export(module: pl.LightningModule, task: Task, path: Path) -> None:
    task.trace(module, copy.deepcopy(module.net).eval(), path)


def variant(bits: int) -> Variant:
    return aware_variant(
        "ModelOpt",
        bits,
        callbacks=lambda task: [Aware(task, bits)],
        deploy=scored,
        export=export,
        by_hand={
            "mto.modelopt_state kept by the user, and restored on the fresh model before fit": partial(
                restored, bits=bits
            )
        },
    )


VARIANTS = [variant(8), variant(4)]


if __name__ == "__main__":
    work(VARIANTS)
