"""``lightning-optim consolidate``: merges a sharded checkpoint into one file."""

from collections.abc import Sequence

from lightning_optim.cli.command import Command, command_parser, said_plainly
from lightning_optim.strategies.consolidate import consolidate

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "consolidate",
        "Merge a folder that OptimFSDP2(checkpoint='sharded') wrote into one checkpoint file. Needs no GPU, but memory "
        "for the whole checkpoint.",
        example="checkpoints/last.ckpt last-whole.ckpt",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of shards; it stays unchanged")
    parser.add_argument("file", metavar="FILE", help="the file to write; an existing file is replaced")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    given = parser.parse_args(arguments)
    with said_plainly():
        consolidate(given.folder, given.file, progress=not given.no_progress)
    return 0


COMMAND = Command("consolidate", "merge the folder of a sharded checkpoint into one file", run)
