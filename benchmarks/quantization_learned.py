"""Trained steps (``observer="learned"``) beside observed ranges on digits, at 8, 4 and 3 bits, over seeds.

The task and the further training of ``quantization_digits.py``: every row of a seed goes on from the same float model,
for as many epochs over the same data in the same order, with rounding from the first step on (a tenth of the steps is
observed). "float" is the control: the same epochs without rounding.

    python benchmarks/quantization_learned.py --output benchmarks/quantization_learned_cpu_2026-11-30.md
"""

import argparse
import platform
import time
import warnings
from collections import defaultdict
from pathlib import Path

import lightning
import torch
from digits_runs import TEST_IMAGES, THREADS, Run, splits, train
from quantization_digits import MORE_EPOCHS, _percent, accuracy, further
from quiet import prepare

from lightning_optim import QuantizationAwareTraining

BITS = ((8, 8), (4, 8), (3, 8), (4, 4), (3, 3))
OBSERVERS = ("moving_average", "histogram", "learned")


def aware(weights: int, activations: int, observer: str) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        weight_bits=weights, activation_bits=activations, observer=observer, start=0, freeze=0.8
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS)
    scans = splits()
    scores, seconds = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for seed in range(args.seeds):
        dense, _ = train(Run("float"), seed=seed)
        scores["float"].append(accuracy(further(dense, scans, [], seed), scans))
        for weights, activations in BITS:
            for observer in OBSERVERS:
                began = time.process_time()
                model = further(dense, scans, [aware(weights, activations, observer)], seed)
                seconds[observer].append(time.process_time() - began)
                scores[f"w{weights}a{activations} {observer}"].append(accuracy(model, scans))
    least = {observer: min(times) for observer, times in seconds.items()}
    costs = ", ".join(f"{observer} {least[observer] / least[OBSERVERS[0]]:.2f}" for observer in OBSERVERS)
    lines = [
        "# Trained steps beside observed ranges, digits\n",
        f"{platform.machine()}; torch {torch.__version__}, lightning {lightning.__version__}.\n"
        f"`python benchmarks/quantization_learned.py --seeds {args.seeds}`\n",
        f"Test accuracy, %, on {TEST_IMAGES} images ({100 / TEST_IMAGES:.2f} points each), {args.seeds} seeds, mean ± "
        f"standard deviation, after {MORE_EPOCHS} epochs with rounding from the float model; in float they give "
        f"{_percent(scores['float'])}. wNaM: N-bit weights per channel, M-bit activations. Processor time of a run "
        f"over that with the first observer: {costs}.\n",
        f"| | {' | '.join(OBSERVERS)} |",
        f"| --- | {' | '.join('---' for _ in OBSERVERS)} |",
        *(
            f"| w{w}a{a} | {' | '.join(_percent(scores[f'w{w}a{a} {observer}']) for observer in OBSERVERS)} |"
            for w, a in BITS
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
