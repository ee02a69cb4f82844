"""ONNX Runtime GenAI: an engine for generation that builds from a Hugging Face folder, without network.

It has a cache of keys and values, so that each further token costs one row. Threads: one.
"""

import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INSTALL", "Engine", "build_engine", "missing", "times_in_turns"]

INSTALL = "python -m pip install --no-deps onnxruntime-genai==0.18.0 onnx-ir"
MODEL = "model.onnx"
FURTHER = 32
ROUNDS = 5


def missing() -> list[str]:
    """Return the packages that an engine needs and that are not installed."""
    return [name for name in ("onnxruntime_genai", "onnx_ir") if importlib.util.find_spec(name) is None]


def build_engine(folder: Path, out: Path, *, precision: str = "int4") -> None:
    """Build an engine with the builder of ONNX Runtime GenAI.

    Args:
        folder: A Hugging Face folder with a tokenizer. Integers in the GPTQ layout are taken over.
        out: Where the engine goes; what is there is replaced.
        precision: "int4" or "fp32". A folder of float weights is rounded by the builder itself for "int4".

    Raises:
        RuntimeError: If the builder fails; with its last lines.
    """
    options = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "folder"
        shutil.copytree(folder, source, copy_function=_link)
        config = json.loads((folder / "config.json").read_text())
        is_packed = config.get("quantization_config", {}).get("lm_head", False)
        if precision == "int4" and (is_packed or config.get("tie_word_embeddings", False)):
            # In the folder head and table are two weights. The builder stores equal ones once if the configuration says
            # that they are one.
            options = ["--extra_options", "shared_embeddings=true"]
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(source)]
        command += ["-o", str(out), "-p", precision, "-e", "cpu", "-c", str(Path(scratch) / "cache"), *options]
        shutil.rmtree(out, ignore_errors=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        last = "\n".join((ended.stdout + ended.stderr).splitlines()[-5:])
        raise RuntimeError(f"ONNX Runtime GenAI's builder ended with code {ended.returncode}:\n{last}")
    if is_packed:
        _shape_scales(out / MODEL, config["vocab_size"])
    _use_one_thread(out / "genai_config.json")


def _link(source: str, target: str) -> None:
    os.symlink(Path(source).resolve(), target)


def _shape_scales(path: Path, tokens: int) -> None:
    """Give scales and zero points of a packed table the rank that its operator asks for; they are written flat."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input[2:] if node.op_type == "GatherBlockQuantized" else ():
            if len(tensors[name].dims) == 1:
                tensors[name].dims[:] = [tokens, tensors[name].dims[0] // tokens]
    onnx.save(model, path)


def _use_one_thread(path: Path) -> None:
    settings = json.loads(path.read_text())
    settings["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = 1
    path.write_text(json.dumps(settings, indent=1))


class Engine:
    """An engine, loaded.

    Args:
        folder: What ``build_engine`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(folder))
        self.bytes = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))

    def _begin(self, ids: Sequence[int], longest: int, shortest: int = 0) -> Any:
        options = self.library.GeneratorParams(self.model)
        options.set_search_options(max_length=longest, min_length=shortest, do_sample=False)
        generator = self.library.Generator(self.model, options)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        return generator

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits after each token of a text, ``[tokens, vocabulary]``."""
        return torch.from_numpy(np.array(self._begin(ids, len(ids) + 1).get_output("logits")))[0]

    def perplexity(self, texts: Iterable[Sequence[int]]) -> float:
        """Return the perplexity of some texts; every token counts alike."""
        total, tokens = 0.0, 0
        for ids in texts:
            logits = self.logits(ids)
            total += float(F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="sum"))
            tokens += len(ids) - 1
        return math.exp(total / tokens)

    def times(self, ids: Sequence[int]) -> tuple[float, float]:
        """Return milliseconds to the first token of a prompt, and of each further one."""
        began = time.perf_counter()
        longest = len(ids) + FURTHER + 1
        generator = self._begin(ids, longest, shortest=longest)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(FURTHER):
            generator.generate_next_token()
        return (first - began) * 1e3, (time.perf_counter() - first) * 1e3 / FURTHER

    def continued(self, ids: Sequence[int], last: int, longest: int = 24) -> list[int]:
        """Continue a prompt with the likeliest tokens up to the last one of a message, and return what was added."""
        generator = self._begin(ids, len(ids) + longest)
        while not generator.is_done():
            generator.generate_next_token()
            if int(generator.get_next_tokens()[0]) == last:
                break
        added = list(map(int, generator.get_sequence(0)[len(ids) :]))
        return added[: added.index(last)] if last in added else added


def times_in_turns(engines: Mapping[str, Engine], ids: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return the median times of engines that take turns, after one call to warm up."""
    rounds = [{name: engine.times(ids) for name, engine in engines.items()} for _ in range(ROUNDS + 1)][1:]
    return {
        name: (statistics.median(r[name][0] for r in rounds), statistics.median(r[name][1] for r in rounds))
        for name in engines
    }
