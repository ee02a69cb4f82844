"""Checkpoints of a model that is divided among processes: one full file, or a folder to which each writes its part.

Optimizer states are written as ``optimizer.state_dict()`` gives them (by position), with whole tensors in a full
file: what any other strategy writes and reads. So the number of processes and the strategy may change on resume.
"""

import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.files import METADATA, is_sharded_folder
from lightning_optim.optimizers import unwrapped
from lightning_optim.sharding import full, is_dtensor, is_sharded, shard_like

__all__ = ["ShardedFiles", "saves_shards"]

FULL_UNTIL = 1_000_000_000
"""Models of more parameters than this are saved as a folder of shards by default."""

FOLDER_KEY = "lightning_optim_folder"
"""Where a read folder's path travels in the checkpoint until weights and optimizer states are loaded from it."""


def saves_shards(checkpoint: str, module: nn.Module) -> bool:
    """Whether a checkpoint is a folder of shards: "sharded", or "auto" for a large module."""
    if checkpoint != "auto":
        return checkpoint == "sharded"
    return sum(parameter.numel() for parameter in module.parameters()) > FULL_UNTIL


class ShardedFiles:
    """Writes and reads the checkpoints of one strategy.

    Args:
        strategy: An :class:`~lightning_optim.strategies.OptimFSDP2`.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._pending: tuple[Mapping[str, Any], bool] | None = None

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = self._strategy.lightning_module
        return module

    # Writing.

    def model_state(self) -> dict[str, Any]:
        """Return the weights: DTensors for a folder; for a file whole tensors on rank 0, and nothing elsewhere."""
        return self._as_saved(self._module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state in the same way."""
        return self._as_saved(unwrapped(optimizer).state_dict())

    def _as_saved(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._strategy._save_distributed_checkpoint:
            return state
        keeps = self._strategy.is_global_zero

        def gathered(tensor: Tensor) -> Tensor | None:
            whole = full(tensor)  # a collective: all ranks join
            return whole.cpu() if keeps else None

        return apply_to_collection(state, Tensor, gathered) or {}

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        """Write a checkpoint: under a temporary name first, then moved."""
        path = self._strategy.broadcast(filepath)
        if not self._strategy._save_distributed_checkpoint:
            if self._strategy.is_global_zero:
                _remove_folder(path)
                self._strategy.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        if storage_options is not None:
            raise TypeError("a sharded checkpoint is written to a file system; `storage_options` do not apply to it.")
        self._save_folder(checkpoint, Path(path))

    def _save_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        part = path.with_name(f".{path.name}.part")
        if self._strategy.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._strategy.barrier()
        optimizers = checkpoint.get("optimizer_states", [])
        weights = checkpoint["state_dict"]
        rest = {**checkpoint, "state_dict": {n: value for n, value in weights.items() if not isinstance(value, Tensor)}}
        if optimizers:
            rest["optimizer_states"] = [state["param_groups"] for state in optimizers]
        tensors = {
            "state_dict": {name: value for name, value in weights.items() if isinstance(value, Tensor)},
            **{f"optimizer_{place}": _keyed_by_text(state) for place, state in enumerate(optimizers)},
        }
        save(tensors, checkpoint_id=part)
        if self._strategy.is_global_zero:
            torch.save(rest, part / METADATA)
            _move(part, path)
        self._strategy.barrier()

    # Reading.

    def read(self, filepath: Any, weights_only: bool | None) -> dict[str, Any]:
        """Return a checkpoint; of a folder, what is not tensors and where the tensors are."""
        path = self._strategy.broadcast(filepath)
        if is_sharded_folder(path):
            checkpoint: dict[str, Any] = torch.load(
                Path(path) / METADATA, map_location="cpu", weights_only=weights_only is not False
            )
            return {**checkpoint, FOLDER_KEY: str(path)}
        if Path(path).is_file():
            file: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
            return file
        loaded: dict[str, Any] = self._strategy.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        return loaded

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Load the weights; while the module is whole they wait until it is divided."""
        if is_sharded(self._module):
            self._load_model(checkpoint, strict)
        else:
            self._pending = (checkpoint, strict)

    def forget(self) -> None:
        """Drop what waited: the run that read it failed."""
        self._pending = None

    def load_pending(self) -> None:
        """Load what waited."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._load_model(*pending)

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        own = self._module.state_dict()
        if FOLDER_KEY in checkpoint:
            saved = {**checkpoint["state_dict"], **_read_tensors(checkpoint[FOLDER_KEY], "state_dict", own)}
        else:
            saved = checkpoint["state_dict"]
        divided = {
            name: shard_like(value, own[name]) if isinstance(own.get(name), Tensor) and not is_dtensor(value) else value
            for name, value in saved.items()
        }
        self._module.load_state_dict(divided, strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, divided as their parameters are."""
        for place, optimizer in enumerate(self._strategy.optimizers):
            saved = checkpoint["optimizer_states"][place]
            if FOLDER_KEY in checkpoint:
                state = _read_optimizer(checkpoint[FOLDER_KEY], place, saved, optimizer)
            else:
                state = _divided(saved, optimizer)
            optimizer.load_state_dict(state)


def _remove_folder(path: Any) -> None:
    if is_sharded_folder(path):
        shutil.rmtree(path)


def _move(part: Path, path: Path) -> None:
    """Put a folder in the place of another: at no moment is there neither."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        path.rename(old)
    elif path.exists():
        path.unlink()
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _keyed_by_text(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's tensors with keys of text, as a folder wants them; plain numbers become tensors."""
    return {
        str(place): {name: torch.as_tensor(value) for name, value in values.items() if value is not None}
        for place, values in state["state"].items()
    }


def _parameters(optimizer: Optimizer, saved_groups: list[dict[str, Any]]) -> dict[Any, Tensor]:
    """Return the optimizer's parameters by the number they have in a saved state: both are in the same order."""
    saved = chain.from_iterable(group["params"] for group in saved_groups)
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return dict(zip(saved, own, strict=False))


def _divided(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    parameters = _parameters(optimizer, saved["param_groups"])

    def part(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and is_dtensor(parameter) and value.shape == parameter.shape and value.ndim
        return shard_like(value, parameter) if fits else value

    state = {
        number: {name: part(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def _read_optimizer(folder: str, place: int, groups: list[dict[str, Any]], optimizer: Optimizer) -> dict[str, Any]:
    parameters = {str(number): p for number, p in _parameters(optimizer, groups).items()}
    like = {}
    for key, size, dtype in _tensors_in(folder, f"optimizer_{place}."):
        parameter = parameters[key.partition(".")[0]]
        fits = is_dtensor(parameter) and size == parameter.shape and len(size)
        like[key] = torch.empty_like(parameter, dtype=dtype) if fits else torch.empty(size, dtype=dtype)
    loaded = _read_tensors(folder, f"optimizer_{place}", like)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in loaded.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value.detach()
    return {"state": state, "param_groups": groups}


def _tensors_in(folder: str, prefix: str) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), entry.size, entry.properties.dtype  # type: ignore[union-attr]


def _read_tensors(folder: str, prefix: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parts that this process holds of the tensors, those of ``like`` that the folder has."""
    from torch.distributed.checkpoint.state_dict_loader import load

    there = {key for key, _, _ in _tensors_in(folder, f"{prefix}.")}
    wanted = {f"{prefix}.{name}": torch.empty_like(value) for name, value in like.items() if name in there}
    load(wanted, checkpoint_id=folder)
    return {key.removeprefix(f"{prefix}."): value for key, value in wanted.items()}
