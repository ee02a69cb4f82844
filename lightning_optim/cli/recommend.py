"""``lightning-optim recommend``: ranks strategies for a model and a set of devices, by arithmetic."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lightning_optim.cli.command import Command, command_parser, said_plainly
from lightning_optim.cli.loading import model_and_data
from lightning_optim.strategies import recommend

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Print the presets ranked for a model."""
    parser = _parser()
    given, others = parser.parse_known_args(arguments)
    words = {name: value for name, value in vars(given).items() if value is not None and name != "parameters"}
    if given.parameters is None:
        subject: Any = model_and_data("recommend", others).model
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    else:
        subject = given.parameters
    with said_plainly():
        found = recommend(subject, **words)
    sys.stdout.write(f"{found}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "recommend",
        "Rank the strategy presets for a model and a set of devices by memory, traffic and time. The model is that of "
        "a configuration (--config FILE, or --model CLASS as in `fit`), or just a number of parameters.",
        example="--parameters 8e9 --devices 8 --memory_gb 80 --batch_size 2 --tokens_per_sample 8192",
    )
    parser.add_argument("--parameters", type=_count, help="number of parameters, instead of a model")
    parser.add_argument("--devices", type=int, required=True, help="per node, as in the Trainer")
    parser.add_argument("--batch_size", type=int, required=True, help="samples per device and step")
    parser.add_argument("--nodes", type=int, help="default 1")
    parser.add_argument(
        "--memory_gb", type=float, help="memory of one device in 1e9 bytes; default that of the local GPU"
    )
    parser.add_argument("--device", help="name of a GPU, for its speed; default the local one, else an H100")
    parser.add_argument("--precision", help="precision of the Trainer; default bf16-mixed")
    parser.add_argument("--optimizer", help="adam, sgd, ...; default the one that the model configures")
    parser.add_argument("--tokens_per_sample", type=int, help="rows per sample in a layer: the sequence length")
    parser.add_argument(
        "--step_seconds", type=float, help="measured seconds of a step of one device with batch_size samples"
    )
    parser.add_argument(
        "--activation_bytes", type=float, help="bytes that a forward pass on one device saves for the backward pass"
    )
    parser.add_argument(
        "--noise_scale", type=float, help="measured gradient noise scale in samples: adds advice on the global batch"
    )
    parser.add_argument("--bandwidth", type=float, help="bandwidth between nodes, GB/s one way; default 50")
    parser.add_argument("--node_bandwidth", type=float, help="bandwidth of one device within its node, GB/s one way")
    return parser


def _count(text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"expected a number of parameters such as 8e9, got {text!r}") from error


COMMAND = Command("recommend", "rank the strategy presets for a model and a set of devices, without running them", run)
