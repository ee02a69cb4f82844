"""Numbers of a model's own configuration that follow its shapes, as in Hugging Face's ``transformers``.

Such a model is made from ``model.config``, and ``save_pretrained`` writes that. Once channels, heads or blocks are
removed, numbers such as ``intermediate_size`` or ``num_hidden_layers`` must follow, or nobody can make the model again.

What a number counts is not read from its name. The class is built on the meta device (shapes without memory) from a
copy of the configuration in which one number differs: the parameters and attributes that change are what it counts.
:func:`solve` searches the numbers with which the class makes exactly the parameters of the live model; building it is
the proof. ``transformers`` is not imported: a model is recognized by what it has.
"""

from lightning_optim.configs.following import apply, changes, follow
from lightning_optim.configs.models import (
    build,
    config_failures,
    config_models,
    config_with,
    is_config_model,
    kinds_of_blocks,
    plain_name,
    value_at,
)
from lightning_optim.configs.search import Count
from lightning_optim.configs.solution import Solution, counts, solve

__all__ = [
    "Count",
    "Solution",
    "apply",
    "build",
    "changes",
    "config_failures",
    "config_models",
    "config_with",
    "counts",
    "follow",
    "is_config_model",
    "kinds_of_blocks",
    "plain_name",
    "solve",
    "value_at",
]
