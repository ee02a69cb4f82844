"""The table of a result file from the ``report.json`` of ``examples/recommender.py``, ``intents.py`` or ``digits.py``.

``python benchmarks/chain_table.py reports/recommender/report.json recall ndcg new_recall new_ndcg``
"""

import argparse
import json
from pathlib import Path
from typing import Any

MISSING = "-"
SIZES = {
    "parameters": "parameters",
    "nonzero": "non-zero",
    "bytes": "state_dict, zipped",
    "onnx_bytes": "ONNX file, bytes",
}


def row_of(row: dict[str, Any], metrics: list[str]) -> list[str]:
    """Return the cells of a model."""
    role = {"dense": " (teacher)", "control": " (control)"}.get(row["kind"], "")
    cells = [f"{row['name']}{role}"]
    for key in metrics:
        spread = f" ± {row[f'{key}_std']:.4f}" if row.get(f"{key}_std") else ""
        cells.append(f"{row[key]:.4f}{spread}")
    cells += [f"{row[key]:,.0f}" if row.get(key) else MISSING for key in SIZES]
    if row.get("onnxruntime_ms"):
        low, high = row["onnxruntime_low"], row["onnxruntime_high"]
        cells += [f"{row['onnxruntime_ms']:.3f}", f"{row['onnxruntime_ratio']:.3f} [{low:.3f}, {high:.3f}]"]
    else:
        cells += [MISSING, MISSING]
    return [*cells, f"{row['onnxruntime_P']:.3f}" if row.get("onnxruntime_P") else MISSING]


def table(report: dict[str, Any], metrics: list[str]) -> str:
    """Return the Markdown table of a report."""
    reference = report["reference"]
    head = ["", *metrics, *SIZES.values(), "ONNX Runtime, ms, in turns", f"/ {reference}", "P"]
    rows = [row_of(row, metrics) for row in report["rows"]]
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("metrics", nargs="+")
    arguments = parser.parse_args()
    print(table(json.loads(arguments.report.read_text()), arguments.metrics))


if __name__ == "__main__":
    main()
