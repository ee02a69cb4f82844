"""Layers changed one after the other, each by what it receives from those that are changed already.

Layers that receive the same tensor (query, key and value) are changed together. Of a stack of blocks the outputs of the
last finished block are kept, and the blocks before return them instead of computing: a model of n blocks runs a few
times in all rather than n times, and the statistics of one tensor are held at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.depth.stacks import hidden_states
from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.modules import LINEARS, evaluating, is_compiled, without_fast_path
from lightning_optim.progress import progress_bar
from lightning_optim.sharding import own_class
from lightning_optim.target import ForwardInputs, map_inputs

__all__ = ["change_layer_by_layer"]

Change = Callable[[str, dict[str, Tensor]], None]
"""``change(name, statistics)`` changes a layer's weight in place."""


class _Reached(BaseException):
    """Ends a forward pass whose rest is of no use; no ``except Exception`` of a model's code may catch it."""


@dataclass
class _Group:
    """Layers that receive the same tensors.

    Attributes:
        names: The layers, in the order of their calls; the first one's inputs are read.
        once: Whether a forward pass calls them once at most, so that it can end there.
    """

    names: tuple[str, ...]
    once: bool


@dataclass
class _Stack:
    """Blocks in the order of their calls, and what the last finished one returned for each batch."""

    blocks: list[str]
    finished: int = -1
    outputs: list[Any] = field(default_factory=list)


def change_layer_by_layer(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: Sequence[ForwardInputs],
    statistics: Sequence[str],
    change: Change,
    *,
    title: str,
    shown: bool,
) -> list[str]:
    """Collect statistics of the layers' inputs, and change the layers in the order in which they are called.

    Args:
        model: Called with every batch, in eval mode; its mode is restored.
        layers: The layers to change, by their names in ``model``.
        calls: What its forward receives, a batch each. They are gone through several times.
        statistics: Names in ``functional.statistics.STATISTICS`` of what is read from the inputs.
        change: Called once for each layer.
        title: Of the progress bar.
        shown: Whether there is one.

    Returns:
        The layers that no batch reaches; they are not changed.

    Raises:
        ValueError: If the model, or a part of it, is compiled: its layers cannot be read then.
    """
    if is_compiled(model):
        raise ValueError(
            "the inputs of single layers cannot be read in a compiled model. Pass the module before torch.compile, and "
            "compile it afterwards."
        )
    with evaluating(model), without_fast_path():
        groups = _groups(_runs(model, layers, calls), layers)
        stacks = _replayable(model, layers, calls[0]) if len(groups) > 1 else []
        passes = _Passes(model, layers, calls, stacks)
        with progress_bar(title, len(groups), shown=shown) as advance:
            for place, group in enumerate(groups):
                collected = passes.collect(group, groups[place:], statistics)
                for name in group.names:
                    change(name, collected)
                advance()
    reached = {name for group in groups for name in group.names}
    return [name for name in layers if name not in reached]


def _received(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# The order of the layers.


def _runs(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: Sequence[ForwardInputs]
) -> list[list[tuple[str, ...]]]:
    """Return the layers that each batch calls, in order; those that receive the same tensor are one run."""
    found = []
    for call in calls:
        runs: list[list[str]] = []
        last: list[Any] = [None]

        def note(name: str, received: Any, runs: list[list[str]] = runs, last: list[Any] = last) -> None:
            if runs and received is last[0]:
                runs[-1].append(name)
            else:
                runs.append([name])
            last[0] = received  # held, so that no other tensor takes its identity

        handles = [
            layer.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name, note=note: note(name, _received(args, kwargs)), with_kwargs=True
            )
            for name, layer in layers.items()
        ]
        with _hooks(handles):
            call.call(model)
        found.append([tuple(run) for run in runs])
    return found


def _groups(batches: Sequence[Sequence[tuple[str, ...]]], layers: Mapping[str, nn.Module]) -> list[_Group]:
    """Return the layers in the order of their first calls; those that only ever receive the same are a group."""
    places: dict[str, set[tuple[str, ...]]] = {}
    most: dict[str, int] = {}
    order: list[str] = []
    for runs in batches:
        names = [name for run in runs for name in run]
        for name, number in Counter(names).items():
            most[name] = max(most.get(name, 0), number)
        for before, name in zip(["", *names], names, strict=False):
            if name not in order:
                order.insert(order.index(before) + 1 if before else 0, name)
        for run in runs:
            for name in run:
                places.setdefault(name, set()).add(run)
    groups: list[_Group] = []
    seen: set[str] = set()
    for name in order:
        if name in seen:
            continue
        run = next(iter(places[name]))
        alike = len({own_class(layers[other]) for other in run}) == 1 and isinstance(layers[name], LINEARS)
        together = alike and len(set(run)) == len(run) and all(places[other] == {run} for other in run)
        members = run if together else (name,)
        seen.update(members)
        groups.append(_Group(members, all(most[member] == 1 for member in members)))
    return groups


# Passes of the batches.


class _Passes:
    """Calls the model with every batch, as far as it takes."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        calls: Sequence[ForwardInputs],
        stacks: Sequence[_Stack],
    ) -> None:
        self._model = model
        self._layers = layers
        self._calls = calls
        self._stacks = stacks

    def collect(self, group: _Group, remaining: Sequence[_Group], statistics: Sequence[str]) -> dict[str, Tensor]:
        """Return the statistics of what a group receives, over all batches.

        Args:
            group: The layers that are changed next.
            remaining: This group and those behind it.
            statistics: Their names.
        """
        name = group.names[0]
        layer = self._layers[name]
        collectors = {key: STATISTICS[key]() for key in statistics}
        for collector in collectors.values():
            collector.know(f"{name}.weight", layer)

        def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for collector in collectors.values():
                inputs = _received(args, kwargs).detach().float()
                collector.add(f"{name}.weight", collector.measure(layer, inputs))  # type: ignore[attr-defined]
            if group.once:
                raise _Reached

        ends = [_last_finished(stack, remaining) for stack in self._stacks]
        caught: list[list[Any]] = [[] for _ in self._stacks]
        for batch, call in enumerate(self._calls):
            with ExitStack() as entered:
                for stack, end, outputs in zip(self._stacks, ends, caught, strict=True):
                    entered.enter_context(self._replaying(stack, batch, end, outputs))
                entered.enter_context(_hooks([layer.register_forward_pre_hook(read, with_kwargs=True)]))
                entered.enter_context(suppress(_Reached))
                call.call(self._model)
        for stack, end, outputs in zip(self._stacks, ends, caught, strict=True):
            if end > stack.finished and len(outputs) == len(self._calls):
                stack.finished, stack.outputs = end, outputs
        return {
            key: collector.value(f"{name}.weight", lambda sums: sums)
            for key, collector in collectors.items()
            if f"{name}.weight" in collector
        }

    @contextmanager
    def _replaying(self, stack: _Stack, batch: int, end: int, outputs: list[Any]) -> Iterator[None]:
        """Let finished blocks return what is kept, and catch what the last of those finished since returns."""
        kept = [self._model.get_submodule(name) for name in stack.blocks[: stack.finished + 1]]
        handles = []
        if end > stack.finished:
            block = self._model.get_submodule(stack.blocks[end])
            handles.append(block.register_forward_hook(lambda layer, args, output: outputs.append(_copied(output))))
        with _hooks(handles), returning(kept, stack.outputs[batch] if kept else None):
            yield


def _last_finished(stack: _Stack, remaining: Sequence[_Group]) -> int:
    """Return the place of the last block before the first that still has layers to change; -1 if there is none."""
    names = [name for group in remaining for name in group.names]
    for place, block in enumerate(stack.blocks):
        if any(f"{name}.".startswith(f"{block}.") for name in names):
            return place - 1
    return len(stack.blocks) - 1


def _copied(output: Any) -> Any:
    """Return a block's output that nobody changes in place."""
    return map_inputs(torch.clone, ForwardInputs((output,))).args[0]


@contextmanager
def returning(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let blocks return an output instead of computing theirs, inside the ``with`` block."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = lambda *args, **kwargs: _copied(output)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


# Stacks whose finished blocks need not compute again.


def _replayable(model: nn.Module, layers: Mapping[str, nn.Module], call: ForwardInputs) -> list[_Stack]:
    """Return the stacks behind whose blocks nothing but the last one's output is used.

    That is tried: with the output of the last block but one for all before it, the layers of the last block and behind
    the stack must receive the same.
    """
    found = hidden_states(model, lambda root: [call.call(root)])
    stacks = []
    for blocks in [list(states) for states in found.values()]:
        if len(blocks) > 1 and _is_replayable(model, layers, call, blocks):
            stacks.append(_Stack(blocks))
    return stacks


def _is_replayable(
    model: nn.Module, layers: Mapping[str, nn.Module], call: ForwardInputs, blocks: Sequence[str]
) -> bool:
    modules = [model.get_submodule(name) for name in blocks]
    outputs: list[Any] = []
    counted: list[str] = []

    def catch(layer: nn.Module, args: Any, output: Any, name: str) -> None:
        counted.append(name)
        if name == blocks[-2]:
            outputs.append(_copied(output))

    handles = [
        module.register_forward_hook(lambda layer, args, output, name=name: catch(layer, args, output, name))
        for name, module in zip(blocks, modules, strict=True)
    ]
    within = tuple(f"{block}." for block in blocks[:-1])
    others = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(within)}
    with _hooks(handles):
        before = _fingerprints(model, others, call)
    if counted != list(blocks):
        return False
    with returning(modules[:-1], outputs[0]):
        return before == _fingerprints(model, others, call)


def _fingerprints(model: nn.Module, layers: Mapping[str, nn.Module], call: ForwardInputs) -> list[tuple[str, float]]:
    """Return the layers that a call reaches, each with a number that tells its input from another."""
    found: list[tuple[str, float]] = []

    def note(name: str, received: Any) -> None:
        flat = received.detach().float().flatten()
        found.append((name, float(flat @ torch.linspace(1.0, 2.0, len(flat), dtype=flat.dtype, device=flat.device))))

    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: note(name, _received(args, kwargs)), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    with _hooks(handles):
        call.call(model)
    return found
