"""What the README's first lines print and bring: they run as they stand there, beside the same net without them.

``python benchmarks/ten_lines.py --seeds 3 --output FILE``
"""

import argparse
import contextlib
import io
import os
import re
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import torch
from quiet import prepare

import lightning_optim

ROOT = Path(__file__).parents[1]


def code() -> str:
    """Return the first Python block of the README."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]


def run(seed: int) -> tuple[dict[str, Any], str]:
    """Run the lines with a seed, then the same run without its callback; return both compared, and what was printed."""
    pl.seed_everything(seed, verbose=False)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code(), "README.md", "exec"), names)
    pl.seed_everything(seed, verbose=False)
    dense, data = type(names["model"])(26), names["data"]
    pl.Trainer(max_epochs=names["trainer"].max_epochs, logger=False, enable_progress_bar=False).fit(
        dense, datamodule=data
    )
    images, labels = names["images"], names["labels"]

    def accuracy(net: torch.nn.Module) -> float:
        with torch.no_grad():
            return (net(images).argmax(1) == labels).float().mean().item()

    models = {"dense": dense.eval(), "small": names["model"].eval()}
    report = lightning_optim.compare(models, images[:1], evaluate=accuracy, engines=["onnxruntime"], reference="dense")
    return {row["name"]: row for row in report.rows}, printed.getvalue()


COLUMNS = {
    "accuracy": ("test accuracy, %", 100, "{:.2f}"),
    "parameters": ("parameters", 1, "{:,.0f}"),
    "onnx_bytes": ("ONNX file, kB", 1e-3, "{:.1f}"),
    "onnxruntime_ratio": ("time of one row", 1, "{:.2f}"),
    "onnxruntime_batch_ratio": ("time of 32 rows", 1, "{:.2f}"),
}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [f"| | {' | '.join(title for title, *_ in COLUMNS.values())} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    for name in runs[0]:
        cells = []
        for key, (_, scale, form) in COLUMNS.items():
            values = [scale * found[name][key] for found in runs]
            spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sentences(printed: str) -> str:
    """Return the sentences that an export's report ends with."""
    return printed[printed.index("Size: ") :].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output and arguments.output.resolve()
    prepare(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs, printed = zip(*(run(seed) for seed in range(arguments.seeds)), strict=True)
        os.chdir(ROOT)
    text = f"""# The README's first lines, beside the same net without them

{date.today()}, x86_64 CPU, one thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}.
`python benchmarks/ten_lines.py --seeds {arguments.seeds} --output FILE`

Scanned digits, 719 test images; mean ± standard deviation over the seeds. Times in ONNX Runtime, calls of both in
turns, relative to the dense net.

{table(runs)}

What they print, below the table of layers, with seed 0:

```text
{sentences(printed[0])}
```
"""
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
