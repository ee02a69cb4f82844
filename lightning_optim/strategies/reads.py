"""Weights of a unit that something else reads: an item table that scores, a head that embeds.

A unit's weights are whole only while its own forward runs. Elsewhere ``self.items.weight`` is a DTensor, of which the
process holds a part, and computing with it beside ordinary tensors fails. While a step runs, such a read returns the
whole weight instead: it is gathered once per forward pass, and its gradient joins that of the unit after the backward
pass. Reads are seen as they happen, so nothing has to be declared.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.sharding import full, is_dtensor, local, own_class

__all__ = ["Reads", "mixed_said_plainly"]

_KEY, _READS = "_read_elsewhere", "_reads_of_units"


class Reads:
    """The reads of one divided module."""

    def __init__(self) -> None:
        self._units: list[_Unit] = []
        self._watching = 0

    @staticmethod
    def of(module: nn.Module) -> "Reads":
        """Return those of a root, which outlive the strategy that divided it."""
        reads: Reads = module.__dict__.setdefault(_READS, Reads())
        return reads

    def watch(self, name: str, unit: nn.Module, dtype: torch.dtype | None) -> None:
        """Return whole weights from a unit that holds some itself, when they are read during a step.

        Args:
            name: Its dotted name.
            unit: A module that ``fully_shard`` has just divided.
            dtype: The type in which its parameters are gathered; None keeps theirs.
        """
        if unit._parameters and _KEY not in unit.__dict__:
            unit.__dict__[_KEY] = record = _Unit(name, unit, dtype, self)
            unit.__class__ = _readable_class(type(unit))  # type: ignore[arg-type]  # of typeshed's Hashable
            self._units.append(record)

    @property
    def watching(self) -> bool:
        """Whether a step or its backward pass is running."""
        return self._watching > 0

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Return whole weights in the block."""
        self._watching += 1
        try:
            yield
        finally:
            self._watching -= 1

    def in_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step method during which reads return whole weights."""

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            for unit in self._units:
                unit.begin()
            with self.running():
                return step(*args, **kwargs)

        return watched

    def finish_backward(self) -> None:
        """Add the gradients of what was read to those of the parameters. All processes must ask."""
        for unit in self._units:
            unit.reduce()


class _Unit:
    """A module whose weights may be read outside of its forward."""

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype | None, reads: Reads) -> None:
        self.name, self.module, self.dtype, self.reads = name, module, dtype, reads
        self.calls = 0
        """How deep inside its own forward the module is."""
        self._divided: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._leaves: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Forget the last step. Parameters are noted while they are divided, as they are between steps."""
        self._copies, self._leaves = {}, []
        self._divided |= {name: p for name, p in self.module._parameters.items() if is_dtensor(p)}

    def read(self, name: str, value: Any) -> Any:
        """Return what a read gives: inside the module's own forward, or between steps, the attribute itself."""
        if self.calls or not self.reads.watching or name not in self._divided:
            return value
        divided = self._divided[name]
        if not torch.is_grad_enabled():
            return self._gather(divided)
        if name not in self._copies:
            self._copies[name] = copy = self._gather(divided).requires_grad_(divided.requires_grad)
            self._leaves.append((divided, copy))
        return self._copies[name]

    def _gather(self, divided: Tensor) -> Tensor:
        part = divided.detach()
        return full(part if self.dtype is None else part.to(self.dtype)).clone()

    @torch.no_grad()
    def reduce(self) -> None:
        """Average the gradients of the copies over the processes, each keeping its part; later reads gather anew."""
        from torch.distributed.tensor import DTensor, Partial

        for divided, copy in self._leaves:
            if copy.grad is None or not is_dtensor(divided):
                continue
            mesh = divided.device_mesh
            gradient, copy.grad = copy.grad.to(divided.dtype), None
            summed = DTensor.from_local(gradient, mesh, [Partial()] * mesh.ndim, run_check=False)
            mean = summed.redistribute(mesh, divided.placements) / mesh.size()
            if divided.grad is None:
                divided.grad = mean
            else:
                local(divided.grad).add_(local(mean))
        self._copies = {}


@cache
def _readable_class(divided: type[nn.Module]) -> type[nn.Module]:
    """Return a class like the one that ``fully_shard`` made, whose parameters are read through :class:`_Unit`."""
    bases = tuple(_readable() if base.__name__ == "FSDPModule" else base for base in divided.__bases__)
    return type(divided.__name__, bases, {"__deepcopy__": divided.__dict__.get("__deepcopy__")})


@cache
def _readable() -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    class Readable(FSDPModule):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """As FSDPModule: a part of a container is of the container's own class."""
            own = next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))
            made = own.__new__(own, *args, **kwargs)
            made.__init__(*args, **kwargs)  # type: ignore[misc]
            return made

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)  # type: ignore[misc]
            record = self.__dict__.get(_KEY)
            return value if record is None else record.read(name, value)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            record = self.__dict__[_KEY]
            record.calls += 1
            try:
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            finally:
                record.calls -= 1

    return Readable  # type: ignore[return-value]


MIXED = "mixed torch.Tensor and DTensor"
"""How torch (2.13) words an operation on a whole tensor and one of which the process holds a part."""


@contextmanager
def mixed_said_plainly(strategy: Any, step: str) -> Generator[None, None, None]:
    """Name the cause where whole and divided tensors meet, instead of torch's "got mixed torch.Tensor and DTensor".

    Args:
        strategy: The strategy that divided the module.
        step: Name of the step method that runs in the block.

    Raises:
        RuntimeError: With what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if MIXED not in str(error):
            raise
        name, module = type(strategy).__name__, strategy.lightning_module
        parts = [] if module is None else [part for path, part in module.named_modules() if path]
        units = sorted({own_class(part).__name__ for part in parts if own_class(part) is not type(part)})
        raise RuntimeError(
            f"{name}: `{step}` computes with a parameter of a unit outside of the unit's own forward, where this "
            f"process holds a part of it. Units are {', '.join(units) or 'none'}. Name units that leave this parameter "
            f"to the root, {name}(units=[...]), or compute with it in its unit's forward."
        ) from error
