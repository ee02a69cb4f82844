"""Does MiniLM teach a small intents net? Banking77, with all labels, and with ten an intent and the rest without.

The rows of ``python examples/intents.py --teacher``: every student takes as many steps from the same weights. The
controls are cross-entropy and label smoothing, which see the messages with a label only. Nothing is tuned.

    python benchmarks/distillation_intents.py --data PATH --output benchmarks/distillation_intents_cpu_DATE.md
"""

import argparse
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import lightning
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from intents import THREADS, Task, build_task, parse
from intents_teacher import EPOCHS, FEW_LABELS, SETTINGS, compare_with_teacher, find_teacher, verdict
from reporting import Row, prepare

REMARKS = {"baseline": " (teacher)", "control": " (control)", "distilled": ""}


def cells(rows: list[Row]) -> list[str]:
    """Return the test accuracies of one lesson in each setting."""
    return [f"{100 * row['accuracy']:.2f} ± {100 * row.get('accuracy_std', 0.0):.2f}" for row in rows]


def table(rows: list[Row], task: Task) -> list[str]:
    """Return a line a lesson, with a column a setting."""
    many = len(task.pieces["train"])
    half = len(rows) // len(SETTINGS)
    lines = [
        f"| | all {many:,} labels | {FEW_LABELS} labels an intent, the other messages without |",
        "| --- | --- | --- |",
    ]
    for same in zip(rows[:half], rows[half:], strict=True):
        name = same[0]["name"].split(": ")[1].removesuffix(", the teacher")
        lines.append(f"| {name}{REMARKS[same[0]['kind']]} | {' | '.join(cells(list(same)))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH", help="the folder with Banking77's files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS, verbose=False)
    task = build_task(parse(["--teacher", "--data", words.data]))
    rows = compare_with_teacher(task, find_teacher(), seeds=words.seeds)
    test = len(task.pieces["test"])
    teacher, student = rows[0]["parameters"], rows[1]["parameters"]
    lines = [
        "# MiniLM teaches a small intents net",
        "",
        f"{platform.machine()}, {THREADS} thread; torch {torch.__version__}, lightning {lightning.__version__}, "
        f"transformers {version('transformers')}, scikit-learn {version('scikit-learn')}.",
        f"`python benchmarks/distillation_intents.py --data PATH --seeds {words.seeds}`",
        "",
        f"Banking77, test accuracy, %, on {test:,} messages, {words.seeds} seeds, mean ± standard deviation; another "
        f"seed draws other labels. The teacher, of {teacher:,.0f} parameters, is all-MiniLM-L6-v2, frozen, with a "
        f"linear head on the labels of the setting. The student, of {student:,.0f}, begins in every row with MiniLM's "
        f"word vectors and takes the steps of {EPOCHS} epochs of all messages; the last weights count. kd and dist "
        f"stand at weight .5 beside cross-entropy, from cached logits. One test message is {100 / test:.2f} points.",
        "",
        *table(rows, task),
        "",
        "By two standard errors of a difference of two accuracies, of the test messages and of the seeds together:",
        "",
        *(f"- {verdict(rows, setting, test=test, seeds=words.seeds)}" for setting in SETTINGS),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if words.output:
        words.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
