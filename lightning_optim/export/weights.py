"""The weights of a model as they are deployed, and a safetensors file of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_optim.configs import plain_name
from lightning_optim.export.integer import rounds
from lightning_optim.files import written_aside
from lightning_optim.modules import copy_module, without_compiler
from lightning_optim.provenance import provenance
from lightning_optim.quantization.layers import STATE, QuantizedLayer
from lightning_optim.quantization.learned import FIRST, STEPS
from lightning_optim.sharding import is_sharded
from lightning_optim.tables import Listed, Listing

__all__ = ["SafetensorsReport", "deployed_copy", "deployed_state", "export_safetensors"]


def deployed_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU that computes with the weights of a float file: rounded, with float activations."""
    copy = copy_module(model).cpu().requires_grad_(False)
    for layer in copy.modules():
        if isinstance(layer, QuantizedLayer):
            layer.activation_bits = None
            layer.output_phase = "off"
    return copy


def deployed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model as a float file holds them: weights rounded, and no buffers of a technique.

    Args:
        model: A model whose forward reads masked weights as they are stored, such as :func:`deployed_copy` returns.

    Returns:
        By name without what compilers add. Names of one tensor hold the same object.
    """
    state: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for name, layer in without_compiler(model).named_modules(remove_duplicate=False):
        persistent = {
            key: value for key, value in layer._buffers.items() if key not in layer._non_persistent_buffers_set
        }
        rounded = _rounded(layer)
        for key, tensor in {**layer._parameters, **persistent}.items():
            if tensor is None or (isinstance(layer, QuantizedLayer) and _is_range(layer, key)):
                continue
            if id(tensor) not in shared:
                shared[id(tensor)] = rounded.get(key, tensor).detach().contiguous()
            state[plain_name(f"{name}.{key}".lstrip("."))] = shared[id(tensor)]
    return state


def _rounded(layer: nn.Module) -> Mapping[str, Tensor]:
    """Return the parameters of a layer that its forward rounds, rounded."""
    return layer.rounded_parameters() if isinstance(layer, QuantizedLayer) and rounds(layer) else {}


def _is_range(layer: QuantizedLayer, key: str) -> bool:
    ranges = {f"{which}_{name}" for which in (*layer.operands, "output") for name in STATE}
    return key in {*ranges, *STEPS, FIRST}


@dataclass(frozen=True)
class SafetensorsReport(Listed):
    """What :func:`export_safetensors` wrote.

    Attributes:
        path: The file.
        tensors: Number of tensors in it.
        parameters: Number of their entries.
        bytes: Size of the file.
        tied: Name that is not in the file -> the name whose tensor it shares.
    """

    path: Path
    tensors: int
    parameters: int
    bytes: int
    tied: Mapping[str, str]

    def listing(self) -> Listing:
        """Return sentences on the file and its tied tensors."""
        size = f"{self.parameters:,} entries, {self.bytes / 1e6:,.2f} MB"
        tied = [f"{name} is {kept}, stored once" for name, kept in self.tied.items()]
        return Listing((), (), before=[f"{self.path}: {self.tensors} tensors, {size}; read back and equal.", *tied])


def export_safetensors(
    module: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> SafetensorsReport:
    """Write a module's weights as a safetensors file: pruned shapes, masked weights as zeros, quantized ones rounded.

    What only trains (ranges, a teacher, optimizer states) is left out. A tensor that several names share is stored
    once; ``safetensors.torch.load_model`` finds it under all of them. The file is written aside, read back, compared
    and then moved. Its metadata says of which class it is and by which versions (key ``"lightning_optim"``, as JSON).

    Args:
        module: The module; it is not changed. Of a DistillationModule pass the student.
        path: The file to write; one that exists is replaced.
        metadata: More entries of the file's metadata, strings, or others in place of those.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If an entry of the metadata is not a string.
        ValueError: If the module is divided among processes.
        RuntimeError: If what is read back differs; nothing is written then.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_safetensors(nn.Linear(8, 2), Path(folder, "model.safetensors"))
    """
    try:
        from safetensors.torch import load_file, save_file
    except ModuleNotFoundError as error:
        raise ImportError(
            'safetensors is not installed. Install it with: pip install "lightning-optim[safetensors]"'
        ) from error
    wrong = {key: value for key, value in (metadata or {}).items() if not isinstance(value, str)}
    if wrong:
        raise TypeError(f"`metadata` of a safetensors file holds strings only, got {wrong}.")
    if is_sharded(module):
        raise ValueError(
            f"{type(module).__name__} is divided among processes. Save a checkpoint, load it with "
            "lightning_optim.load_from_checkpoint on one device, and export that."
        )
    kept: dict[int, str] = {}
    stored, tied = dict[str, Tensor](), dict[str, str]()
    for name, tensor in deployed_state(deployed_copy(module)).items():
        if id(tensor) in kept:
            tied[name] = kept[id(tensor)]
        else:
            kept[id(tensor)], stored[name] = name, tensor
    if not stored:
        raise ValueError(f"{type(module).__name__} has no weights to write.")
    path = Path(path)
    about = {"format": "pt", "lightning_optim": json.dumps(provenance(module, None)), **tied, **(metadata or {})}
    with written_aside(path) as temporary:
        save_file({name: _apart(tensor) for name, tensor in stored.items()}, temporary, about)
        loaded = load_file(temporary)
        wrong_names = [name for name, tensor in stored.items() if not _same(loaded[name], tensor)]
        if wrong_names or loaded.keys() != stored.keys():
            raise RuntimeError(f"the file {str(path)!r} does not hold what was written: {', '.join(wrong_names[:3])}.")
        size = temporary.stat().st_size
    return SafetensorsReport(path, len(stored), sum(tensor.numel() for tensor in stored.values()), size, tied)


def _apart(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own: a part of a larger one would be refused, or written whole."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _same(loaded: Tensor, written: Tensor) -> bool:
    """Whether tensors are equal bit for bit, NaN included."""
    if loaded.dtype != written.dtype or loaded.shape != written.shape:
        return False
    return torch.equal(loaded.reshape(-1).view(torch.uint8), written.reshape(-1).view(torch.uint8))
