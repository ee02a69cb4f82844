"""Removal: channels leave a live model, its optimizers and its averaged copies, or nothing changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_optim.change import Kept, keep_channels
from lightning_optim.checkpoint import inherit, plan_of
from lightning_optim.configs import changes, config_models, solve
from lightning_optim.structure import change_configs
from lightning_optim.structured.groups import Removal

__all__ = ["ChannelRemoval", "apply_removal", "keep_channels"]


def apply_removal(
    module: nn.Module,
    removal: Removal,
    before_change: Callable[[str, tuple[str, ...]], None] | None = None,
    whole: nn.Module | None = None,
) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
    """Remove the channels from a module in place.

    Parameters that change are new; they keep ``requires_grad``, dtype, memory format, their Python attributes and
    hooks, their gradient (sliced), and stay shared where they were.

    Args:
        module: The module that was traced, or a copy of it.
        removal: What is left.
        before_change: Called with each layer's name and the attributes that change, before anything does.
        whole: The model around it, whose configs follow; the module itself by default.

    Returns:
        Old parameter -> (new parameter, surviving flat indices).
    """
    layers = {name.rpartition(".")[0] for name in removal.kept} | set(removal.attributes)
    if before_change is not None:
        for name in sorted(layers):
            before_change(name, tuple(removal.attributes.get(name, {})))
    replaced: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
    done: set[tuple[nn.Module, str]] = set()
    for name, kept in removal.kept.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if (layer, leaf) in done:  # one layer under two names
            continue
        done.add((layer, leaf))
        if leaf in layer._buffers:
            layer._buffers[leaf] = keep_channels(layer._buffers[leaf], kept, removal.shapes[name])  # type: ignore[arg-type]
            continue
        old: Any = layer._parameters[leaf]
        if old not in replaced:
            replaced[old] = (_smaller(old, kept, removal.shapes[name]), kept)
        layer._parameters[leaf] = replaced[old][0]
    dotted: dict[nn.Module, dict[str, object]] = {}
    for name, attributes in removal.attributes.items():
        for attribute, value in attributes.items():
            layer = module.get_submodule(name)
            if "." in attribute:
                dotted.setdefault(layer, {})[attribute] = value
            else:
                setattr(layer, attribute, value)
    change_configs(module if whole is None else whole, dotted)
    return replaced


def _smaller(old: nn.Parameter, kept: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    new = nn.Parameter(keep_channels(old, kept, shape), requires_grad=old.requires_grad)
    inherit(new, old)
    if old.grad is not None:
        new.grad = keep_channels(old.grad, kept, shape)
    return new


@dataclass(frozen=True)
class ChannelRemoval:
    """A removal as a change of the whole model; the plan of what it is applied to follows.

    Attributes:
        prefix: Name prefix of the module that was traced; empty or ending in a dot.
        removal: What is left of that module.
        configs: Whether the configurations inside it follow, where they can state its shapes. It takes about a second,
            so it is for the last removal.
    """

    prefix: str
    removal: Removal
    configs: bool = False

    def __call__(self, root: nn.Module) -> Kept:
        """Remove the channels from a model, or from an averaged copy of it."""
        plan = plan_of(root)

        def track(name: str, attributes: tuple[str, ...]) -> None:
            plan.track(f"{self.prefix}{name}" if name else self.prefix.rstrip("."), *attributes)

        target = root.get_submodule(self.prefix.rstrip("."))
        kept = apply_removal(target, self.removal, track, root)
        if self.configs:
            self._follow_configs(root, target, track)
        return kept

    def _follow_configs(
        self, root: nn.Module, target: nn.Module, track: Callable[[str, tuple[str, ...]], None]
    ) -> None:
        """Change the numbers of Hugging Face configurations, and those of modules that follow from them."""
        for name, model in config_models(target).items():
            solution = solve(model)
            if not solution.values or solution.unstated:
                continue
            wanted = changes(model, solution.values)
            dotted: dict[nn.Module, dict[str, object]] = {}
            for layer, values in wanted.items():
                track(".".join(part for part in (name, layer) if part), tuple(values))
            for layer, values in wanted.items():
                module = model.get_submodule(layer)
                for key, value in values.items():
                    if "." in key:
                        dotted.setdefault(module, {})[key] = value
                    else:
                        setattr(module, key, value)
            change_configs(root, dotted)
