"""Additions, products and activations between integer layers, which round what they read as layers do.

``x + y`` and ``F.silu(x)`` have no layer that could hold a range, and ``nn.SiLU`` is none that has weights. The ranges
of their operands live on the module in whose ``forward`` the function is called: its class becomes a subclass,
:class:`QuantizedFunctions`, whose forward runs under a ``TorchFunctionMode`` that sees each such call. A function is
named after its kind and its place among the calls of that kind in one forward (``add_0``), the same in training and in
a graph.

Operands are rounded where they are read, not where they are made: two readers of a tensor observe the same values,
compute the same scale, and an engine rounds it once.
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_optim.checkpoint import is_layer_class, layer_class
from lightning_optim.functional.fake_quantize import fake_quantize
from lightning_optim.quantization.layers import ATTRIBUTES, STATE, QuantizedLayer
from lightning_optim.quantization.over import OverOwnClass
from lightning_optim.quantization.rounded import on_part
from lightning_optim.sharding import own_class

__all__ = [
    "GATE_SCALE",
    "OPERANDS",
    "FunctionCalls",
    "QuantizedFunctions",
    "RoundsFunctions",
    "can_hold",
    "forget_operands",
    "gated",
    "ranges_of",
]

_Function = Callable[..., Any]
_CALLS = {nn.Module.__call__.__code__}
"""Code in whose frames the innermost module call is found; its ``self`` is the module."""

_FUNCTIONS: dict[str, tuple[_Function, ...]] = {
    "add": (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    "mul": (torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "sigmoid": (torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_),
    "hardsigmoid": (F.hardsigmoid,),
    "pool": (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    "mean": (torch.mean, Tensor.mean),
}
_KIND: dict[Any, str] = {function: kind for kind, functions in _FUNCTIONS.items() for function in functions}

OPERANDS = {kind: ("left", "right") if kind in ("add", "mul") else ("operand",) for kind in _FUNCTIONS}
"""Kind of function -> names of its operands."""

_BUFFER = re.compile(rf"((?:{'|'.join(OPERANDS)})_\d+_(?:left|right|operand))_(?:{'|'.join(STATE)})")

GATE_SCALE = 1 / 255
"""Step of the sigmoid in SiLU and of the hard sigmoid in Hardswish, which lie between 0 and 1."""


def ranges_of(function: str) -> tuple[str, ...]:
    """Return the names of the ranges of a function.

    Examples:
        >>> ranges_of("add_0"), ranges_of("silu_1")
        (('add_0_left', 'add_0_right'), ('silu_1_operand',))
    """
    return tuple(f"{function}_{operand}" for operand in OPERANDS[function.rpartition("_")[0]])


def calling_module() -> FrameType | None:
    """Return the frame of the innermost module call that runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _CALLS:
        frame = frame.f_back
    return frame


def gated(
    kind: str,
    x: Tensor,
    gate: Callable[[Tensor, float], Tensor],
    shifted: Callable[[Tensor], Tensor] = lambda x: x + 3.0,
) -> Tensor:
    """Compute SiLU or Hardswish as a product with its rounded gate, as integer kernels do.

    Args:
        kind: "silu" or "hardswish".
        x: The operand, rounded.
        gate: Rounds a tensor to 0 to 255 with a scale, clips it there, and returns the integers times ``GATE_SCALE``.
        shifted: Returns ``x + 3``.
    """
    return x * (gate(torch.sigmoid(x), GATE_SCALE) if kind == "silu" else gate(shifted(x), 6 * GATE_SCALE))


class FunctionCalls(TorchFunctionMode):
    """Gives each call of a function that may be rounded its name.

    Attributes:
        total: Number of calls so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._counts: dict[FrameType, Counter[str]] = {}

    def wanted(self, frame: FrameType) -> bool:
        """Whether the functions that a module call computes are of interest."""
        return True

    def call(self, frame: FrameType, name: str, function: _Function, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Compute a function that has a name."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Compute a function."""
        kwargs = kwargs or {}
        kind = _KIND.get(func)
        frame = None if kind is None else calling_module()
        if kind is None or frame is None or not self.wanted(frame):
            return func(*args, **kwargs)
        counts = self._counts.setdefault(frame, Counter())
        name = f"{kind}_{counts[kind]}"
        counts[kind] += 1
        self.total += 1
        return self.call(frame, name, func, args, kwargs)

    def __exit__(self, *error: Any) -> None:
        """Leave the mode, and let go of the frames, which hold every local tensor."""
        self._counts.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _Rounding(FunctionCalls):
    """Rounds the operands of the functions of one module call that have ranges."""

    def __init__(self, owner: "RoundsFunctions", frame: FrameType) -> None:
        super().__init__()
        self._owner = owner
        self._frame: FrameType | None = frame

    def wanted(self, frame: FrameType) -> bool:
        return frame is self._frame

    def __exit__(self, *error: Any) -> None:
        self._frame = None
        super().__exit__(*error)

    def call(self, frame: FrameType, name: str, function: _Function, args: tuple[Any, ...], kwargs: Any) -> Any:
        if name not in self._owner.functions:
            return function(*args, **kwargs)
        kind, given = name.rpartition("_")[0], {**dict(zip(("input", "other"), args, strict=False)), **kwargs}
        operands = [
            self._owner.round_operand(which, given.pop(argument))
            for which, argument in zip(ranges_of(name), ("input", "other"), strict=False)
        ]
        if kind in ("silu", "hardswish"):
            return self._owner.gated(kind, operands[0])
        more = [given.pop("other")] if len(args) > 1 and len(operands) == 1 else []
        rest = {key: value for key, value in given.items() if key in kwargs}
        return _out_of_place(function)(*operands, *more, *args[2:], **rest)


def _out_of_place(function: _Function) -> _Function:
    """Return the function that leaves its operands as they are: only those are rounded that nothing reads later."""
    name = function.__name__.strip("_").removeprefix("i")
    return getattr(torch, name) if name in ("add", "mul", "sigmoid") else function


class RoundsFunctions(OverOwnClass):
    """A module that computes by the forward of its own class, and rounds the operands of functions called there.

    Attributes:
        functions: Names of the functions.
        function_calls: How many functions with a name one forward computes.
    """

    functions: tuple[str, ...] = ()
    function_calls: int = 0

    @property
    def rounds_functions(self) -> bool:
        """Whether functions are rounded or observed now."""
        return True

    def round_operand(self, which: str, x: Tensor) -> Tensor:
        """Round an operand, by the name of its range."""
        raise NotImplementedError

    def gated(self, kind: str, x: Tensor) -> Tensor:
        """Compute SiLU or Hardswish of an operand."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module's own class does, with rounded operands."""
        return self._compute(args, kwargs) if self.rounds_functions else super().forward(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # the mode looks at frames, which no compiler traces
    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Rounding(self, sys._getframe()) as calls:
            result = super().forward(*args, **kwargs)
        self.computed(calls.total)
        return result

    def computed(self, calls: int) -> None:
        """Take the number of functions that one forward computed."""


_CALLS.add(inspect.unwrap(RoundsFunctions._compute).__code__)


@layer_class
class QuantizedFunctions(RoundsFunctions, QuantizedLayer):
    """A module that rounds the operands of functions that its forward calls.

    If a forward in training computes another number of functions than in eval mode, their names cannot be trusted:
    nothing is observed then, and nothing is rounded.
    """

    keeps_name = True

    @property
    def watched(self) -> tuple[str, ...]:
        """The names of the operands."""
        return tuple(name for function in self.functions for name in ranges_of(function))

    @property
    def rounds_functions(self) -> bool:
        """Whether functions are rounded or observed now."""
        return self.output_phase != "off"

    def phase_of(self, which: str) -> str:
        """Return the phase of an operand; all have that of an output."""
        return self.output_phase

    def round_operand(self, which: str, x: Tensor) -> Tensor:
        """Return an operand, rounded or not by phase; record it if it is observed."""
        return self._pass(which, self.output_phase, x)

    def gated(self, kind: str, x: Tensor) -> Tensor:
        """Return SiLU or Hardswish of an operand, with a rounded gate in the phases that round."""
        # An integer gate lies between 0 and 1, and so takes half of a symmetric range: it stays float there.
        if self.output_phase not in ("fake_quantize", "frozen") or self.activation_ranges == "symmetric":
            return F.silu(x) if kind == "silu" else F.hardswish(x)
        return gated(kind, x, _rounded_gate)

    def computed(self, calls: int) -> None:
        """Drop what was recorded if the names cannot be trusted."""
        if calls != self.function_calls and self.output_phase == "observe":
            for which in self.watched:
                setattr(self, f"seen_{which}", None)


def _rounded_gate(x: Tensor, scale: float) -> Tensor:
    step = torch.tensor(scale, device=x.device, dtype=torch.float32)
    rounded = on_part(lambda part: fake_quantize(part, step, 0, 0, 255), x)
    return rounded if scale == GATE_SCALE else rounded * (GATE_SCALE / scale)


def can_hold(module: nn.Module) -> bool:
    """Whether a module can hold ranges of functions: another technique's layer, or one with such names, cannot."""
    if isinstance(module, QuantizedFunctions):
        return True
    names = (*ATTRIBUTES, "functions", "function_calls", "observing", "watch", "watched", "round_operand", "gated")
    own = own_class(module)
    return not (
        is_layer_class(own)
        or isinstance(module, torch.jit.ScriptModule)
        or any(name in vars(module) or hasattr(own, name) for name in names)
    )


def forget_operands(module: QuantizedFunctions, *, keep: Collection[str]) -> None:
    """Remove the ranges of operands, except some."""
    for name in list(module._buffers):
        operand = _BUFFER.fullmatch(name)
        if operand and operand[1] not in keep:
            del module._buffers[name]
