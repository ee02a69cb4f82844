"""A technique that the package does not know: a Linear layer becomes two factors of low rank."""

from typing import Any

from torch import nn

from helpers.toy import factorize
from lightning_optim.callbacks.base import CompressionCallback
from lightning_optim.patterns import Selector
from lightning_optim.target import find_target, named_layers
from lightning_optim.techniques import Technique
from lightning_optim.window import Window


class Thin(CompressionCallback):
    """Factorize Linear layers at the end of the window."""

    def __init__(self, ratio: float = 0.5, *, start=0.1, end=0.5, module=None, include=None, exclude=None) -> None:
        super().__init__(Window(start, end, events=1), module=module, include=include, exclude=exclude)
        self.ratio = ratio
        self._layers: dict[str, nn.Module] = {}

    def start(self, trainer, pl_module, *, fresh):
        prefix, target = find_target(pl_module, self.module)
        selector = Selector(self.include, self.exclude, prefix)
        linear = {name: layer for name, layer in named_layers(target, prefix) if isinstance(layer, nn.Linear)}
        self._layers = {
            name: layer for name, layer in linear.items() if selector.judge(f"{name}.weight", layer).reason is None
        }
        selector.check_all_matched(linear)

    def target_parameters(self):
        return {
            f"{name}.{leaf}": parameter
            for name, layer in self._layers.items()
            for leaf, parameter in layer.named_parameters(recurse=False)
        }

    def apply_event(self, trainer, pl_module):
        if not self.window.closes_now:
            return
        self.commit(trainer, pl_module, self._change)
        self.log_event(trainer, pl_module, {"thin/parameters": float(self._numel())})

    def _change(self, root):
        for name in self._layers:
            factorize(root, name, round(self.ratio * min(root.get_submodule(name).weight.shape)))

    def _numel(self) -> int:
        return sum(parameter.numel() for parameter in self.target_parameters().values())

    def plan_entry(self) -> dict[str, Any]:
        return {"technique": "Thin", "asked": self.ratio, "layers": list(self._layers)}

    def last_line(self, pl_module):
        return f"{self.label}: asked {self.ratio:.0%} of the rank; {self._numel()} parameters are left."


TECHNIQUE = Technique("thin", Thin, first="ratio", order=14)
