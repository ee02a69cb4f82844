"""Searches of several processes: killed and gone on, two on one storage, the ranks of one run."""

import json
from pathlib import Path

import optuna
import pytest

from helpers.ranks import run_alone, run_ranks
from search_worker import run

WORKER = Path(__file__).parent / "worker.py"
