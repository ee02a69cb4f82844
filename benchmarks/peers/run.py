r"""Comparison with peers: the same task, budget and seeds, each package in an environment of its own.

Makes the environments, runs a worker in each, one after the other, measures the exported files of all workers in this
process, and writes the tables. Rows of one seed begin at the same weights and see the same batches. What cannot be
installed, run or exported stands in the table with its reason. Needs the extra ``onnx``.

    python benchmarks/peers/run.py --peers all --seeds 3 --output benchmarks/peers/digits_cpu_2026-12-01.md
    python benchmarks/peers/run.py --task recommender --data PATH \
        --output benchmarks/peers/recommender_cpu_2026-12-01.md
"""

import argparse
import ast
import importlib.util
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from environments import ENVIRONMENTS, NotInstalled, default_folder
from step_clock import faster
from task import DENSE, TASKS, Task, cut_at, quiet

from lightning_optim.export.session import ExportedModel
from lightning_optim.measure.latency import time_in_turns

HERE = Path(__file__).resolve().parent
BATCHES = (1, 32)
OPENINGS = 6
COLUMNS = (
    "",
    "in torch",
    "in ONNX Runtime",
    "zeros",
    "parameters",
    "weights, gzip, kB",
    "ONNX, kB",
    *(f"ONNX Runtime, batch {batch}" for batch in BATCHES),
    "step",
    "whole fit",
    "resumes",
)


@dataclass(frozen=True)
class Peer:
    """A worker and where it runs."""

    script: str
    environment: str
    technique: str
    tasks: tuple[str, ...] = tuple(TASKS)


PEERS = {
    "ours": Peer("ours.py", "own", "everything"),
    "modelpruning": Peer("modelpruning.py", "own", "weight pruning"),
    "torch-pruning": Peer("torch_pruning_alone.py", "own", "channel pruning"),
    "torchao": Peer("torchao_pt2e.py", "torchao", "quantization-aware training"),
    "nncf": Peer("nncf_qat.py", "nncf", "quantization-aware training"),
    "modelopt": Peer("modelopt_qat.py", "modelopt", "quantization-aware training"),
    "onnxruntime": Peer("onnxruntime_ptq.py", "own", "post-training quantization"),
    "torchdistill": Peer("torchdistill_kd.py", "torchdistill", "distillation", ("digits",)),
}
Found = dict[str, dict[str, Any]]


def collect(args: argparse.Namespace, names: list[str], folder: Path) -> Found:
    """Run the workers and return their results by peer, or the reasons why there are none."""
    found: Found = {}
    for name in names:
        peer = PEERS[name]
        environment = ENVIRONMENTS[peer.environment]
        print(f"{name}: environment {environment.name}", flush=True)
        try:
            python = environment.make(args.environments)
        except NotInstalled as reason:
            found[name] = {"failed": f"not installed: {reason}"}
            continue
        place = folder / args.task / name
        if not (args.keep and (place / "found.json").exists()):
            command = [str(python), str(HERE / peer.script), "--task", args.task, "--seeds", str(args.seeds)]
            command += ["--folder", str(place)] + (["--data", args.data] if args.data else [])
            command += ["--epochs", str(args.epochs)] if args.epochs else []
            log_file = place.with_suffix(".log")
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("w") as log:
                surroundings = environment.surroundings(args.environments)
                done = subprocess.run(command, env=surroundings, stdout=log, stderr=log, check=False)
            if done.returncode:
                found[name] = {"failed": f"the worker stopped: {log_file.read_text().splitlines()[-1][:200]}"}
                continue
        found[name] = json.loads((place / "found.json").read_text())
        found[name]["refused"] = environment.refused(args.environments)
    return found


def measure_files(task: Task, found: Found) -> None:
    """Score every exported file in ONNX Runtime, and time it in turns with the dense file of its seed."""
    dense: dict[int, Path] = {}
    for peer in found.values():
        baseline = peer.get("baselines", {}).get(DENSE, {"seeds": []})
        for seed, figures in enumerate(baseline["seeds"]):
            if "onnx" in figures:
                dense.setdefault(seed, Path(figures["onnx"]))
    for peer in found.values():
        for row in [*peer.get("baselines", {}).values(), *peer.get("variants", {}).values()]:
            for seed, figures in enumerate(row["seeds"]):
                if "onnx" not in figures:
                    continue
                try:
                    path = Path(figures["onnx"])
                    figures.update(file_figures(task, path, dense[seed]))
                    if "quantization" in row.get("technique", "") and importlib.util.find_spec("openvino"):
                        figures["openvino"] = openvino_figures(task, path, dense[seed])
                except Exception as error:  # noqa: BLE001 - a file that the engine refuses is a result
                    lines = str(error).split("\n")
                    figures["onnx_error"] = f"{type(error).__name__}: {lines[0][:200]}"


def file_figures(task: Task, path: Path, dense: Path) -> dict[str, Any]:
    file = ExportedModel(path)
    return {
        "runtime_metrics": task.judge(file),
        "onnx_bytes": sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")),
        "ratios": ratios_of(task, path, dense, "onnxruntime"),
        "integer": integer_part(file),
    }


def openvino_figures(task: Task, path: Path, dense: Path) -> dict[str, Any]:
    """Return the figures of the same file in OpenVINO, the engine that nncf targets."""
    try:
        integer = integer_part(ExportedModel(path, "openvino"))
        return {"ratios": ratios_of(task, path, dense, "openvino"), "integer": integer}
    except Exception as error:  # noqa: BLE001 - a file that the engine refuses is a result
        return {"error": shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 150)}


def ratios_of(task: Task, path: Path, dense: Path, engine: str) -> list[float]:
    """Time two files in turns, for each batch size.

    Where the engine happens to put a file in memory makes up to a fifth: files are opened anew for each of the
    openings, in both orders, and the geometric mean is taken.
    """
    ratios: list[list[float]] = [[] for _ in BATCHES]
    for opening in range(OPENINGS):
        files = {each: ExportedModel(each, engine) for each in ((path, dense) if opening % 2 else (dense, path))}
        if len(files) < 2:  # the dense file itself
            return [1.0 for _ in BATCHES]
        for place, batch in enumerate(BATCHES):
            feed = task.feed(batch)
            calls = [partial(files[each].runtime.run, feed) for each in (path, dense)]
            timed = time_in_turns(calls, files[path].runtime.clock, seconds=0.8, least=50, most=400)
            ratios[place].append(timed.ratio)
    return [geometric_mean(each) for each in ratios]


def integer_part(file: ExportedModel) -> str:
    kernels = file.runtime.kernels()
    integer = kernels.integer_convolutions + kernels.integer_matmuls
    return f"{integer} of {kernels.convolutions + kernels.matmuls}"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} ..."


def spread(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def ranged(values: list[float]) -> str:
    texts = [f"{value:.2f}" for value in (fmean(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}-{texts[2]})"


def metric(seeds: list[dict[str, Any]], key: str, task: Task) -> str:
    found = [each[key] for each in seeds if key in each]
    form = ".2f" if task.name == "digits" else ".4f"
    return " / ".join(spread([each[name] for each in found], form) for name in task.metrics) if found else "-"


def line(name: str, row: dict[str, Any], baseline: dict[str, Any], task: Task) -> str:
    """Write a row; ``baseline`` is of the same worker, and took turns with it."""
    if "error" in row or not row["seeds"]:
        return f"| {name} | cannot: {row.get('error', 'no run')} |" + " |" * (len(COLUMNS) - 2)
    seeds, quantized = row["seeds"], "quantization" in row.get("technique", "")
    zeros = [100 * each["zeros"] for each in seeds if each["zeros"] is not None]
    steps, fits = [], []
    for own, plain in zip(seeds, baseline["seeds"], strict=True):
        steps.append(faster(own["step_seconds"]) / faster(plain["step_seconds"]))
        fits.append(own["fit_seconds"] / plain["fit_seconds"])
    files = [each for each in seeds if "ratios" in each]
    ratios = [ranged([each["ratios"][place] for each in files]) if files else "-" for place in range(len(BATCHES))]
    cells = [
        name,
        metric(seeds, "metrics", task),
        metric(seeds, "runtime_metrics", task),
        f"{fmean(zeros):.2f} %" if zeros and max(zeros) > 0.5 else "-",
        f"{fmean(each['parameters'] for each in seeds):,.0f}" if not quantized else "-",
        f"{fmean(each['state_bytes'] for each in seeds) / 1e3:.1f}" if not quantized else "-",
        f"{fmean(each['onnx_bytes'] for each in files) / 1e3:.1f}" if files else "-",
        *ratios,
        ranged(steps),
        ranged(fits),
        resumes(row),
    ]
    return f"| {' | '.join(cells)} |"


def resumes(row: dict[str, Any]) -> str:
    if row.get("resume", {}).get("plain", {}).get("equal"):
        return "yes"
    return "by hand" if any(each.get("equal") for each in row.get("by_hand", {}).values()) else "no"


def outcome(found: dict[str, Any], first: dict[str, Any], task: Task) -> str:
    """Describe how a resumed run ended."""
    if "error" in found:
        return f"stops: `{shortened(found['error'], 150)}`"
    if found["equal"]:
        return "the weights are equal bit for bit"
    parts = [f"other weights ({found['differ']}" + (f", by up to {found['most']:.2g})" if "most" in found else ")")]
    if found["zeros"] is not None and abs(found["zeros"] - first["zeros"]) > 1e-3:
        parts.append(f"{found['zeros']:.1%} zeros and not {first['zeros']:.1%}")
    if found["parameters"] != first["parameters"]:
        parts.append(f"{found['parameters']:,} parameters and not {first['parameters']:,}")
    for name, words in task.metrics.items():
        parts.append(f"{words} {found['metrics'][name]:.4g} and not {first['metrics'][name]:.4g}")
    return "ends with " + ", ".join(parts)


def remarks(name: str, row: dict[str, Any], task: Task) -> list[str]:
    """Return remarks below the table: how resuming went, why there is no file, what runs in integers."""
    said = list(row.get("notes", ()))
    seeds = row["seeds"]
    resume = row.get("resume", {})
    if resume and not resume["plain"].get("equal"):
        said.append(f"resumed as it is: {outcome(resume['plain'], seeds[0], task)}")
        for words, found in row["by_hand"].items():
            said.append(f"resumed by hand ({words}): {outcome(found, seeds[0], task)}")
    said += sorted({f"no file: `{shortened(each['onnx_error'], 150)}`" for each in seeds if "onnx_error" in each})
    if "quantization" in row.get("technique", "") and seeds and "integer" in seeds[0]:
        said.append(f"{seeds[0]['integer']} convolutions and matrix products run with integers in ONNX Runtime")
    openvino = [each["openvino"] for each in seeds if "openvino" in each]
    if openvino and "error" in openvino[0]:
        said.append(f"in OpenVINO: `{openvino[0]['error']}`")
    elif openvino:
        batches = [
            f"{ranged([each['ratios'][place] for each in openvino])} at batch {batch}"
            for place, batch in enumerate(BATCHES)
        ]
        said.append(
            f"in OpenVINO {openvino[0]['integer']}, and the time against the dense file there is {', '.join(batches)}"
        )
    return [f"- {name}: {'; '.join(said)}."] if said else []


def tables(task: Task, found: Found) -> list[str]:
    techniques: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {}
    for peer in found.values():
        for name, row in peer.get("variants", {}).items():
            baseline = peer["baselines"][row["baseline"]]
            techniques.setdefault(row["technique"], []).append((name, row, baseline))
    for name, peer in found.items():
        for technique, rows in techniques.items():
            if "failed" in peer and technique.startswith(PEERS[name].technique):
                rows.append((name, {"error": peer["failed"], "seeds": []}, {"seeds": []}))
    lines = []
    for technique, rows in techniques.items():
        kind, plain = rows[0][1]["baseline"], rows[0][2]
        head = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [f"\n## {technique[0].upper()}{technique[1:]}\n", *head, line(kind, plain, plain, task)]
        lines += [line(name, row, baseline, task) for name, row, baseline in rows]
        said = [text for name, row, _ in rows for text in remarks(name, row, task)]
        lines += ["", *said] if said else []
    return lines


def introduction(args: argparse.Namespace, task: Task, found: Found) -> list[str]:
    known = [peer for peer in found.values() if "versions" in peer]
    versions = {name: version for peer in known for name, version in peer["versions"].items()}
    same = {
        json.dumps([each["metrics"] for each in peer["baselines"][DENSE]["seeds"]])
        for peer in known
        if DENSE in peer["baselines"]
    }
    data = " --data PATH" if args.data else ""
    other = " --task recommender" if task.name == "recommender" else ""
    return [
        f"# Beside the peers: {task.title}\n",
        f"{date.today()}, {platform.machine()} CPU, one thread; {', '.join(f'{n} {v}' for n, v in versions.items())}; "
        f"each peer in an environment of its own.\n"
        f"`python benchmarks/peers/run.py{other}{data} --peers {args.peers} --seeds {args.seeds} "
        f"--output benchmarks/peers/{args.output.name}`\n",
        task.introduction(args.seeds),
        'Zeros are those of the weights that may become zero, the same for all. "weights, gzip" is the saved '
        "state_dict, compressed; quantized models keep float weights there, so only their file counts. Times in ONNX "
        "Runtime are ratios to the dense file of the same seed: calls in turns, in one process, one thread, CPU time "
        f"(mean and range over the seeds; each the mean over {OPENINGS} openings of both files). "
        '"step" is a training step with all hooks, "whole fit" everything from '
        "the first hook to the last, both in CPU time as a ratio to the dense run of the same seed and process; runs "
        "take turns seed by seed. Steps are counted while the technique is at work: from the start of the window, for "
        "quantization from 55 % of the run. A run takes 3 to 9 seconds, so what happens once (exporting a graph, "
        "calibrating, trying groups of channels) weighs in the whole fit as it would not in a long one.\n",
        '"resumes": a fresh model and a fresh Trainer go on from the checkpoint after '
        f"{cut_at(task, 0.5)} of the {task.epochs} epochs of seed 0 (quantization: {cut_at(task, 0.75)}); yes is bit "
        "for bit the weights of the run that was not interrupted, as in the dense run; by hand is the same after what "
        "the user has to do first, which stands below the table.\n",
        "The dense runs of all environments "
        + ("have the same scores." if len(same) == 1 else "differ in their scores: compare within an environment."),
    ]


def decisions(names: list[str], found: Found) -> list[str]:
    lines = ["\n## What was decided for each\n"]
    for name in names:
        text = ast.get_docstring(ast.parse((HERE / PEERS[name].script).read_text())) or ""
        lines.append(f"- **{name}**: {' '.join(text.split())}".replace("``", "`"))
        if found[name].get("refused"):
            lines.append(f"  pip took not all lines of constraints.txt: `{found[name]['refused'][0]}`.")
        if "failed" in found[name]:
            lines.append(f"  It has no row: {found[name]['failed']}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--peers", default="all", help=f"'all', or some of {', '.join(PEERS)} with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file; default a generated shop")
    parser.add_argument("--epochs", type=int, help="fewer, to try it out")
    parser.add_argument("--environments", type=Path, default=default_folder(), metavar="DIR")
    parser.add_argument("--folder", type=Path, help="for models and logs; default beside the environments")
    parser.add_argument("--keep", action="store_true", help="take what a worker found earlier in that folder")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    args.environments = args.environments.absolute()
    names = [name for name, peer in PEERS.items() if args.task in peer.tasks]
    if args.peers != "all":
        unknown = set(args.peers.split(",")) - set(PEERS)
        if unknown:
            parser.error(f"unknown peers {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
        names = [name for name in names if name in args.peers.split(",")]
    quiet()
    found = collect(args, names, args.folder or args.environments / "runs")
    task = TASKS[args.task](args.data)
    measure_files(task, found)
    lines = [*introduction(args, task, found), *tables(task, found), *decisions(names, found), "", task.limits]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
