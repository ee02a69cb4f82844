"""Memory and time of distilling a language model: the logits of a vocabulary, whole and in chunks.

Student and teacher are Llamas of transformers, with few tokens, so that the logits are what counts. Memory is the peak
of the process's resident memory in its second step, above what it was before that, in units of one float32
``[tokens, vocabulary]`` tensor; each figure is of a process of its own, whose allocator returns freed blocks at once
(``MALLOC_MMAP_THRESHOLD_``). It includes what operators need inside. Time is that of whole steps (forward, backward,
SGD) in one process, the variants in turns; its ratio is to the step of the student alone in the same round.

torchtune and Liger are installed without their dependencies (``pip install --no-deps --target PEERS torchtune
liger-kernel``), of which these losses need none.

    python benchmarks/distillation_memory.py --peers PEERS > benchmarks/distillation_memory_cpu_2026-12-01.md
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import transformers
from quiet import prepare
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_optim import DistillationModule
from lightning_optim.distillation import LogitCache, Teacher
from lightning_optim.distillation.indexed import Indexed

TOKENS = {32_000: 1_024, 150_000: 256}
BATCH = 2
STUDENT, TEACHER = (256, 2), (512, 4)
ALPHA, TEMPERATURE = 0.5, 2.0
sgd = partial(torch.optim.SGD, lr=1e-3)

Step = Callable[[], None]


def llama(width: int, blocks: int, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 3 * width}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, num_attention_heads=8))


def batch_of(vocabulary: int, masked: float) -> dict[str, Tensor]:
    """Tokens; the first part of each text is a prompt, whose labels do not count."""
    ids = torch.randint(0, vocabulary, (BATCH, TOKENS[vocabulary] // BATCH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : int(masked * ids.shape[1])] = -100
    return {"input_ids": ids, "labels": labels}


def stepping(student: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = sgd(student.parameters())

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def distilled(vocabulary: int, masked: float = 0.0, **options: object) -> Step:
    student, teacher = llama(*STUDENT, vocabulary, 0), llama(*TEACHER, vocabulary, 1)
    options = {"alpha": ALPHA, "temperature": TEMPERATURE, **options}
    module = DistillationModule(student, teacher, optimizer=sgd, **options)
    batch = batch_of(vocabulary, masked)
    return stepping(student, lambda: module.training_step(batch, 0))


class Whole(nn.Module):
    """A teacher whose head is not its last layer, so its logits are whole."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Tensor:
        return self.net(input_ids=batch["input_ids"]).logits.add(0.0)


def distilled_by_whole(vocabulary: int) -> Step:
    student, teacher = llama(*STUDENT, vocabulary, 0), Whole(llama(*TEACHER, vocabulary, 1))
    module = DistillationModule(student, teacher, optimizer=sgd, alpha=ALPHA, temperature=TEMPERATURE)
    batch = batch_of(vocabulary, 0.0)
    return stepping(student, lambda: module.training_step(batch, 0))


def plain(vocabulary: int) -> Step:
    student, batch = llama(*STUDENT, vocabulary, 0), batch_of(vocabulary, 0.0)
    return stepping(student, lambda: student(**batch).loss)


def plain_loop(vocabulary: int) -> Step:
    """The usual loop of one's own: ``F.kl_div`` of all logits beside the model's loss."""
    student, teacher = llama(*STUDENT, vocabulary, 0), llama(*TEACHER, vocabulary, 1).eval()
    batch = batch_of(vocabulary, 0.0)

    def loss() -> Tensor:
        answer = student(**batch)
        with torch.no_grad():
            taught = teacher(input_ids=batch["input_ids"]).logits
        ours = F.log_softmax(answer.logits[:, :-1].flatten(0, 1) / TEMPERATURE, -1)
        theirs = F.log_softmax(taught[:, :-1].flatten(0, 1) / TEMPERATURE, -1)
        kd = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return (1.0 - ALPHA) * answer.loss + ALPHA * kd

    return stepping(student, loss)


def torchtune_chunked(vocabulary: int) -> Step:
    """Torchtune's chunked forward KL, temperature 1; its file alone, because the package imports torchao."""
    found = find_spec("torchtune")
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = spec_from_file_location("kd_losses", file)
    assert spec is not None
    assert spec.loader is not None
    kd_losses = module_from_spec(spec)
    spec.loader.exec_module(kd_losses)
    student, teacher = llama(*STUDENT, vocabulary, 0), llama(*TEACHER, vocabulary, 1).eval()
    batch, kl = batch_of(vocabulary, 0.0), kd_losses.ForwardKLWithChunkedOutputLoss(8)

    def loss() -> Tensor:
        answer = student(**batch)
        with torch.no_grad():
            taught = teacher(input_ids=batch["input_ids"]).logits
        kd = kl(answer.logits[:, :-1].chunk(8, 1), taught[:, :-1].chunk(8, 1), batch["labels"][:, 1:])
        return (1.0 - ALPHA) * answer.loss + ALPHA * kd

    return stepping(student, loss)


def liger_fused(vocabulary: int) -> Step:
    """Liger's fused linear loss in plain torch (beta 0 is forward KL): it multiplies both heads itself."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    student, teacher = llama(*STUDENT, vocabulary, 0), llama(*TEACHER, vocabulary, 1).eval()
    batch = batch_of(vocabulary, 0.0)
    fused = LigerFusedLinearJSDLoss(
        1.0 - ALPHA, ALPHA, beta=0.0, temperature=TEMPERATURE, compiled=False, chunk_size=128
    )

    def loss() -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        ours = student.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        return fused(ours, student.lm_head.weight, theirs, teacher.lm_head.weight, labels[:, 1:].flatten())

    return stepping(student, loss)


def from_cache(vocabulary: int) -> Step:
    """The likeliest 32 words of each position from a file."""
    folder = tempfile.mkdtemp()
    teacher, batch = Teacher([llama(*TEACHER, vocabulary, 1)]), batch_of(vocabulary, 0.0)
    teacher.freeze()
    index = torch.arange(BATCH)
    with torch.no_grad():
        logits = teacher.networks[0](input_ids=batch["input_ids"]).logits
    file = Path(folder) / "teacher.bin"
    answers = [(index, logits)]
    LogitCache.build(file, answers, teacher=teacher.checksum(), rows=BATCH, top_k=32, progress=False)
    del logits, answers
    student = llama(*STUDENT, vocabulary, 0)
    module = DistillationModule(student, optimizer=sgd, alpha=ALPHA, temperature=1.0, cache=file, cache_top_k=32)
    module._cached.cache = LogitCache(file)
    return stepping(student, lambda: module.training_step(Indexed(batch, index), 0))


VARIANTS: dict[str, Callable[[int], Step]] = {
    "student alone": plain,
    "own loop, `F.kl_div`": plain_loop,
    "torchtune, 8 chunks": torchtune_chunked,
    "Liger, both heads fused": liger_fused,
    "`kd`, whole": lambda vocabulary: distilled(vocabulary, chunk_size=None),
    "`kd`, chunked, teacher's logits whole": distilled_by_whole,
    "`kd`, chunked": distilled,
    "`kd`, chunked, 3/4 of the tokens are prompt": lambda vocabulary: distilled(vocabulary, 0.75),
    "`kd`, cached, 32 words": from_cache,
}


def peak(name: str, vocabulary: int) -> float:
    """Return the peak of a variant's second step, in bytes above the memory before it."""
    step = VARIANTS[name](vocabulary)
    step()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return memory("VmHWM") - before


def memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_alone(name: str, vocabulary: int, peers: str) -> float:
    command = [sys.executable, __file__, "--peers", peers, "--cell", name, str(vocabulary)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def ratios(names: list[str], vocabulary: int, rounds: int) -> dict[str, list[float]]:
    """Return the time of each variant's step, over that of the student alone in the same round."""
    steps = {name: VARIANTS[name](vocabulary) for name in names}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.thread_time()
            step()
            if turn:
                times[name].append(time.thread_time() - begun)
    alone = times["student alone"]
    return {name: [own / base for own, base in zip(spent, alone, strict=True)] for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, choices=TOKENS, nargs="+", default=list(TOKENS))
    parser.add_argument("--peers", default="", help="folder in which torchtune and Liger are installed")
    parser.add_argument("--cell", nargs=2)
    arguments = parser.parse_args()
    sys.path.append(arguments.peers)
    if not arguments.peers:
        del VARIANTS["torchtune, 8 chunks"], VARIANTS["Liger, both heads fused"]
    if "cache_top_k" not in signature(DistillationModule).parameters:
        del VARIANTS["`kd`, cached, 32 words"]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    prepare(threads=1)
    if arguments.cell:
        print(peak(arguments.cell[0], int(arguments.cell[1])))
        return
    print("# Memory and time of distilling a language model\n")
    print(f"{platform.machine()}, one thread; torch {torch.__version__}, transformers {transformers.__version__}.")
    print(f"`python benchmarks/distillation_memory.py --rounds {arguments.rounds}`\n")
    for vocabulary in arguments.vocabulary:
        tokens, unit = TOKENS[vocabulary], 4 * TOKENS[vocabulary] * vocabulary
        print(f"## {vocabulary:,} words, {tokens:,} tokens (a unit is {unit / 1e6:.0f} MB)\n")
        print("| | peak, units | above the student alone | step, ratio (median, range) |\n| --- | --- | --- | --- |")
        peaks = {name: peak_alone(name, vocabulary, arguments.peers) / unit for name in VARIANTS}
        spent = ratios(list(VARIANTS), vocabulary, arguments.rounds)
        for name, used in peaks.items():
            told = f"{median(spent[name]):.2f} ({min(spent[name]):.2f} to {max(spent[name]):.2f})"
            print(f"| {name} | {used:.2f} | {used - peaks['student alone']:.2f} | {told} |")
        print()


if __name__ == "__main__":
    main()
