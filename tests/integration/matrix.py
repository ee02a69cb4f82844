"""What is known to work under which strategy and precision: the one table that tests run and documentation shows.

``python tests/integration/matrix.py`` writes it into README.md and docs/strategies.md; a test compares.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_optim.strategies import OptimFSDP2, build

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "README.md", ROOT / "docs" / "strategies.md")
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


@dataclass(frozen=True)
class Launch:
    """A strategy as it is tested.

    Attributes:
        preset: Name of the preset.
        processes: How many run.
        strategy: Makes the strategy object; hybrid sharding on one machine has to be told its copies.
        cases: ``technique/precision``.
    """

    preset: str
    processes: int
    strategy: Callable[[], Any]
    cases: tuple[str, ...]


ONE = ("weights", "wanda", "columns", "integers", "histogram", "both", "score", "distilled", "all")
"""Techniques as ``sharded_worker.py`` names them."""
EVERY = (*ONE, "channels")
BF16 = ("both", "all")


def _cases(full: tuple[str, ...], *precisions: str) -> tuple[str, ...]:
    return (
        *(f"{name}/32-true" for name in full),
        *(f"{name}/{precision}" for precision in precisions for name in BF16),
    )


LAUNCHES = {
    "optim_ddp": Launch("optim_ddp", 2, lambda: build("optim_ddp"), _cases(("both", "all"), "bf16-mixed")),
    "optim_ddp_static": Launch("optim_ddp_static", 2, lambda: build("optim_ddp_static"), _cases(("all",))),
    "optim_ddp_bf16": Launch("optim_ddp_bf16", 2, lambda: build("optim_ddp_bf16"), _cases(("all",))),
    "optim_zero2": Launch("optim_zero2", 2, lambda: build("optim_zero2"), _cases(("all", "channels"))),
    "optim_fsdp": Launch("optim_fsdp", 2, lambda: build("optim_fsdp"), _cases(EVERY, "bf16-mixed", "bf16-true")),
    "optim_tp": Launch("optim_tp", 2, lambda: build("optim_tp"), _cases(EVERY, "bf16-mixed")),
    "optim_hsdp": Launch("optim_hsdp", 4, lambda: OptimFSDP2(replicate=2), _cases(EVERY, "bf16-mixed")),
    "optim_2d": Launch("optim_2d", 4, lambda: build("optim_2d"), _cases(EVERY, "bf16-mixed")),
}
