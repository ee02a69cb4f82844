"""Compress a language model on customer-service messages with one recipe, down to an engine that generates from 4 bits.

The model is SmolLM2-135M-Instruct (its package is installed by hand: the error names the line), or that of a Hugging
Face folder (--model). It is fine-tuned on Banking77's messages and is then the teacher of what is left of it; every
control is trained as long. ``python examples/assistant.py --data PATH``; ``--fast`` runs it on a tiny random model.
The compressed model alone, from YAML: ``--prepare --files checkpoints/assistant``, then ``assistant.yaml``.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from assistant_data import AssistantData, encode, read_texts
from assistant_engine import INSTALL, Engine, build_engine, missing, times_in_turns
from assistant_model import Assistant, find_model, perplexity, tiny_model
from chain import at_random, prepare
from lightning_optim import Recipe, export_onnx, export_pretrained, load_from_checkpoint, student_only
from lightning_optim.report.columns import Column
from lightning_optim.report.document import Report, Section

__all__ = ["FAST", "REAL", "Job", "Row", "fit", "main"]

RECIPE = "language-model"
TOP_K = 32  # likeliest tokens of a position that the cache holds
PROMPT = 32  # tokens, of the times
DENSE = "fine-tuned"
ROUNDED = "its 4 bits, rounded by the engine's builder"
COMPRESSED = "compressed"
LABELS = "next words instead of the teacher"
RANDOM = "blocks and channels at random"
SCRATCH = "its shape, from scratch"
CONTROLS = (LABELS, RANDOM, SCRATCH)
TARGETS = {"bytes": 0.12, "further": 1 / 5, "perplexity": 1.10}
"""Of the fine-tuned model's float32 engine and perplexity."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Lengths and learning rates of the runs.

    Attributes:
        messages: To train on.
        held_out: For the perplexity.
        batch_size: Messages in a step.
        epoch_steps: Steps of an epoch, which is a part of the messages; a run goes on after each.
        teacher_epochs: Of fine-tuning, before anything else.
        epochs: Of each row after that.
        dense_rate: Learning rate of the whole model.
        rate: Of the compressed one and its controls.
        scratch_rate: Of random weights.
    """

    messages: int
    held_out: int
    batch_size: int
    epoch_steps: int
    teacher_epochs: int
    epochs: int
    dense_rate: float
    rate: float
    scratch_rate: float


REAL = Job(2400, 256, 8, epoch_steps=50, teacher_epochs=4, epochs=6, dense_rate=1e-4, rate=3e-4, scratch_rate=5e-4)
FAST = Job(480, 64, 16, epoch_steps=30, teacher_epochs=4, epochs=3, dense_rate=3e-3, rate=3e-3, scratch_rate=3e-3)


@dataclass
class Run:
    """One seed of the job.

    Attributes:
        job: Lengths and rates.
        data: The messages.
        recipe: What compresses.
        folder: Where the files of this seed go.
        resume: Continue rows that were interrupted, and keep those that ended.
    """

    job: Job
    data: AssistantData
    recipe: Recipe
    folder: Path
    resume: bool = False

    @property
    def teacher(self) -> Path:
        """The folder of the fine-tuned model."""
        return self.folder / "teacher"

    @property
    def cache(self) -> Path:
        """The file of the teacher's likeliest tokens."""
        return self.folder / "teacher_logits.bin"

    def prepare(self, model: Path, tokenizer: Any) -> None:
        """Fine-tune the model, and write its folder."""
        if self.resume and self.teacher.is_dir():
            return
        module = self.train("teacher", str(model), self.job.dense_rate, self.job.teacher_epochs)
        export_pretrained(module, self.teacher, tokenizer=tokenizer)

    def train(
        self, name: str, folder: str, rate: float, epochs: int, recipe: Recipe | None = None, *, scratch: bool = False
    ) -> Assistant:
        """Train a row, or read it where it ended before; return its model.

        Args:
            name: Of its files.
            folder: The Hugging Face folder that it begins with.
            rate: Learning rate.
            epochs: Number of epochs.
            recipe: What compresses it meanwhile.
            scratch: Begin with random weights.
        """
        ended, place = self.folder / f"{name}.ckpt", self.folder / f"{name}.running"
        if self.resume and ended.is_file():
            print(f"seed {self.data.seed}, read: {name}")
            return load_from_checkpoint(Assistant, ended, folder=folder, scratch=True).eval()
        print(f"seed {self.data.seed}, training: {name}")
        last = place / "last.ckpt"
        warnings.filterwarnings("ignore", "Checkpoint directory")  # a run that goes on finds its own file there
        if not self.resume:
            shutil.rmtree(place, ignore_errors=True)
        trainer, module = fit(
            Assistant(folder, learning_rate=rate, scratch=scratch),
            self.data,
            epochs,
            recipe,
            cache=self.cache,
            teacher=self.teacher,
            callbacks=[
                pl.callbacks.ModelCheckpoint(
                    dirpath=place, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
                )
            ],
            ckpt_path=last if last.is_file() else None,
        )
        trainer.save_checkpoint(place / "ended.ckpt", weights_only=True)
        student_only(place / "ended.ckpt", ended) if recipe and recipe.distillation else (place / "ended.ckpt").replace(
            ended
        )
        shutil.rmtree(place)
        return module.eval()

    def train_all(self) -> dict[str, Assistant]:
        """Train every row."""
        job, teacher = self.job, str(self.teacher)
        nets = {DENSE: self.train("fine-tuned", teacher, job.dense_rate, job.epochs)}
        nets[COMPRESSED] = self.train("compressed", teacher, job.rate, job.epochs, self.recipe)
        labels = dataclasses.replace(self.recipe, distillation=None)
        nets[LABELS] = self.train("next-words", teacher, job.rate, job.epochs, labels)
        nets[RANDOM] = self.train("at-random", teacher, job.rate, job.epochs, at_random(self.recipe))
        shape = self.folder / "shape"
        copy.deepcopy(nets[COMPRESSED].model.config).save_pretrained(shape)
        epochs = job.teacher_epochs + job.epochs
        nets[SCRATCH] = self.train("from-scratch", str(shape), job.scratch_rate, epochs, scratch=True)
        return nets


def fit(
    module: Assistant,
    data: AssistantData,
    epochs: int,
    recipe: Recipe | None = None,
    *,
    cache: Path | None = None,
    teacher: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    ckpt_path: Path | None = None,
    max_steps: int = -1,
) -> tuple[pl.Trainer, Assistant]:
    """Train with a plain Trainer, the recipe's callbacks and the teacher's cached answers, if the recipe distills."""
    pl.seed_everything(data.seed, verbose=False)
    wrapped: Any = module
    data.indexed = recipe is not None and recipe.distillation is not None
    if recipe is not None and recipe.distillation is not None:
        live = None if cache is not None and cache.is_file() else Assistant(str(teacher))
        wrapped = recipe.wrap(module, live, cache=cache, cache_top_k=TOP_K)
    trainer = pl.Trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        limit_val_batches=0,  # nothing is chosen while it trains
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        callbacks=[*(recipe.callbacks() if recipe else ()), *callbacks],
    )
    trainer.fit(wrapped, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def measure(nets: Mapping[str, Assistant], run: Run, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Return a row for each model, and the prompts that the engines continue."""
    rows = {
        name: {
            "name": name,
            "kind": "dense" if name == DENSE else "control" if name in CONTROLS else "compressed",
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "perplexity": perplexity(net, run.data.val_dataloader()),
        }
        for name, net in nets.items()
    }
    for name, folder in (("fine-tuned", DENSE), ("compressed", COMPRESSED)):
        packed = "gptq" if folder == COMPRESSED else None
        report = export_pretrained(nets[folder], run.folder / name, tokenizer=tokenizer, quantization=packed)
        rows[folder]["folder_bytes"] = sum(report.files.values())
    onnx = export_onnx(nets[COMPRESSED].model, run.folder / "compressed.onnx", _example(run), **_export_options(run))
    rows[COMPRESSED]["onnx_bytes"] = onnx.file_bytes
    if missing():
        return list(rows.values()), []
    rows[ROUNDED] = {"name": ROUNDED, "kind": "compressed", "parameters": rows[DENSE]["parameters"]}
    built = {
        DENSE: ("fine-tuned", "fp32"),
        ROUNDED: ("fine-tuned", "int4"),
        COMPRESSED: ("compressed", "int4"),
    }
    engines = {}
    for name, (folder, precision) in built.items():
        print(f"seed {run.data.seed}, building: {name}")
        out = run.folder / f"engine-{folder}-{precision}"
        build_engine(run.folder / folder, out, precision=precision)
        engines[name] = Engine(out)
    texts = run.data.texts[1].ids
    times = times_in_turns(engines, [token for text in texts for token in text][:PROMPT])
    for name, engine in engines.items():
        rows[name] |= {
            "bytes": engine.bytes,
            "engine_perplexity": engine.perplexity(texts),
            "first": times[name][0],
            "further": times[name][1],
        }
    order = (DENSE, ROUNDED, COMPRESSED, *CONTROLS)
    return [rows[name] for name in order], _continued(engines, run, tokenizer)


def _example(run: Run) -> dict[str, torch.Tensor]:
    batch = next(iter(run.data.val_dataloader()))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _export_options(run: Run) -> dict[str, Any]:
    return {"dynamic_dims": {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}, "least_agreement": 0.9}


def _continued(engines: Mapping[str, Engine], run: Run, tokenizer: Any, prompts: int = 3) -> list[Row]:
    """Let the engines continue the first words of some held-out messages."""
    last = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for text in read_texts(run.data.path, synthetic=run.data.synthetic)[1][:prompts]:
        begun = " ".join(text.split()[:3])
        ids = encode(tokenizer, [begun])[0][:-1]
        row: Row = {"prompt": begun}
        for name in (DENSE, COMPRESSED):
            row[name] = tokenizer.decode(engines[name].continued(ids, last)).strip().replace("\n", " ")
        found.append(row)
    return found


def mean(seeds: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the mean of each number over the seeds, and the standard deviation of perplexities."""
    found = []
    for same in zip(*seeds, strict=True):
        row: Row = {key: same[0][key] for key in ("name", "kind")}
        for key in [key for key in same[0] if key not in row]:
            values = [each[key] for each in same]
            row[key] = statistics.mean(values)
            if "perplexity" in key and len(values) > 1:
                row[f"{key}_std"] = statistics.stdev(values)
        found.append(row)
    return found


def _with_std(key: str) -> Any:
    def form(row: Row) -> str:
        spread = row.get(f"{key}_std")
        return f"{row[key]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")

    return form


COLUMNS = [
    Column("name", "model"),
    Column("parameters", "parameters", "{:,.0f}"),
    Column("perplexity", "perplexity (module)", _with_std("perplexity")),
    Column("engine_perplexity", "perplexity (engine)", _with_std("engine_perplexity")),
    Column("bytes", "engine, MB", lambda row: f"{row['bytes'] / 1e6:.1f}"),
    Column("folder_bytes", "folder, MB", lambda row: f"{row['folder_bytes'] / 1e6:.1f}"),
    Column("onnx_bytes", "packed ONNX, MB", lambda row: f"{row['onnx_bytes'] / 1e6:.1f}"),
    Column("first", "first token, ms", "{:.1f}"),
    Column("further", "each further, ms", "{:.2f}"),
]


def describe(rows: list[Row], prompts: list[Row], run: Run, model: str, source: str, seeds: int) -> Report:
    """Return the report."""
    job, by_name = run.job, {row["name"]: row for row in rows}
    steps = job.epoch_steps
    notes = [
        f"Every row saw {(job.teacher_epochs + job.epochs) * steps} steps of {job.batch_size} messages: "
        f"{job.teacher_epochs * steps} of fine-tuning the whole model, then {job.epochs * steps} of its own; from "
        "scratch all of them.",
        f"Perplexity of {len(run.data.texts[1])} held-out messages, of the module as it is deployed (rounded), and of "
        "the engine's own logits; the engine rounds the inputs of products too.",
        f"Time to the first token after {PROMPT}, and of each of {32} further ones: ONNX Runtime GenAI, one thread, "
        "engines in turns, median.",
    ]
    if missing():
        notes.append(f"ONNX Runtime GenAI is not installed ({INSTALL}): no engine was built or timed.")
    else:
        notes.append(_targets(by_name))
    notes.append(_excess(by_name))
    sections = []
    if prompts:
        columns = [Column("prompt", "a message begins"), *(Column(name, name) for name in (DENSE, COMPRESSED))]
        sections.append(Section("How they go on", "The likeliest tokens, of seed 0.", columns=columns, rows=prompts))
    return Report(
        title=f"{model} on customer-service messages ({source}), compressed by the recipe {RECIPE!r}",
        summary=f"{len(run.data.texts[0]):,} messages to train on, {seeds} seed{'s' if seeds > 1 else ''}.",
        columns=[column for column in COLUMNS if any(column.key in row for row in rows)],
        rows=rows,
        notes=notes,
        sections=sections,
    )


def _targets(rows: Mapping[str, Row]) -> str:
    dense, small = rows[DENSE], rows[COMPRESSED]
    found = []
    for key, title in (
        ("bytes", "engine's bytes"),
        ("further", "time of a further token"),
        ("perplexity", "perplexity"),
    ):
        ratio = small[key] / dense[key]
        verdict = "reached" if ratio <= TARGETS[key] else "MISSED"
        found.append(f"{title} {ratio:.3f} (required: at most {TARGETS[key]:.3g}): {verdict}")
    return f"Against {DENSE} in float32: {'; '.join(found)}."


def _excess(rows: Mapping[str, Row]) -> str:
    """Say how far each control is above the dense model, in units of the compressed model's excess."""
    dense = rows[DENSE]["perplexity"]
    ours = rows[COMPRESSED]["perplexity"] - dense
    others = [f"{name} {rows[name]['perplexity'] - dense:.2f}" for name in CONTROLS]
    return f"Perplexity above {DENSE}: {COMPRESSED} {ours:.2f}, {', '.join(others)}."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder instead of SmolLM2-135M-Instruct")
    parser.add_argument("--data", metavar="PATH", help="the folder with Banking77's train.csv and test.csv")
    parser.add_argument("--synthetic", action="store_true", help="generated messages instead of the files")
    parser.add_argument("--fast", action="store_true", help="a tiny model with random weights, three minutes")
    parser.add_argument("--recipe", default=RECIPE, help="a recipe's name, or its YAML file")
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run with these files stopped")
    parser.add_argument("--prepare", action="store_true", help="only make the files that assistant.yaml reads")
    parser.add_argument("--files", metavar="DIR", help="folder of models and checkpoints; default the report's")
    parser.add_argument("--report", default="reports/assistant", metavar="DIR", help="where the report goes")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; more than one only on quiet cores")
    parser.add_argument("--verbose", action="store_true", help="print the logs of the Trainer and the callbacks")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    if arguments.fast and arguments.model:
        parser.error("--fast takes a tiny model: it and --model exclude each other")
    return arguments


def main(argv: Sequence[str] | None = None) -> Report | None:
    """Train, measure, print and write the report; return it. With ``--prepare`` there is none."""
    arguments = parse(argv)
    prepare(threads=arguments.threads, verbose=arguments.verbose)
    recipe, job = Recipe.load(arguments.recipe), FAST if arguments.fast else REAL
    report_folder = Path(arguments.report)
    files = Path(arguments.files or report_folder)
    files.mkdir(parents=True, exist_ok=True)
    texts, _ = read_texts(arguments.data, synthetic=arguments.synthetic)
    model = tiny_model(files / "tiny", texts) if arguments.fast else find_model(arguments.model, files)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    found, prompts = [], []
    for seed in range(arguments.seeds):
        data = AssistantData(
            str(model),
            arguments.data,
            synthetic=arguments.synthetic,
            messages=job.messages,
            held_out=job.held_out,
            batch_size=job.batch_size,
            epoch_steps=job.epoch_steps,
            seed=seed,
        )
        data.setup()
        folder = files if arguments.prepare else files / f"seed-{seed}"
        run = Run(job, data, recipe, folder, arguments.resume)
        run.folder.mkdir(parents=True, exist_ok=True)
        run.prepare(model, tokenizer)
        if arguments.prepare:
            run.cache.unlink(missing_ok=True)
            fit(Assistant(str(run.teacher)), data, 1, recipe, cache=run.cache, teacher=run.teacher, max_steps=1)
            print(f"{run.teacher} and {run.cache} are made")
            return None
        rows, continued = measure(run.train_all(), run, tokenizer)
        found.append(rows)
        prompts = prompts or continued
    report = describe(
        mean(found),
        prompts,
        run,
        "a tiny Llama" if arguments.fast else model.name,
        "generated" if arguments.synthetic else "Banking77",
        arguments.seeds,
    )
    report.print()
    others = {"report.json": json.dumps({"rows": report.rows, "prompts": prompts}, indent=1)}
    print(f"report: {report.write(report_folder, others)}")
    return report


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
