"""``lightning-optim recipes``: lists the recipes of the package, and prints one."""

import sys
from collections.abc import Sequence

from rich.table import Table

from lightning_optim.cli.command import Command, command_parser, console, said_plainly
from lightning_optim.recipe import Recipe, recipe_names

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """List the recipes, or print one as YAML."""
    parser = command_parser(
        "recipes", "List the recipes of the package, or print one as YAML to edit.", example="cpu-latency"
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name or a file to check and print")
    given = parser.parse_args(arguments)
    if given.recipe is not None:
        with said_plainly():
            recipe = Recipe.load(given.recipe)
        sys.stdout.write(recipe.to_yaml())
        return 0
    table = Table("recipe", "what it is for")
    for name, description in recipe_names().items():
        table.add_row(name, description)
    console().print(table)
    return 0


COMMAND = Command("recipes", "list the recipes of the package, or print one", run)
