"""``python -m lightning_optim.strategies.consolidate FOLDER FILE``."""

import argparse
import sys
from collections.abc import Sequence

from lightning_optim.strategies.consolidate import consolidate

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, or 1 with one line on stderr for a folder or file that cannot be taken; argparse exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_optim.strategies.consolidate",
        description="Make one checkpoint file of a folder that OptimFSDP2(checkpoint='sharded') wrote.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of shards; it is left as it is")
    parser.add_argument("file", metavar="FILE", help="the file to write; one that exists is replaced")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    given = parser.parse_args(arguments)
    try:
        consolidate(given.folder, given.file, progress=not given.no_progress)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
