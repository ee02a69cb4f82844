"""What is known to work under which strategy and precision: the one table that tests run and documentation shows.

``python tests/integration/matrix.py`` writes it into docs/support.md and docs/strategies.md; a test compares.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.techniques import TRIED
from lightning_optim.strategies import OptimFSDP2, build
from lightning_optim.techniques import TECHNIQUES

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "docs" / "support.md", ROOT / "docs" / "strategies.md")
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


@dataclass(frozen=True)
class Launch:
    """A strategy as it is tested.

    Attributes:
        preset: Name of the preset.
        processes: How many run.
        strategy: Makes the strategy object; hybrid sharding on one machine has to be told its copies.
        cases: ``technique/precision``.
        quick: Those of the cases that run by default; the others are slow.
    """

    preset: str
    processes: int
    strategy: Callable[[], Any]
    cases: tuple[str, ...]
    quick: tuple[str, ...] = ()


ONE = ("weights", "wanda", "columns", "integers", "histogram", "both", "score", "distilled", "cached", "by_hand", "all")
"""Techniques as ``sharded_worker.py`` names them."""
INTEGERS = ("learned", "dynamic", "groups", "functions")
SOME = ("all", "cached", "by_hand", "channels", "blocks", "low_rank")
EVERY = (*ONE, "channels", "blocks", "low_rank")
BF16 = ("both", "all")


def _cases(full: tuple[str, ...], *precisions: str) -> tuple[str, ...]:
    return (
        *(f"{name}/32-true" for name in full),
        *(f"{name}/{precision}" for precision in precisions for name in BF16),
    )


LAUNCHES = {
    "optim_ddp": Launch(
        "optim_ddp", 2, lambda: build("optim_ddp"), _cases(("both", "auto", *INTEGERS, *SOME), "bf16-mixed")
    ),
    "optim_ddp_static": Launch("optim_ddp_static", 2, lambda: build("optim_ddp_static"), _cases(SOME)),
    "optim_ddp_bf16": Launch("optim_ddp_bf16", 2, lambda: build("optim_ddp_bf16"), _cases(SOME)),
    "optim_zero2": Launch("optim_zero2", 2, lambda: build("optim_zero2"), _cases(("auto", *INTEGERS, *SOME))),
    "optim_fsdp": Launch(
        "optim_fsdp",
        2,
        lambda: build("optim_fsdp"),
        _cases(("auto", *INTEGERS, *EVERY), "bf16-mixed", "bf16-true"),
        quick=("both/32-true", "learned/32-true", "all/bf16-mixed"),
    ),
    "optim_tp": Launch("optim_tp", 2, lambda: build("optim_tp"), _cases(EVERY, "bf16-mixed"), quick=("both/32-true",)),
    "optim_hsdp": Launch("optim_hsdp", 4, lambda: OptimFSDP2(replicate=2), _cases(EVERY, "bf16-mixed")),
    "optim_2d": Launch("optim_2d", 4, lambda: build("optim_2d"), _cases(EVERY, "bf16-mixed")),
}

ROWS = {
    **{technique.callback_class.__name__: TRIED[name].cases for name, technique in TECHNIQUES.items()},
    "DistillationModule": ("distilled", "cached", "by_hand", "all"),
    "PerformanceScore": ("score", "all"),
}
"""Public name -> the techniques of the cases that show it works."""
STRUCTURAL = ("ChannelPruning", "DepthPruning", "LowRankFactorization")
"""What replaces parameters, which cannot be done while they are divided."""
PRECISIONS = {"32-true": "32", "bf16-mixed": "bf16", "bf16-true": "bf16-true"}


def cell(name: str, launch: Launch) -> str:
    """Return the precisions in which a technique is tested under a preset, or what it wants there."""
    shown = {
        precision for case in launch.cases for technique, precision in [case.split("/")] if technique in ROWS[name]
    }
    words = ", ".join(short for precision, short in PRECISIONS.items() if precision in shown)
    divided = not launch.preset.startswith("optim_ddp")
    return f"{words} ¹" if name in STRUCTURAL and divided else words or "-"


def table() -> str:
    """Return the support table in Markdown."""
    columns = list(LAUNCHES.values())
    lines = [
        f"| | {' | '.join(f'`{launch.preset}`' for launch in columns)} |",
        f"| --- | {' | '.join('---' for _ in columns)} |",
        *(f"| {name} | {' | '.join(cell(name, launch) for launch in columns)} |" for name in ROWS),
    ]
    four = " and ".join(f"`{launch.preset}`" for launch in columns if launch.processes > 2)
    notes = (
        "Cells name the precisions that tests run (32 is `32-true`, bf16 `bf16-mixed`), each straight and resumed; "
        f"{four} on four processes. Most cells are in the slow suite. ¹ Goes on from a file whose window is over; what "
        "would replace parameters of a divided model is refused."
    )
    return "\n".join([*lines, "", notes])


def with_table(text: str) -> str:
    """Return a page with the table of now between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    for file in FILES:
        file.write_text(with_table(file.read_text()))
