"""What counts the blocks of a stack: attributes of the modules around it, and of their configurations."""

import re
from typing import Any

from torch import nn

from lightning_optim.structure import children_of, is_config

__all__ = ["counts_of", "numbers_of"]

_COUNTS = {
    "depth",
    "n_blocks",
    "n_layer",
    "n_layers",
    "num_blocks",
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "n_encoder_layers",
    "n_decoder_layers",
}
"""Names of attributes that count blocks, where they are as many."""
_BY_STAGE = "depths"
"""Name of an attribute that holds the number of blocks of each stage."""
_PER_BLOCK = re.compile("layer|block")
"""In the names of lists that have an item per block."""


def numbers_of(root: nn.Module, stack: str, kept: list[int]) -> dict[str, dict[str, int]]:
    """Return the attributes that number the blocks, with their new values.

    Such an attribute is a whole number in a block, or in a module inside of it, that counts up by one from block to
    block (``layer_idx``).

    Args:
        root: The model.
        stack: Name of the stack.
        kept: Places of the blocks that stay.

    Returns:
        Present name of a module in a block that stays -> its attributes and their values.
    """
    blocks = children_of(root.get_submodule(stack))
    found: dict[tuple[str, str], dict[int, int]] = {}
    for place, block in enumerate(blocks.values()):
        for inside, module in block.named_modules():
            if type(module).__module__.startswith("torch."):
                continue
            for name, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((inside, name), {})[place] = value
    keys = list(blocks)
    numbers: dict[str, dict[str, int]] = {}
    for (inside, name), values in found.items():
        offsets = {value - place for place, value in values.items()}
        if len(values) < 2 or len(offsets) > 1:
            continue
        for new, place in enumerate(kept):
            if place in values and values[place] != new + min(offsets):
                module = f"{stack}.{keys[place]}.{inside}".rstrip(".")
                numbers.setdefault(module, {})[name] = new + min(offsets)
    return numbers


def counts_of(root: nn.Module, stack: str, kept: list[int]) -> dict[str, dict[str, Any]]:
    """Return the attributes that count the blocks or hold an item for each, with their new values.

    Args:
        root: The model.
        stack: Name of the stack.
        kept: Places of the blocks that stay.

    Returns:
        Name of a module around the stack -> its attributes and their values. Attributes of its configuration are
        written ``config.num_layers``.
    """
    blocks = len(children_of(root.get_submodule(stack)))
    parts = stack.split(".")
    counts: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for depth in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:depth])
        module = root.get_submodule(name)
        own = _of_module(module, blocks, len(kept)) if depth == len(parts) - 1 else {}
        for holder, config in vars(module).items():
            if is_config(config) and id(config) not in seen:
                seen.add(id(config))
                changes = _of_config(config, stack, blocks, kept)
                own |= {f"{holder}.{attribute}": value for attribute, value in changes.items()}
        if own:
            counts[name] = own
    return counts


def _of_module(module: nn.Module, blocks: int, left: int) -> dict[str, Any]:
    return {name: left for name, value in vars(module).items() if name in _COUNTS and _is_count(value, blocks)}


def _of_config(config: Any, stack: str, blocks: int, kept: list[int]) -> dict[str, Any]:
    stages = getattr(config, _BY_STAGE, None)
    if isinstance(stages, (list, tuple)):
        return _of_stage(stages, stack, blocks, len(kept))
    counts: dict[str, Any] = {}
    both = bool(getattr(config, "is_encoder_decoder", False))
    for name, value in vars(config).items():
        if name in _COUNTS and _is_count(value, blocks) and _speaks_of(name, stack, both=both):
            counts[name] = len(kept)
        elif _PER_BLOCK.search(name) and _is_per_block(value, blocks) and _speaks_of(name, stack, both=both):
            counts[name] = type(value)(value[place] for place in kept)
    return counts


def _of_stage(stages: Any, stack: str, blocks: int, left: int) -> dict[str, Any]:
    """The last number in the name of the stack is that of its stage."""
    numbers = [int(part) for part in stack.split(".") if part.isdecimal()]
    if not numbers or numbers[-1] >= len(stages) or not _is_count(stages[numbers[-1]], blocks):
        return {}
    changed = [left if stage == numbers[-1] else count for stage, count in enumerate(stages)]
    return {_BY_STAGE: type(stages)(changed)}


def _speaks_of(name: str, stack: str, *, both: bool) -> bool:
    """Whether an attribute's name is about a stack: a plain one is the encoder's, where there is a decoder too."""
    in_decoder = "decoder" in stack.rpartition(".")[0].split(".")
    if "decoder" in name:
        return in_decoder or not both
    if "encoder" in name or both:
        return not in_decoder
    return True


def _is_count(value: Any, blocks: int) -> bool:
    return type(value) is int and value == blocks


def _is_per_block(value: Any, blocks: int) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != blocks:
        return False
    indices = all(type(item) is int for item in value) and list(value) == sorted(set(value))  # they select blocks
    return not indices
