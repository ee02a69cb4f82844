"""Files for inference engines, verified against the module they were made from."""

from lightning_optim.export.onnx import export_onnx
from lightning_optim.export.report import ExportReport

__all__ = ["ExportReport", "export_onnx"]
