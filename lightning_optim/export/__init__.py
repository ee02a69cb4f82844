"""Files for inference engines and other tools, verified against the module they were made from."""

from lightning_optim.export.onnx import export_onnx
from lightning_optim.export.pretrained import export_pretrained
from lightning_optim.export.pretrained_report import PretrainedReport
from lightning_optim.export.report import ExportReport
from lightning_optim.export.weights import SafetensorsReport, export_safetensors

__all__ = [
    "ExportReport",
    "PretrainedReport",
    "SafetensorsReport",
    "export_onnx",
    "export_pretrained",
    "export_safetensors",
]
