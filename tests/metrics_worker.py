"""Two ranks: a metric in PerformanceScore, the name that the module logs, and P as a metric."""

import json
import os
import sys
from pathlib import Path

import torch

from lightning_optim.metrics import PerformanceScoreMetric
from test_metrics import CASES, fitted

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    options = {"strategy": "ddp", "devices": 2}
    facts = {}
    for name, accuracy in (("name", "val_metric"), ("metric", CASES["multi-class"][0]())):
        found = fitted("multi-class", accuracy, **options)
        facts[name] = {key: found[key] for key in ("P/raw/accuracy", "val_metric", "P/error")}
    score = PerformanceScoreMetric()
    score.update(size=1 + rank * 0.5, inference_time=1 - rank * 0.5, accuracy=1 - rank * 0.5)
    facts["P"] = round(float(score.compute()), 6)
    assert torch.distributed.is_initialized()
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(facts))
