"""Techniques that exist for tests only. They use the plan as channel removal and quantization do, and nothing else.

``Narrow`` narrows one hidden layer mid-run and swaps a layer's class; ``Factorize`` makes two parameters of one;
``RemoveBlocks`` removes blocks of a stack.
"""

import torch
from torch import nn

from lightning_optim.callbacks.base import CompressionCallback
from lightning_optim.checkpoint import layer_class, plan_of
from lightning_optim.window import Window


@layer_class
class ScaledLinear(nn.Linear):
    """A Linear whose output is scaled by a buffer."""

    def forward(self, x):
        return super().forward(x) * self.scale


class Narrow(CompressionCallback):
    """Keep the first half of ``net.4``'s outputs from ``start`` on; make ``net.0`` a ScaledLinear."""

    def __init__(self, start: int = 10, **words):
        super().__init__(Window(start, start), **words)

    def target_parameters(self):
        return {"net.4.weight": self._pl_module.net[4].weight}

    def start(self, trainer, pl_module, *, fresh):
        self._pl_module = pl_module

    def apply_event(self, trainer, pl_module):
        plan = plan_of(pl_module)
        plan.track("net.4", "out_features")
        plan.track("net.6", "in_features")
        plan.track("net.0")
        half = pl_module.net[4].out_features // 2
        keep = slice(0, half)
        self._replace(trainer, pl_module.net[4], "weight", lambda t: t[keep])
        self._replace(trainer, pl_module.net[4], "bias", lambda t: t[keep])
        self._replace(trainer, pl_module.net[6], "weight", lambda t: t[:, keep])
        pl_module.net[4].out_features = pl_module.net[6].in_features = half
        pl_module.net[0].__class__ = ScaledLinear
        pl_module.net[0].register_buffer("scale", torch.tensor([0.9]))

    def _replace(self, trainer, layer, leaf, cut):
        old = getattr(layer, leaf)
        new = nn.Parameter(cut(old.detach()).clone())
        setattr(layer, leaf, new)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            state = optimizer.state.pop(old, None)
            if state is not None:
                same = {k for k, v in state.items() if torch.is_tensor(v) and v.shape == old.shape}
                optimizer.state[new] = {k: cut(v).clone() if k in same else v for k, v in state.items()}

    def plan_entry(self):
        return {"technique": "Narrow"}

    def last_line(self, pl_module):
        return "Narrow: done."

    def __getstate__(self):
        return {**super().__getstate__(), "_pl_module": None}


@layer_class
class LowRank(nn.Linear):
    """A Linear whose weight is the product of two thin ones."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.v), self.u, self.bias)


def factorize(root: nn.Module, name: str, rank: int) -> None:
    """Make a Linear a LowRank: the plan is told, and then the module is changed."""
    plan_of(root).track(name)
    layer = root.get_submodule(name)
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    del layer._parameters["weight"]
    contiguous = {"memory_format": torch.contiguous_format}  # as after loading: products add up in the same order
    layer.u = nn.Parameter((u[:, :rank] * s[:rank]).clone(**contiguous))
    layer.v = nn.Parameter(v[:rank].clone(**contiguous))
    layer.__class__ = LowRank


def remove_blocks(root: nn.Module, name: str, places: set[int]) -> None:
    """Remove blocks of a ModuleList or Sequential."""
    plan_of(root).track(name)
    stack = root.get_submodule(name)
    left = [block for place, block in enumerate(stack) if place not in places]
    stack._modules.clear()
    stack._modules.update({str(place): block for place, block in enumerate(left)})


class Once(CompressionCallback):
    """Change the module's structure once, at a step: ``change(root)``."""

    def __init__(self, change, start: int = 10, **options):
        super().__init__(Window(start, start), **options)
        self.change = change

    def target_parameters(self):
        return dict(self._pl_module.named_parameters())

    def start(self, trainer, pl_module, *, fresh):
        self._pl_module = pl_module

    def apply_event(self, trainer, pl_module):
        self.commit(trainer, pl_module, self.change)

    def plan_entry(self):
        return {"technique": "Once"}

    def last_line(self, pl_module):
        return "Once: done."

    def __getstate__(self):
        return {**super().__getstate__(), "_pl_module": None}
