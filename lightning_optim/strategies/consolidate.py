"""One ordinary checkpoint file of a folder that every process wrote its part to."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_optim.errors import first_line
from lightning_optim.files import METADATA, written_aside

__all__ = ["consolidate"]

_UNREADABLE = (RuntimeError, EOFError, UnpicklingError, AttributeError, ImportError)


def consolidate(folder: str | Path, file: str | Path, *, progress: bool = True) -> None:
    """Make one checkpoint file of a folder that ``OptimFSDP2(checkpoint="sharded")`` wrote.

    The file is what any strategy writes and reads: it resumes under ``optim_ddp``, one device or
    :class:`~lightning_optim.strategies.OptimFSDP2` and loads into the module's class without a Trainer. No process
    group and no GPU is needed; the whole checkpoint is in memory once. The folder is left as it is.

    Args:
        folder: The folder of shards.
        file: Where the file goes; one that exists is replaced, once the new one is complete.
        progress: Whether to show a progress bar over the bytes that are read.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If ``folder`` is a file.
        IsADirectoryError: If ``file`` is a folder.
        ValueError: If the folder is no such checkpoint, or a part of it is missing.

    Examples:
        >>> consolidate("checkpoints/last.ckpt", "whole.ckpt")  # a folder of shards becomes one file  # doctest: +SKIP
    """
    folder, file = Path(folder), Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder: pass the name of the file to write.")
    checkpoint = _read_rest(folder)
    reader = FileSystemReader(folder)
    index = _read_index(reader, folder)
    _check_complete(folder, index)
    groups = checkpoint.get("optimizer_states", [])
    wanted = _empty(index, folder, len(groups))
    shown = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    shown.disable = not progress
    with shown:
        task = shown.add_task("reading", total=sum(tensor.nbytes for tensor in wanted.values()))
        _read(reader, wanted, lambda read: shown.advance(task, read))
        checkpoint["state_dict"] = {**checkpoint.get("state_dict", {}), **_below(wanted, "state_dict")}
        if groups:
            checkpoint["optimizer_states"] = [_optimizer(wanted, place, saved) for place, saved in enumerate(groups)]
        shown.update(task, description="writing")
        _write(checkpoint, file)


def _read_rest(folder: Path) -> dict[str, Any]:
    """Return what of the checkpoint is no tensor: it travels as a file of its own."""
    if folder.is_file():
        raise NotADirectoryError(f"{str(folder)!r} is a file: a checkpoint in one file needs no consolidation.")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    if not (folder / METADATA).is_file():
        raise _no_such_checkpoint(folder, f"it has no {METADATA!r}")
    try:
        rest: dict[str, Any] = torch.load(folder / METADATA, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise _no_such_checkpoint(
            folder, f"its {METADATA!r} cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    return rest


def _read_index(reader: FileSystemReader, folder: Path) -> Metadata:
    """Return which tensors there are, and where in the folder."""
    try:
        return reader.read_metadata()
    except FileNotFoundError:
        raise _incomplete(folder, "'.metadata', which is written last,") from None
    except _UNREADABLE as error:
        raise _no_such_checkpoint(
            folder, f"its '.metadata' cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error


def _check_complete(folder: Path, index: Metadata) -> None:
    ends: dict[str, int] = {}
    for part in index.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file() or path.stat().st_size < end:
            raise _incomplete(folder, f"{name!r}, one of {len(ends)} parts,")


def _empty(index: Metadata, folder: Path, optimizers: int) -> dict[str, Tensor]:
    """Return a tensor to be filled for each that the folder has."""
    known = ("state_dict", *(f"optimizer_{place}" for place in range(optimizers)))
    wanted = {}
    for key, entry in index.state_dict_metadata.items():
        if key.partition(".")[0] not in known or not isinstance(entry, TensorStorageMetadata):
            raise _no_such_checkpoint(folder, f"{key!r} is nothing that OptimFSDP2 writes")
        wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return wanted


class _Counting(DefaultLoadPlanner):
    """Reports the bytes of every part that was read."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._report(tensor.nbytes)


def _read(reader: FileSystemReader, wanted: dict[str, Any], report: Callable[[int], None]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked
        load(wanted, storage_reader=reader, planner=_Counting(report), no_dist=True)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _optimizer(tensors: Mapping[str, Tensor], place: int, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's state as its ``state_dict()`` is."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _below(tensors, f"optimizer_{place}").items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _write(checkpoint: dict[str, Any], file: Path) -> None:
    with written_aside(file) as part:
        torch.save(checkpoint, part)


def _no_such_checkpoint(folder: Path, why: str) -> ValueError:
    return ValueError(f"{str(folder)!r} is no checkpoint that OptimFSDP2(checkpoint='sharded') wrote: {why}.")


def _incomplete(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"{str(folder)!r} is incomplete: {what} is missing or too short. Each process writes its part: copy those of "
        "all nodes, or take an earlier checkpoint."
    )
