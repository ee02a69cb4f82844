"""A language model with rounded weights, and with rounded weights and inputs: perplexity in the module.

The model is a Hugging Face folder (`--model`), as it comes; the messages are Banking77's (`--data`, no labels used).
Each row quantizes a copy after training; table and head stay float unless the row says otherwise. Perplexity is that of
held-out messages, in the module, whose weights are what files hold; the files were not run.

    python benchmarks/language_model_integers.py --model FOLDER --data ../shared/data/banking77 --output FILE
"""

import copy
import math
import time
from typing import Any

from language_model import parser_of, perplexity, read, versions
from torch import nn

from lightning_optim import quantize_post_training

GROUPS = {"weight_bits": 4, "activation_bits": None, "weight_granularity": "per_group:32"}
BLOCKS: dict[str, Any] = {"exclude": ["*embed_tokens", "lm_head"]}
ALL: dict[str, Any] = {"include": [nn.Embedding, nn.Linear]}
ROWS: dict[str, dict[str, Any]] = {
    "8-bit weights": {"activation_bits": None, **BLOCKS},
    "4-bit groups of 32": {**GROUPS, **BLOCKS},
    "4-bit groups of 32, gptq": {**GROUPS, **BLOCKS, "method": "gptq"},
    "the same, table and head in 8 bits": {
        **GROUPS,
        **ALL,
        "method": "gptq",
        "bits": {"*embed_tokens": 8, "lm_head": 8},
    },
    "4-bit groups of 32, table and head too": {**GROUPS, **ALL},
    "8-bit weights and inputs, range of each call": {"activation_ranges": "dynamic", **BLOCKS},
    "the same, smooth=True": {"activation_ranges": "dynamic", "smooth": True, **BLOCKS},
    "8-bit weights and inputs, fixed ranges": {**BLOCKS},
    "the same with smooth=True": {"smooth": True, **BLOCKS},
}


def main() -> None:
    """Quantize in every way and write the result file."""
    parser = parser_of(__doc__, batch=16)
    parser.add_argument("--batches", type=int, default=4, help="batches of training that are read")
    arguments = parser.parse_args()
    model, training, held_out = read(arguments)
    model.eval()
    stream = training.batches(arguments.batch)
    calibration = [{k: v for k, v in next(stream).items() if k != "labels"} for _ in range(arguments.batches)]
    dense = perplexity(model, held_out)
    lines = [
        "# Rounding a language model",
        "",
        versions(),
        f"`python benchmarks/language_model_integers.py --model FOLDER --data DATA --batch {arguments.batch} --batches "
        f"{arguments.batches} --test {arguments.test} --output FILE`",
        "",
        f"{arguments.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters, not fine-tuned. Ranges, "
        f"gptq and smoothing read {arguments.batch * arguments.batches} messages of training. Perplexity of "
        f"{arguments.test} held-out messages of Banking77 in the module ({dense:.1f} in float), and as a ratio to "
        "that of float. Seconds: CPU time of `quantize_post_training`.",
        "",
        "| | perplexity | of float | seconds |",
        "| --- | --- | --- | --- |",
    ]
    for name, options in ROWS.items():
        rounded, began = copy.deepcopy(model), time.process_time()
        quantize_post_training(rounded, calibration, progress_bar=False, **options)
        seconds = time.process_time() - began
        found = perplexity(rounded, held_out)
        ratio = f"{found / dense:.3f}" if math.isfinite(found) else ""
        lines.append(f"| {name} | {found:.1f} | {ratio} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
