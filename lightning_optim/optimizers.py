"""Optimizers as the callbacks and strategies see them: those inside others, their steps, the parameters they hold."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.sharding import own_class

__all__ = [
    "StepWatch",
    "check_current",
    "following",
    "held_ids",
    "nested",
    "ready_made",
    "replaced_parameters",
    "unwrapped",
]


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside Lightning's own wrapper; any other optimizer is returned as it is.

    Lightning's wrapper is told by its class. Optimizers that wrap another (Lookahead, SAM) have an attribute
    ``optimizer`` too, and there the outer one is meant.
    """
    is_lightnings = any(cls.__name__ == "LightningOptimizer" for cls in type(optimizer).__mro__)
    return optimizer.optimizer if is_lightnings else optimizer


def held_ids(optimizer: Any) -> set[int]:
    """Return the ids of the parameters that an optimizer holds."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def nested(optimizer: Any) -> list[Any]:
    """Return an optimizer and the optimizers it wraps, outermost first; found by type, whatever they are called."""
    found = [optimizer]
    for each in found:  # grows while it is walked
        for value in vars(each).values():
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
            inside = [part for part in (value, *parts) if isinstance(part, Optimizer)]
            found += [part for part in inside if not any(part is other for other in found)]
    return found


class StepWatch:
    """Calls a function after each step of an optimizer, once however many optimizers it wraps.

    A step of a wrapped optimizer alone counts as well: SAM's second half calls no ``step`` of its own.

    Args:
        optimizer: The one that the Trainer holds.
        after: Called with ``optimizer`` once the outermost step in progress is done.
    """

    def __init__(self, optimizer: Any, after: Callable[[Any], None]) -> None:
        self._optimizer = optimizer
        self._after = after
        self._depth = 0
        self._handles: list[Any] = []
        for each in nested(optimizer):
            if not _runs_hooks(each):
                self._handles.append(_HookedStep(each))
            self._handles.append(_add(each, PRE, self._begin))
            self._handles.append(_add(each, POST, self._end))

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _end(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after(self._optimizer)

    def remove(self) -> None:
        """Stop watching; what was installed on the optimizers is taken back."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []


PRE, POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
"""Where torch keeps an optimizer's step hooks."""


def _add(optimizer: Any, where: str, hook: Callable[..., None]) -> RemovableHandle:
    hooks = vars(optimizer).setdefault(where, OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _runs_hooks(optimizer: Any) -> bool:
    """Whether an optimizer's ``step`` calls its hooks.

    ``Optimizer.__init__`` sees to it. A wrapper that does not call it (timm's Lookahead) takes hooks and never runs
    them.
    """
    return isinstance(optimizer, Optimizer) and bool(getattr(type(optimizer).step, "hooked", False))


class _HookedStep:
    """Stands in for the ``step`` of an optimizer that runs no hooks, and runs them."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")
        self._step = optimizer.step
        optimizer.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hook in list(vars(self._optimizer).get(PRE, {}).values()):
            hook(self._optimizer, args, kwargs)
        result = self._step(*args, **kwargs)
        for hook in list(vars(self._optimizer).get(POST, {}).values()):
            hook(self._optimizer, args, kwargs)
        return result

    def remove(self) -> None:
        """Put the optimizer's own ``step`` back."""
        if vars(self._optimizer).get("step") is not self:
            return
        del self._optimizer.step
        if self._own is not None:
            self._optimizer.step = self._own


def ready_made(module: nn.Module) -> list[Optimizer]:
    """Return the optimizers that LightningCLI built for a module or one below it, before the run began.

    From an ``optimizer:`` section it builds the optimizer at once, and gives the instance a ``configure_optimizers``
    that returns it.
    """
    found: list[Optimizer] = []
    for part in module.modules():
        method = vars(part).get("configure_optimizers")
        function = getattr(method, "__func__", method)
        optimizer = function.keywords.get("optimizer") if isinstance(function, partial) else None
        if isinstance(optimizer, Optimizer):
            found += nested(optimizer)
    return found


_MARK = "_name_before_it_was_replaced"


@contextmanager
def following(module: nn.Module) -> Iterator[None]:
    """Let the :func:`ready_made` optimizers of a module hold its parameters after they were replaced in the block.

    Parameters that were replaced are marked, for :func:`check_current`: a mark keeps nothing alive, and unlike a weak
    reference it lets torch swap the tensor (``to_empty`` of a DTensor).

    Inside the block the optimizers hold none of them, so that the old ones can be freed. One that held all parameters
    holds all afterwards, also those that are new by name. Groups keep their order, their options and their lists, which
    some optimizers (LBFGS) keep elsewhere too.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lists = {id(group["params"]): group["params"] for each in ready_made(module) for group in each.param_groups}
    held: list[tuple[list[Tensor], list[str | Tensor]]] = [
        (parameters, [names.get(id(parameter), parameter) for parameter in parameters]) for parameters in lists.values()
    ]
    holds_all = {name for _, entries in held for name in entries if isinstance(name, str)} == set(names.values())
    for parameters, _ in held:
        parameters.clear()
    for name, parameter in module.named_parameters():
        vars(parameter)[_MARK] = name
    before = set(names.values())
    try:
        yield
    finally:
        now: dict[str, Tensor] = dict(module.named_parameters())
        for current in now.values():
            vars(current).pop(_MARK, None)
        for parameters, entries in held:
            known = [now.get(entry) if isinstance(entry, str) else entry for entry in entries]
            parameters += [parameter for parameter in known if parameter is not None]
        if held and holds_all:
            held[0][0].extend(parameter for name, parameter in now.items() if name not in before)


def check_current(who: str, module: nn.Module, optimizers: Iterable[Any]) -> None:
    """Refuse an optimizer that holds parameters as they were before they were replaced, or none of the module's.

    Args:
        who: What replaced them, for the sentence.
        module: The module whose parameters are to be trained.
        optimizers: Those of the Trainer.

    Raises:
        MisconfigurationException: With the optimizer's class, and a parameter.
    """
    now = {id(parameter) for parameter in module.parameters()}
    for optimizer in chain.from_iterable(map(nested, optimizers)):
        held = held_ids(optimizer)
        stale = replaced_parameters(optimizer)
        if held and (stale or held.isdisjoint(now)):
            said = f"{len(stale)} of them as they were before, such as {stale[0]}" if stale else "none of them"
            raise MisconfigurationException(
                f"{who} gave {own_class(module).__name__} new parameters, and the optimizer {type(optimizer).__name__} "
                f"holds {said}, so these would not be trained. It was built too early, in `__init__` for example: "
                "build it in `configure_optimizers`."
            )


def replaced_parameters(optimizer: Any) -> list[str]:
    """Return the names of the parameters that an optimizer holds although their module has others now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [vars(parameter)[_MARK] for parameter in parameters if _MARK in vars(parameter)]
