"""Reads of a unit's weights from outside of the unit: an item table used for scoring, a tied head.

A unit's weights are whole only while its own forward runs. Elsewhere ``self.items.weight`` is a DTensor, of which the
process holds a shard, and operations that mix it with ordinary tensors fail. During a step, such a read returns the
whole weight instead: it is gathered once per forward pass, and its gradient is added to the unit's after the backward
pass. Reads are detected as they happen; nothing has to be declared.
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
    """The reads of one sharded module."""

    def __init__(self) -> None:
        self._units: list[_Unit] = []
        self._watching = 0

    @staticmethod
    def of(module: nn.Module) -> "Reads":
        """Return the reads of a root module; they outlive the strategy that sharded it."""
        reads: Reads = module.__dict__.setdefault(_READS, Reads())
        return reads

    def watch(self, name: str, unit: nn.Module, dtype: torch.dtype | None) -> None:
        """Let reads of a unit's own weights return whole weights during a step.

        Args:
            name: Its dotted name.
            unit: A module that ``fully_shard`` has just sharded.
            dtype: Dtype in which its parameters are gathered; None keeps theirs.
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
        """Let reads return whole weights while the block runs."""
        self._watching += 1
        try:
            yield
        finally:
            self._watching -= 1

    def in_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step method, so that reads return whole weights while it runs."""

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            for unit in self._units:
                unit.begin()
            with self.running():
                return step(*args, **kwargs)

        return watched

    def finish_backward(self) -> None:
        """Add the gradients of reads to those of the parameters. A collective: all processes must call it."""
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
        """Forget the last step. Parameters are recorded while they are sharded, as they are between steps."""
        self._copies, self._leaves = {}, []
        self._divided |= {name: p for name, p in self.module._parameters.items() if is_dtensor(p)}

    def read(self, name: str, value: Any) -> Any:
        """Return the result of a read: in the module's own forward, and between steps, the attribute itself."""
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
        """Average the gradients of the copies over the processes, each keeping its shard; later reads gather again."""
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
    """Return a class like the one that ``fully_shard`` made, but whose parameters are read through :class:`_Unit`."""
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
"""Torch's message (2.13) for an operation on a whole tensor and a sharded one."""


@contextmanager
def mixed_said_plainly(strategy: Any, step: str) -> Generator[None, None, None]:
    """Name the cause when whole and sharded tensors meet, instead of "got mixed torch.Tensor and DTensor".

    Args:
        strategy: The strategy that sharded the module.
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
            f"{name}: `{step}` uses a parameter of a unit outside of the unit's own forward, where this process holds "
            f"only a shard of it. Units: {', '.join(units) or 'none'}. Choose units that leave this parameter to the "
            f"root, {name}(units=[...]), or use it in its unit's forward."
        ) from error
