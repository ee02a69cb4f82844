"""Arithmetic in which entries are absent: the reference that a removal is compared with.

In the model with all its channels, every weight that a removal drops is marked by NaN. What such a weight makes is
absent too, and so on through activations and norms; a product, a sum or a mean is then taken over what is there, as in
the smaller model. This needs no list of layers: a norm's own forward, a function and a formula written out end in the
same few operators of PyTorch. Operators that are not among them pass NaN on, so that too little is removed by mistake,
never too much.

Everything is computed in float64 (float32 inside a layer included), so that the order of sums decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_optim._upstream import dispatch_mode, tree_map_only
from lightning_optim.modules import without_fast_path

__all__ = ["absent_entries", "in_float64"]

aten = torch.ops.aten


def in_float64() -> AbstractContextManager[Any]:
    """Compute in float64 whatever the code inside asks for; the tensors that enter must be float64."""
    return dispatch_mode(lambda operator, args, kwargs: tree_map_only(Tensor, _widened, operator(*args, **kwargs)))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _with_absence(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute one operator, taking NaN for an entry that is not there."""
    rule = _RULES.get(operator)
    if rule is None or not any(_has_absent(arg) for arg in args):
        return operator(*args, **kwargs)
    return rule(*args, **kwargs)


@contextmanager
def absent_entries() -> Iterator[None]:
    """Take NaN for an entry that is not there, in what is computed inside, without gradients.

    Fused kernels are off: they would hide their sums.
    """
    with (
        torch.no_grad(),
        without_fast_path(),
        torch.backends.cudnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        dispatch_mode(_with_absence),
    ):
        yield


def _has_absent(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _there(tensor: Tensor) -> Tensor:
    """Return 1 for entries that are there and 0 for others."""
    return (~tensor.isnan()).to(tensor.dtype)


def _filled(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isnan(), 0.0, tensor)


def _dims(tensor: Tensor, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the reduced dimensions; None and the empty list are all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(tensor.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)


# Products: pairs of which one is absent do not count; without any pair the result is absent.


def _product(multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    number = multiply(_there(left), _there(right))
    possible = multiply(torch.ones_like(left), torch.ones_like(right))  # of padding alone: none
    return torch.where((number < 0.5) & (possible > 0.5), torch.nan, multiply(_filled(left), _filled(right)))


def _added(
    multiply: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    product = alpha * _product(multiply, left, right)
    return product if beta == 0 else beta * bias + product


def _convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    product = _product(lambda left, right: aten.convolution(left, right, None, *how), inputs, weight)
    return product if bias is None else product + bias.view(-1, *[1] * (product.ndim - 2))


def _grouped(left: Tensor, right: Tensor, offsets: Tensor | None = None, *others: Any, **how: Any) -> Tensor:
    """A product for each group of rows, as experts take it."""
    return _product(lambda a, b: torch.nn.functional.grouped_mm(a, b, offs=offsets), left, right)


# Sums are taken over the entries that are there. So are means and variances where they keep their dimension, to be put
# against the same channels: a norm. A mean that is read as a value of its own would change with every channel that
# leaves, so NaN passes.


def _sum(inputs: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims = _dims(inputs, dim)
    return torch.where(_number(inputs, dims, keepdim) < 0.5, torch.nan, _filled(inputs).sum(dims, keepdim))


def _number(inputs: Tensor, dims: tuple[int, ...], keepdim: bool = True) -> Tensor:
    return _there(inputs).sum(dims, keepdim)


def _mean_over(inputs: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _filled(inputs).sum(dims, True) / _number(inputs, dims)


def _var_over(inputs: Tensor, dims: tuple[int, ...], correction: float = 0) -> Tensor:
    squares = _filled((inputs - _mean_over(inputs, dims)).square()).sum(dims, True)
    return squares / (_number(inputs, dims) - correction)


def _mean(inputs: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _mean_over(inputs, _dims(inputs, dim)) if keepdim else inputs.mean(dim)


def _var(inputs: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    correction = 1 if correction is None else correction
    if not keepdim:
        return torch.var(inputs, dim, correction=correction)
    return _var_over(inputs, _dims(inputs, dim), correction)


def _var_mean(inputs: Tensor, dim: Any = None, **how: Any) -> tuple[Tensor, Tensor]:
    return _var(inputs, dim, **how), _mean(inputs, dim, bool(how.get("keepdim", False)))


def _std(inputs: Tensor, dim: Any = None, **how: Any) -> Tensor:
    return _var(inputs, dim, **how).sqrt()


def _std_mean(inputs: Tensor, dim: Any = None, **how: Any) -> tuple[Tensor, Tensor]:
    return _std(inputs, dim, **how), _mean(inputs, dim, bool(how.get("keepdim", False)))


def _vector_norm(
    inputs: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    norm = torch.linalg.vector_norm(_filled(inputs), order, dim, keepdim)
    return torch.where(_number(inputs, _dims(inputs, dim), keepdim) < 0.5, torch.nan, norm)


# Norms.


def _scaled(inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = inputs if weight is None else inputs * weight
    return scaled if bias is None else scaled + bias


def _layer_norm(
    inputs: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(shape), 0))
    mean = _mean_over(inputs, dims)
    scale = (_var_over(inputs, dims) + eps).rsqrt()
    return _scaled((inputs - mean) * scale, weight, bias), mean, scale


def _rms_norm(inputs: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    least = torch.finfo(inputs.dtype).eps if eps is None else eps
    scale = (_mean_over(inputs.square(), tuple(range(-len(shape), 0))) + least).rsqrt()
    return _scaled(inputs * scale, weight, None), scale


def _group_norm(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = inputs.reshape(rows, groups, -1)
    normed, mean, scale = _layer_norm(parts, parts.shape[2:], None, None, eps)
    shape = (channels, *[1] * (inputs.ndim - 2))
    weights = [None if each is None else each.view(shape) for each in (weight, bias)]
    return _scaled(normed.reshape(inputs.shape), *weights), mean.flatten(1), scale.flatten(1)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: partial(_product, torch.mm),
    aten.bmm.default: partial(_product, torch.bmm),
    aten.mv.default: partial(_product, torch.mv),
    aten.dot.default: partial(_product, torch.dot),
    aten.addmm.default: partial(_added, torch.mm),
    aten.baddbmm.default: partial(_added, torch.bmm),
    aten.addmv.default: partial(_added, torch.mv),
    aten.convolution.default: _convolution,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}
"""How each operator that takes entries together treats those that are absent."""

if hasattr(aten, "_grouped_mm"):
    _RULES[aten._grouped_mm.default] = _grouped
if hasattr(aten, "_fused_rms_norm"):  # of GPUs; elsewhere it is written out
    _RULES[aten._fused_rms_norm.default] = _rms_norm
