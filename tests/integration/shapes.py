"""What leaves each architecture of transformers: heads, inner channels, the residual width, blocks, and all of it.

``python tests/integration/shapes.py`` runs all of it and writes the table into docs/support.md; ``test_zoo.py``
compares. A new architecture is a row of ``PATTERNS``, and its configuration one of ``helpers.pretrained.MODELS``.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import BUT, first_sentence, put_on_page, quiet, table

from helpers.pretrained import MODELS, Model
from lightning_optim import export_pretrained, prune_channels, prune_depth
from lightning_optim.outputs import output_tensors

BEGIN, END = "<!-- shapes: begin -->", "<!-- shapes: end -->"

LLAMA = ("*self_attn*", "*mlp*")
PATTERNS: dict[str, tuple[str, str | None]] = {
    # name: (layers of attention, layers of the feed-forward network)
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma 2", "Gemma 3", "OLMo 2"), LLAMA),
    **dict.fromkeys(("Phi", "Phi-3", "Mixtral", "Qwen2-MoE", "gpt-oss"), LLAMA),
    "Falcon": ("*self_attention*", "*mlp*"),
    "GPT-NeoX": ("*attention*", "*mlp*"),
    "GPT-J": ("*attn*", "*mlp*"),
    "GPT-2": ("*attn*", "*mlp*"),
    "OPT": ("*self_attn*", "*fc1"),
    "BERT": ("*attention*", "*.intermediate.*"),
    "DeBERTa-v2": ("*attention*", "*.intermediate.*"),
    "ModernBERT": ("*attn*", "*mlp*"),
    "T5": ("*Attention*", "*DenseReluDense*"),
    "BART": ("*attn*", "*fc1"),
    "Whisper": ("*attn*", "*fc1"),
    "CLIP": ("*self_attn*", "*mlp*"),
    "ViT": ("*attention*", "*mlp*"),
    "Swin": ("*attention*", "*mlp*"),
}


def heads(model: nn.Module, about: Model, name: str) -> None:
    prune_channels(model, about.inputs, scope="layer", include=[PATTERNS[name][0]])


def inner(model: nn.Module, about: Model, name: str) -> None:
    prune_channels(model, about.inputs, scope="layer", include=[PATTERNS[name][1]])


def width(model: nn.Module, about: Model, name: str) -> None:
    images = about.inputs.keys() == {"pixel_values"}
    writers = ["*patch_embeddings*", "*o_proj", "*fc2", "*reduction"] if images else [nn.Embedding]
    there = [p for p in writers if not isinstance(p, str) or any(fnmatch(name, p) for name, _ in model.named_modules())]
    prune_channels(model, about.inputs, pruning_ratio=0.25, scope="layer", include=there)


def blocks(model: nn.Module, about: Model, name: str) -> None:
    prune_depth(model, about.inputs, pruning_ratio=1)


WHAT: dict[str, tuple[Callable[[nn.Module, Model, str], None], ...]] = {
    "heads": (heads,),
    "inner channels": (inner,),
    "residual width": (width,),
    "blocks": (blocks,),
    "all of it": (blocks, width, heads, inner),
}


def shrink(name: str, what: str, folder: Path) -> str:
    """Remove, train a step, write the folder and read it back; return "yes", or where it ends and why."""
    about = MODELS[name]
    model = about.make()
    step = "remove"
    try:
        for remove in WHAT[what]:
            before = size(model)
            remove(model, about, name)
            assert size(model) < before, "nothing was removed"
        step = "train"
        loss_of(model.train(), about.inputs).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
        step = f"{BUT}no folder"
        export_pretrained(model.eval(), folder / "model", example_inputs=about.inputs)
    except Exception as error:  # noqa: BLE001 - the table says what happens, whatever it is
        return f"{step}: {first_sentence(error).replace(about.kind, 'the model').partition(' (')[0]}"
    return "yes"


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return torch.stack([t.square().mean() for t in output_tensors(model(**inputs)) if t.is_floating_point()]).sum()


def main() -> None:
    quiet()
    found: dict[tuple[str, str], str] = {}
    for name in PATTERNS:
        for what in WHAT:
            with tempfile.TemporaryDirectory() as folder:
                found[name, what] = shrink(name, what, Path(folder))
            sys.stdout.write(f"{name} | {what}: {found[name, what]}\n")
            sys.stdout.flush()
    put_on_page(rows_of(found), BEGIN, END)


def rows_of(found: Mapping[tuple[str, str], str]) -> str:
    """Return the table."""
    return table(found, PATTERNS, WHAT)


if __name__ == "__main__":
    main()
