"""Numbers that a model keeps of its own shape: how many heads an attention has, how wide they are.

A number is recognized by its value and by what its name says that it counts; whether it follows rightly when heads
leave is for the check to tell.
"""

import re
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

from torch import nn

__all__ = ["Number", "holders", "is_heads", "is_queries_per_head", "is_shared", "is_width_of_head", "numbers_of"]

Number = tuple[str, str, int]
"""Layer, attribute (``config.`` before those of its config), value."""

_HEADS = re.compile(r"h|nh|(n|num)?_?(\w+_)?heads?(_\w+)?")
_SHARED = re.compile(r".*(kv|key_value|query_groups?).*")
_WIDTH = re.compile(
    r"(?!all_).*(heads?_?(dim|size|width|channels)|(dim|d|size)_(per_)?heads?|d_kv|key_value_proj_dim).*"
)
_PER_HEAD = re.compile(r".*(key_value_groups?|kv_groups?|queries_per_\w+)|n_rep")
_PLACE = re.compile(r".*(idx|index|layer_id|block_id).*")


def is_heads(name: str) -> bool:
    """Tell whether a number of this name counts heads."""
    return _HEADS.fullmatch(name) is not None and not is_width_of_head(name)


def is_shared(name: str) -> bool:
    """Tell whether a number of this name is about keys and values that several queries share."""
    return _SHARED.fullmatch(name) is not None


def is_width_of_head(name: str) -> bool:
    """Tell whether a number of this name is the width of one head."""
    return _WIDTH.fullmatch(name) is not None


def is_queries_per_head(name: str) -> bool:
    """Tell whether a number of this name counts the queries that share one key."""
    return _PER_HEAD.fullmatch(name) is not None


def holders(names: Iterable[str]) -> list[str]:
    """Return the modules that hold some layers: from each layer's parent up to the one that holds them all."""
    paths = [name.split(".")[:-1] for name in names]
    common = reduce(lambda left, right: left[: _equal(left, right)], paths)
    found = {".".join(path[:length]) for path in paths for length in range(len(common), len(path) + 1)}
    return sorted(found)


def _equal(left: list[str], right: list[str]) -> int:
    different = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(different, min(len(left), len(right)))


def numbers_of(module: nn.Module, names: Iterable[str], *, configs: bool = False) -> Iterator[Number]:
    """Yield the numbers that some modules keep as attributes, or in their config.

    Args:
        module: The model.
        names: Names of its modules.
        configs: Whether those of their config are meant.
    """
    for name in names:
        owner: Any = vars(module.get_submodule(name))
        if configs:
            config = owner.get("config")
            owner = config.to_dict() if hasattr(config, "to_dict") else {}
        for key, value in owner.items():
            if type(value) is int and not key.startswith("_") and _PLACE.fullmatch(key) is None:
                yield name, f"config.{key}" if configs else key, value
