"""Checks shared by the strategies, and the handling of failed processes."""

import atexit
import re
import socket
import subprocess
import time
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim import _upstream

__all__ = [
    "INSTEAD",
    "check_batchnorm_sync",
    "check_supported",
    "checked_timeout",
    "end_children",
    "end_group_at_exit",
    "name_rank",
]


SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "OptimFSDP2")
"""Names of the strategy classes that compression supports, including their subclasses."""
REFUSED = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy")
"""Subclasses of those that it does not support."""
INSTEAD = "Use Trainer(strategy='optim_fsdp'), 'optim_ddp', or a single device."


def check_supported(who: str, strategy: Any, instead: str = INSTEAD) -> None:
    """Reject a strategy that compression does not support.

    Args:
        who: The technique's name.
        strategy: The Trainer's.
        instead: What to do, a sentence.

    Raises:
        MisconfigurationException: If the strategy is not supported.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}  # the same in lightning and pytorch_lightning
    if names.isdisjoint(SUPPORTED) or not names.isdisjoint(REFUSED):
        raise MisconfigurationException(f"{who} is not supported under {type(strategy).__name__}. {instead}")


LONGEST_S = 1e9


def checked_timeout(timeout_s: float) -> timedelta:
    """Return the timeout of the collectives.

    Raises:
        ValueError: If it is not positive.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= LONGEST_S:
        raise ValueError(f"`timeout_s` must be a positive number of seconds (1e9 at most), got {timeout_s!r}.")
    return timedelta(seconds=timeout_s)


def check_batchnorm_sync(strategy: Any) -> None:
    """Reject ``Trainer(sync_batchnorm=True)`` on a CPU, where PyTorch's SyncBatchNorm does not run.

    Raises:
        MisconfigurationException: If it is requested there.
    """
    if strategy._layer_sync is not None and strategy.root_device.type != "cuda":
        raise MisconfigurationException(
            "Trainer(sync_batchnorm=True) needs CUDA devices: PyTorch's SyncBatchNorm does not run on "
            f"{strategy.root_device.type}. Remove it, or use a norm without batch statistics."
        )


def end_group_at_exit() -> None:
    """Destroy the process group before the interpreter exits, once.

    Lightning 2.6 does so for NCCL only. A thread of gloo that frees a tensor while Python ends aborts the process
    ("terminate called without an active exception": one exit in five, torch 2.13 on Python 3.11), and the exit code
    then says that the run failed.
    """
    _upstream.require("destroy_dist_connection", "SubprocessScriptLauncher")  # they are used while a run fails
    atexit.unregister(_end_group)
    atexit.register(_end_group)


def _end_group() -> None:
    _upstream.destroy_dist_connection()
    time.sleep(0.05)  # without the interpreter's lock, for which that thread may be waiting


def name_rank(strategy: Any, exception: BaseException) -> None:
    """Add a note to an exception: the rank that raised it, and where to look if another rank is the cause."""
    if strategy.world_size == 1 or any("raised on rank" in note for note in getattr(exception, "__notes__", ())):
        return
    note = f"raised on rank {strategy.global_rank} of {strategy.world_size} ({socket.gethostname()})"
    if _LOST.search(str(exception)):
        note += ": another rank ended or is late. Look for its error, above this one or in its own output"
    exception.add_note(f"{note}.")


def end_children(strategy: Any, exception: BaseException, grace_s: float = 10.0) -> None:
    """End the processes that rank 0 started, after it failed: nothing else would end one that hangs.

    They get time to report their own errors first. Under torchrun and SLURM, rank 0 starts none and the agent ends
    them. After a KeyboardInterrupt, and if processes are forked, Lightning ends them.
    """
    launcher = strategy.launcher
    if isinstance(exception, KeyboardInterrupt) or not isinstance(launcher, _upstream.SubprocessScriptLauncher):
        return
    until = time.monotonic() + grace_s
    for process in launcher.procs:
        try:
            process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()


_LOST = re.compile(
    "closed by peer|reset by peer|timed out|timeout|broken pipe|Connection closed|refused", re.IGNORECASE
)
