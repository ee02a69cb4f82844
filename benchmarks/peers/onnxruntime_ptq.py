"""onnxruntime.quantization, after training: ``quantize_static`` and ``quantize_dynamic`` on the float net's file.

The file is made as ours is and goes through its ``quant_pre_process``. Static: its QDQ format, uint8 activations, int8
weights per channel, ranges from the smallest to the largest value seen, with the training batches of our calibration.
Dynamic: matrix products alone, its default, weights per channel. What is scored in torch is the float net: rounded is
only the file.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from task import AFTER, Task, Variant, work


class Reader(CalibrationDataReader):
    def __init__(self, path: Path, task: Task) -> None:
        names = [each.name for each in onnx.load(path, load_external_data=False).graph.input]
        self._feeds: Iterator[dict[str, Any]] = (
            {name: tensor.numpy() for name, tensor in zip(names, batch.values(), strict=True)}
            for batch in task.calibration()
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def export(module: pl.LightningModule, task: Task, path: Path, *, static: bool) -> None:
    plain, ready = path.with_suffix(".float.onnx"), path.with_suffix(".ready.onnx")
    task.export(module, plain)
    quant_pre_process(str(plain), str(ready))
    if static:
        quantize_static(
            str(ready),
            str(path),
            Reader(ready, task),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    else:
        quantize_dynamic(str(ready), str(path), per_channel=True, weight_type=QuantType.QInt8)
    plain.unlink()
    ready.unlink()


VARIANTS = [
    Variant(f"onnxruntime {name}", AFTER, export=partial(export, static=name == "quantize_static"))
    for name in ("quantize_static", "quantize_dynamic")
]


if __name__ == "__main__":
    work(VARIANTS)
