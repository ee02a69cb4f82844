"""Stacks of blocks in a model, and which of their blocks may be removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_optim.depth.check import call_repeatably, same_as_skipping
from lightning_optim.depth.hidden import Call, watching
from lightning_optim.modules import without_compiler
from lightning_optim.patterns import Pattern, Selector
from lightning_optim.sharding import own_class
from lightning_optim.structure import children_of
from lightning_optim.tables import by_reason, render
from lightning_optim.target import find_target, named_layers

__all__ = ["LEAST", "Found", "Stack", "check_left", "check_readers", "find_stacks", "hidden_states", "number_of_blocks"]

LEAST = 3
"""Blocks that make a stack."""
_REPEATED = "it holds the same"


@dataclass
class Stack:
    """A stack of blocks.

    Attributes:
        name: Its dotted name in the whole model.
        blocks: How many blocks it has.
        stay: Place of a block that must stay -> why.
    """

    name: str
    blocks: int
    stay: dict[int, str] = field(default_factory=dict)

    @property
    def removable(self) -> list[int]:
        """Places of the blocks that may be removed."""
        return [place for place in range(self.blocks) if place not in self.stay]


@dataclass(frozen=True)
class Found:
    """The stacks of a model.

    Attributes:
        stacks: Those with blocks that may be removed, by name.
        left_out: Stacks and blocks that are left alone -> why.
    """

    stacks: dict[str, Stack]
    left_out: dict[str, str]

    def table(self, title: str, removed: Mapping[str, int]) -> str:
        """Return a table of the stacks and of what is left alone.

        Args:
            title: Printed above it.
            removed: How many blocks of each stack are to be removed.
        """
        rows = [
            (name, str(stack.blocks), str(removed.get(name, 0)), f"{len(stack.removable)} may be removed")
            for name, stack in self.stacks.items()
        ]
        rows += [(names, "", "-", reason) for names, reason in by_reason(self.left_out)]
        return render(title, ("stack", "blocks", "removed", "how, or why not"), rows)

    def reasons(self) -> str:
        """Return why blocks are left alone, in a few words."""
        named = "; ".join(f"{names}: {reason}" for names, reason in by_reason(self.left_out)[:4])
        return named or f"no ModuleList or Sequential holds {LEAST} blocks of one class"


def number_of_blocks(ratio: float | int, stack: Stack) -> int:
    """Return how many blocks of a stack are removed.

    Args:
        ratio: Fraction of its blocks (float), rounded half up, or their number (int).
        stack: The stack.

    Raises:
        ValueError: If none would stay, or fewer may be removed.
    """
    number = ratio if isinstance(ratio, int) else int(ratio * stack.blocks + 0.5)
    if number >= stack.blocks:
        raise ValueError(
            f"pruning_ratio={ratio!r} asks for {number} of the {stack.blocks} blocks of {stack.name}, and at least one "
            f"must stay. Ask for {stack.blocks - 1} at most, or exclude=[{stack.name!r}]."
        )
    if number > len(stack.removable):
        kept = "; ".join(f"block {place} ({reason})" for place, reason in list(stack.stay.items())[:3])
        raise ValueError(
            f"pruning_ratio={ratio!r} asks for {number} of the {stack.blocks} blocks of {stack.name}, of which "
            f"{len(stack.removable)} may be removed: {kept} must stay. Ask for fewer, or exclude=[{stack.name!r}]."
        )
    return number


def find_stacks(
    root: nn.Module,
    call: Callable[[nn.Module], list[Any]],
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
) -> Found:
    """Find the stacks of a model whose blocks may be removed.

    A stack is a ``ModuleList`` or ``Sequential`` of three or more modules of one class whose hidden state keeps its
    shape (the first may change it, and then stays). A block may be removed if removing it is the same as skipping it:
    both are tried.

    Args:
        root: A copy of the model in eval mode, which is called and restored.
        call: Calls it, or a part of it, with example inputs, once or more, and returns each output.
        module: Dotted name of the module to look in; default the whole model.
        include: Names, patterns or classes of exactly the stacks or blocks that may be removed.
        exclude: Those that stay.

    Returns:
        The stacks, by their names in ``root``.

    Raises:
        ValueError: If a pattern matches nothing, or ``include`` names what is no stack.
    """
    containers, stacks, asked, left_out = _candidates(root, module, include, exclude)
    blocks = {f"{name}.{key}": block for name in stacks for key, block in children_of(containers[name]).items()}
    with watching(blocks) as calls:
        call_repeatably(root, call)
    for name in list(stacks):
        problem = _look_at_calls(stacks[name], containers[name], calls)
        if problem is not None:
            left_out[name] = problem
            if name in asked:
                raise ValueError(f"`include` names {name}, whose blocks cannot be removed: {problem}.")
            del stacks[name]
    _keep_outermost(stacks, asked, left_out)
    for stack in stacks.values():
        _try_removal(root, call, stack)
    for name, stack in stacks.items():
        keys = list(children_of(containers[name]))
        left_out |= {f"{name}.{keys[place]}": reason for place, reason in sorted(stack.stay.items())}
    return Found({name: stack for name, stack in stacks.items() if stack.removable}, left_out)


def check_readers(
    root: nn.Module,
    readers: Mapping[str, str],
    module: str | None = None,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
) -> None:
    """Refuse to prune blocks that something beside the model reads, such as the features of a distillation.

    Args:
        root: The model, which is not called.
        readers: Name of a layer -> what reads it.
        module: As for :func:`find_stacks`; so are ``include`` and ``exclude``.
        include: The stacks or blocks that may be removed.
        exclude: Those that stay.

    Raises:
        ValueError: If a layer is in a block that may be removed; the blocks that stay are named.
    """
    containers, stacks, _, _ = _candidates(root, module, include, exclude)
    for layer, reader in readers.items():
        for name, stack in stacks.items():
            keys = list(children_of(containers[name]))
            key = layer.removeprefix(f"{name}.").partition(".")[0]
            if not layer.startswith(f"{name}.") or key not in keys or keys.index(key) in stack.stay:
                continue
            stay = ", ".join(f"{name}.{keys[place]}" for place in stack.stay) or "none for certain"
            raise ValueError(
                f"{reader} names {layer}, in a block that may be removed. Keep that block, "
                f"exclude=['{name}.{key}'], or name one of the blocks of {name} that stay: {stay}. A place from the "
                f"end, such as {name}.-1, is whichever block is there."
            )


def check_left(readers: Mapping[str, str], left: Mapping[str, int]) -> None:
    """Refuse to remove so many blocks that a place from the end, such as ``layers.-4``, no longer exists.

    Args:
        readers: Name of a layer -> what reads it, as for :func:`check_readers`.
        left: Stack -> how many blocks it will have.

    Raises:
        ValueError: If a place will be out of range.
    """
    for layer, reader in readers.items():
        for name, blocks in left.items():
            place = layer.removeprefix(f"{name}.").partition(".")[0]
            if layer.startswith(f"{name}.-") and -int(place) > blocks:
                raise ValueError(
                    f"{reader} names the block at {place} of {name}, of which {blocks} will be left. Name one of the "
                    f"last {blocks}, or remove fewer."
                )


def hidden_states(root: nn.Module, call: Callable[[nn.Module], list[Any]]) -> dict[str, dict[str, Tensor]]:
    """Return the stacks of two or more blocks, in call order, with the hidden state that each block returns.

    Args:
        root: The model in eval mode, which is called once. Nothing is tried, so blocks need not be removable.
        call: Calls it, as for :func:`find_stacks`.

    Returns:
        Stack -> block -> hidden state; blocks that are not called are left out.
    """
    containers, stacks, asked, left_out = _candidates(root, None, None, None, least=2)
    blocks = {f"{name}.{key}": block for name in stacks for key, block in children_of(containers[name]).items()}
    with watching(blocks) as calls:
        call_repeatably(root, call)
    for name in [name for name, stack in stacks.items() if _look_at_calls(stack, containers[name], calls)]:
        del stacks[name]
    _keep_outermost(stacks, asked, left_out)
    states: dict[str, dict[str, Tensor]] = {}
    for name in sorted(stacks, key=lambda name: min(own[0].number for own in _calls_of(name, calls) if own)):
        keys = [f"{name}.{key}" for key in children_of(containers[name]) if calls[f"{name}.{key}"]]
        states[name] = {key: state for key in keys if (state := calls[key][0].hidden_out) is not None}
    return states


def _calls_of(stack: str, calls: Mapping[str, list[Call]]) -> list[list[Call]]:
    return [own for name, own in calls.items() if name.rpartition(".")[0] == stack]


def _candidates(
    root: nn.Module,
    module: str | None,
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
    least: int = LEAST,
) -> tuple[dict[str, nn.Module], dict[str, Stack], set[str], dict[str, str]]:
    """Return what can be told without a call: containers, stacks, those that ``include`` names, and what is left."""
    prefix, target = find_target(root, module)
    containers: dict[str, nn.Module] = {
        name: layer
        for name, layer in named_layers(target, prefix)
        if isinstance(layer, (nn.ModuleList, nn.Sequential)) and len(children_of(layer)) > 1
    }
    problems = {name: _problem(layer, least) for name, layer in containers.items()}
    stacks = {name: Stack(name, len(children_of(layer))) for name, layer in containers.items() if not problems[name]}
    left_out = {name: problem for name, problem in problems.items() if problem.startswith(_REPEATED)}
    asked = _select(stacks, containers, problems, left_out, prefix, include, exclude)
    return containers, stacks, asked, left_out


def _problem(container: nn.Module, least: int) -> str:
    """Return why a container is no stack, as far as it can be seen without calling it; empty if it may be one."""
    blocks = [without_compiler(block) for block in children_of(container).values()]
    classes = dict.fromkeys(own_class(block).__name__ for block in blocks)
    if len({own_class(block) for block in blocks}) > 1:
        return f"its blocks are of different classes ({', '.join(list(classes)[:3])})"
    if len(set(blocks)) < len(blocks):
        return f"{_REPEATED} {next(iter(classes))} several times, so that none leaves with its parameters"
    if len(blocks) < least:
        return f"it has {len(blocks)} blocks, and a stack has {least} or more"
    if not any(True for block in blocks for _ in block.parameters()):
        return "its blocks have no parameters"
    return ""


def _select(
    stacks: dict[str, Stack],
    containers: Mapping[str, nn.Module],
    problems: Mapping[str, str],
    left_out: dict[str, str],
    prefix: str,
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
) -> set[str]:
    """Keep what ``include`` and ``exclude`` select; returns the stacks that are selected by ``include``."""
    selector = Selector(include, exclude, prefix)
    asked: set[str] = set()
    useless: dict[str, str] = {}
    useful: set[str] = set()
    for name, layer in containers.items():
        for place, (key, block) in enumerate(children_of(layer).items()):
            verdict = selector.judge(f"{name}.{key}.weight", without_compiler(block))
            patterns = {str(pattern) for pattern in verdict.included}
            if name not in stacks:
                useless |= dict.fromkeys(patterns, name)
                continue
            useful |= patterns
            if verdict.reason is not None:
                stacks[name].stay[place] = verdict.reason
            elif include is not None:
                asked.add(name)
    selector.check_all_matched([*stacks] or [*containers])
    for pattern in useless.keys() - useful:
        name = useless[pattern]
        raise ValueError(f"`include` names {name}, whose blocks cannot be removed: {problems[name]}.")
    for name in [name for name, stack in stacks.items() if not stack.removable]:
        left_out[name] = stacks.pop(name).stay[0]
    return asked


def _look_at_calls(stack: Stack, container: nn.Module, calls: Mapping[str, list[Call]]) -> str | None:
    """Keep blocks that were not called or change the shape; returns why it is no stack after all."""
    keys = list(children_of(container))
    seen = [calls[f"{stack.name}.{key}"] for key in keys]
    if not any(seen):
        return "the forward pass does not call its blocks with the example inputs"
    for place, own in enumerate(seen):
        if not own:
            stack.stay.setdefault(place, "the forward pass does not call it with the example inputs")
        for call in own:
            if call.hidden_in is None or call.hidden_out is None:
                return f"block {place} takes or returns no tensor as its hidden state"
            if call.hidden_in.shape != call.hidden_out.shape:
                shapes = f"{tuple(call.hidden_out.shape)} for {tuple(call.hidden_in.shape)}"
                if place > 0:
                    return f"block {place} returns another shape than it takes: {shapes}"
                stack.stay.setdefault(place, f"it returns another shape than it takes: {shapes}")
    return None


def _keep_outermost(stacks: dict[str, Stack], asked: set[str], left_out: dict[str, str]) -> None:
    """Leave alone a stack inside of a block of another one, which goes with that block."""
    for name in list(stacks):
        around = [other for other in stacks if name.startswith(f"{other}.")]
        if around and name not in asked:
            left_out[name] = f"it is inside of a block of {around[0]}"
            del stacks[name]


def _try_removal(root: nn.Module, call: Callable[[nn.Module], list[Any]], stack: Stack) -> None:
    """Keep the blocks whose removal is not the same as skipping them: all are tried together, then halves of them."""

    def attempt(places: list[int]) -> None:
        problem = same_as_skipping(root, call, {stack.name: places})
        if problem is None:
            return
        if len(places) == 1:
            stack.stay[places[0]] = problem
            return
        middle = len(places) // 2
        attempt(places[:middle])
        attempt(places[middle:])

    for places in _parts(stack):
        attempt(places)


def _parts(stack: Stack) -> list[list[int]]:
    """Return the blocks to try together: all that may be removed, but for the one that must be left."""
    places = stack.removable
    return [places] if len(places) < stack.blocks else [places[:-1], places[-1:]]
