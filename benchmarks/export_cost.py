"""What `export_onnx` costs beside plain `torch.onnx.export`: memory and CPU time of a fresh process for each.

A Llama with random weights, of about 32 million parameters, is written by both, unquantized and with weights of
8 bits. The peak is that of the whole process less what it takes before the export (interpreter, packages, module), in
units of the module's float32 weights; the CPU time is that of all threads. Ours without verification writes the same
kind of file; with it, the file is run too.

    python benchmarks/export_cost.py --rounds 3
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WAYS = ("torch.onnx.export", "export_onnx, not verified", "export_onnx", "export_onnx, 8-bit weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way, in turns")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measured(given.way, given.layers)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--layers", str(given.layers)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, found[way][-1], file=sys.stderr, flush=True)
    plain = found[WAYS[0]]
    print(f"{plain[0]['parameters']:,.0f} parameters\n")
    print("| | peak, times the weights | CPU time, times plain | file, times the weights |\n| --- | --- | --- | --- |")
    for way, rows in found.items():
        ratios = [row["seconds"] / base["seconds"] for row, base in zip(rows, plain, strict=True)]
        peak = statistics.median(row["peak"] for row in rows)
        print(f"| {way} | {peak:.2f} | {statistics.median(ratios):.2f} | {rows[0]['file']:.2f} |")


def measured(way: str, layers: int) -> dict[str, float]:
    """Export once."""
    import onnxruntime  # noqa: F401 - imported before, so that neither way pays for it
    import onnxscript  # noqa: F401
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_optim import export_onnx, quantize_post_training

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=input_ids).logits
            return logits

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",
    )
    model = Logits(LlamaForCausalLM(config)).eval()
    if "8-bit" in way:
        quantize_post_training(model, activation_bits=None)
    tokens = torch.randint(0, 16_384, (2, 16))
    names = {"input_ids": {0: "batch", 1: "length"}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        before, began = resident(), time.process_time()
        if way == WAYS[0]:
            shapes = ({place: torch.export.Dim(name, min=1) for place, name in names["input_ids"].items()},)
            torch.onnx.export(model, (tokens,), str(file), dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            options = {"keep_float": "none", "verify": "not verified" not in way}
            export_onnx(model, file, tokens, dynamic_dims={"input_ids": {1: "length"}}, **options)
        seconds = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"parameters": weights / 4, "peak": peak / weights, "seconds": seconds, "file": size / weights}


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
