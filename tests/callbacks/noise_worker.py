"""Two ranks measure the gradient noise scale, without and with accumulation."""

import json
import os
import sys
from pathlib import Path

from test_noise_scale import measured

if __name__ == "__main__":
    facts = {}
    for case, accumulated in (("ranks", 1), ("both", 2)):
        options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": accumulated}
        callback, logged = measured(steps=400, **options)
        facts[case] = {**logged, "noise": callback.noise_scale}
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))
