"""Reports on a comparison of models and on a run: tables, Markdown, JSON and a page."""

from lightning_optim.report.comparison import compare
from lightning_optim.report.document import Report, Section
from lightning_optim.report.result import ComparisonReport

__all__ = ["ComparisonReport", "Report", "Section", "compare"]
