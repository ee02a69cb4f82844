"""Layers that store their matrices otherwise than a Linear does: as transformers writes them, without transformers."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv1D(nn.Module):
    """A Linear whose weight is ``[in, out]``, as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """Experts as 3-d parameters; the expert of a row is the number of the row."""

    def __init__(self, experts: int = 3, width: int = 8, inner: int = 12, *, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = experts, transposed
        up, down = torch.randn(experts, inner, width), torch.randn(experts, width, inner)
        self.up_proj = nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up)
        self.down_proj = nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down)

    def forward(self, x):
        rows = []
        for place, row in enumerate(x):
            up, down = self.up_proj[place % self.num_experts], self.down_proj[place % self.num_experts]
            up, down = (up.t(), down.t()) if self.is_transposed else (up, down)
            rows.append(F.linear(F.relu(F.linear(row, up)), down))
        return torch.stack(rows)


def as_linear(layer: Conv1D) -> nn.Linear:
    """The Linear that computes the same."""
    linear = nn.Linear(*layer.weight.shape)
    linear.load_state_dict({"weight": layer.weight.detach().t(), "bias": layer.bias.detach()})
    return linear
