"""Which parameters of a layer are rounded, and their rows: what shares a scale by default."""

from torch import Tensor, nn

from lightning_optim.modules import TRANSPOSED, expert_weights, matrices_of
from lightning_optim.quantization.attention import projection_names
from lightning_optim.quantization.recurrent import recurrent_names
from lightning_optim.quantization.transposed import kernels_as_rows

__all__ = ["rounded_names", "rows_of"]


def rounded_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that are rounded in a layer."""
    if isinstance(layer, nn.MultiheadAttention):
        return projection_names(layer)
    if isinstance(layer, nn.RNNBase):
        return recurrent_names(layer)
    return tuple(expert_weights(layer)) or ("weight",)


def rows_of(layer: nn.Module, name: str, tensor: Tensor) -> list[Tensor]:
    """Return the matrices ``[out, in, ...]`` of a parameter, or of what has its shape; each is rounded by itself.

    Args:
        layer: The layer, float or quantized.
        name: The parameter's name in the layer.
        tensor: The parameter, or what belongs to it entry by entry.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return list(tensor.chunk(3)) if name == "in_proj_weight" else [tensor]
    if isinstance(layer, TRANSPOSED):
        return [kernels_as_rows(tensor, int(layer.groups))]
    return matrices_of(layer, name, tensor)
