"""Search for the best recipe, by Optuna (extra ``search``), which loads when a search begins."""

from lightning_optim.search.report import SearchReport, Trial
from lightning_optim.search.run import search

__all__ = ["SearchReport", "Trial", "search"]
