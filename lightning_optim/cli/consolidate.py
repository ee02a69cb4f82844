"""``lightning-optim consolidate``: one checkpoint file of a sharded one."""

from collections.abc import Sequence

from lightning_optim.cli.command import Command, command_parser, said_plainly
from lightning_optim.strategies.consolidate import consolidate

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "consolidate",
        "Make one checkpoint file of a folder that OptimFSDP2(checkpoint='sharded') wrote. Needs no GPU, and memory "
        "for the whole checkpoint.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of shards; it is left as it is")
    parser.add_argument("file", metavar="FILE", help="the file to write; one that exists is replaced")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    given = parser.parse_args(arguments)
    with said_plainly():
        consolidate(given.folder, given.file, progress=not given.no_progress)
    return 0


COMMAND = Command("consolidate", "make one checkpoint file of a folder that sharded training wrote", run)
