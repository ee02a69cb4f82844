"""The teacher: a handle that no part of Lightning or torch sees, and a checksum that identifies it."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.calls import describe_inputs
from lightning_optim.functional.losses import ensemble_logits
from lightning_optim.sharding import full, own_class
from lightning_optim.target import ForwardInputs, map_inputs

__all__ = ["Teacher", "shared_parameters"]


class Teacher:
    """One or several frozen networks outside the module tree.

    As an attribute of a module, it is in no ``parameters()``, ``state_dict()``, optimizer, DDP bucket or
    ``.train()``/``.to()`` of its owner. A deep copy of the owner shares it, a pickle of the owner leaves it out. It is
    always in eval mode, computes without gradients in its own precision, and moves to its inputs' device when called.

    Args:
        networks: They are called in eval mode; :meth:`freeze` leaves them in it.
        weights: > 0, one per network; default equal.
        autocast: Compute under autocast of this dtype instead of the networks' own precision.

    Raises:
        TypeError: If a network is not a module.
        ValueError: If there is none, or the weights do not fit.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        for network in networks:
            if not isinstance(network, nn.Module):
                raise TypeError(f"`teacher` must be a module, or several with weights, got {network!r}.")
        self.networks = list(networks)
        self.weights = [1.0] * len(self.networks) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.networks) or not self.networks or not all(w > 0 for w in self.weights):
            raise ValueError(
                f"`teacher` must be one or several modules with a weight > 0 each, got {len(self.networks)} modules "
                f"and weights {self.weights}."
            )
        self.autocast = autocast

    @classmethod
    def of(cls, teacher: Any, autocast: torch.dtype | None = None) -> "Teacher | None":
        """Read the argument ``teacher``: None, a module, a list of modules, or a list of ``(module, weight)``."""
        if teacher is None or isinstance(teacher, Teacher):
            return teacher
        if isinstance(teacher, nn.Module) or not isinstance(teacher, (list, tuple)):
            return cls([teacher], autocast=autocast)
        pairs = [entry if isinstance(entry, (list, tuple)) else (entry, 1.0) for entry in teacher]
        return cls([network for network, _ in pairs], [weight for _, weight in pairs], autocast)

    def freeze(self) -> None:
        """Put the networks into eval mode and turn off the gradients of their parameters, in place."""
        for network in self.networks:
            network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _absent, ()

    def __call__(self, inputs: ForwardInputs) -> list[Any]:
        """Return the output of each network."""
        return [self.answer(network, inputs) for network in self.networks]

    def logits(
        self, inputs: ForwardInputs, get_logits: Callable[[Any], Tensor], *, dim: int = -1, binary: bool = False
    ) -> Tensor:
        """Return the combined logits, float32: those of one teacher, or the log of the mean probability."""
        return self.combine([get_logits(answer) for answer in self(inputs)], dim=dim, binary=binary)

    def combine(self, logits: list[Tensor], *, dim: int = -1, binary: bool = False) -> Tensor:
        """Combine the teachers' logits by their weights.

        Args:
            logits: Those of each teacher, all of one shape.
            dim: The dimension that holds the classes.
            binary: Whether each logit is an answer of its own: one logit per row, or several labels.
        """
        return ensemble_logits(logits, self.weights, dim=dim, binary=binary)

    def answer(self, network: nn.Module, inputs: ForwardInputs) -> Any:
        """Return the output of one of the networks."""
        if any(module.training for module in network.modules()):
            network.eval()
        device, dtype = _first_device(inputs), _dtype_of(network)
        if device is not None and any(tensor.device != device for tensor in _tensors(network)):
            network.to(device)
        moved = map_inputs(_moving(device, dtype), inputs)
        try:
            with torch.no_grad(), self.precision(device):
                return moved.call(network)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"the teacher {own_class(network).__name__} fails with the arguments of the student's forward (or of "
                f"its layer `logits_from`): {describe_inputs(moved)} ({type(error).__name__}: {error}). Override "
                "`teacher_inputs(batch)` to pass other arguments."
            ) from error

    def precision(self, device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the networks compute: the autocast that was asked for, or none."""
        kind = "cpu" if device is None else device.type
        if not torch.amp.is_autocast_available(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)

    def checksum(self) -> str:
        """Return a digest of all parameters, buffers and ensemble weights, which only equal teachers share.

        Of a divided teacher this is a collective: every rank must ask.
        """
        digest = hashlib.blake2b(repr(self.weights).encode(), digest_size=16)
        for network in self.networks:
            for name, tensor in network.state_dict().items():
                if isinstance(tensor, Tensor):
                    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                    digest.update(_bytes(full(tensor)))
        return digest.hexdigest()


def shared_parameters(student: nn.Module, teacher: Teacher) -> list[str]:
    """Return the names of the student's parameters that a teacher has too."""
    held = {id(tensor) for network in teacher.networks for tensor in network.parameters()}
    return [name for name, tensor in student.named_parameters() if id(tensor) in held]


def _absent() -> None:
    return None


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _dtype_of(network: nn.Module) -> torch.dtype | None:
    return next((tensor.dtype for tensor in _tensors(network) if tensor.is_floating_point()), None)


def _first_device(inputs: ForwardInputs) -> torch.device | None:
    devices: list[torch.device] = []
    map_inputs(lambda tensor: devices.append(tensor.device) or tensor, inputs)  # type: ignore[func-returns-value]
    return devices[0] if devices else None


def _moving(device: torch.device | None, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if dtype and tensor.is_floating_point() else None)

    return move


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
