"""Reports: several models compared, one run told; as a table, Markdown, JSON and one page."""

from lightning_optim.report.comparison import compare
from lightning_optim.report.document import Report, Section
from lightning_optim.report.result import ComparisonReport

__all__ = ["ComparisonReport", "Report", "Section", "compare"]
