"""Which values of a graph are integers in an engine: those made by integer kernels and read by ones that round.

Between the two stand operations that leave values as they are, or choose among them (ReLU, a pooling by maximum, a
concatenation): rounding before and after them is the same. An addition, a product or an activation whose operands
all come from integer kernels rounds its operands, and so is an integer kernel itself.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_optim._upstream import OpOverload
from lightning_optim.quantization.functions import OPERANDS

__all__ = ["Readers", "integer_functions"]

_SAME = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "t", "contiguous", "clone",
         "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "unflatten", "_unsafe_view")  # fmt: skip
"""Operators that leave all values as they are, in eval mode."""

_CHOOSE = ("relu", "relu6", "hardtanh", "cat", "max_pool1d", "max_pool2d", "max_pool3d", "slice", "select", "chunk",
           "split", "split_with_sizes", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")  # fmt: skip
"""Operators whose results are some of their operands' values."""

_Ends = Iterator[tuple[Any, tuple[Any, ...]]]


class Readers:
    """A graph's nodes, and who reads what.

    Args:
        nodes: The nodes in order; ``meta["layer"]`` is the module that creates a node.
        layers: Names of the layers whose input is quantized.
        calls: How often each layer is called.
        made: Last node of each integer convolution or matrix product -> its layer.
    """

    def __init__(
        self, nodes: Sequence[Any], layers: Collection[str], calls: Mapping[str, int], made: Mapping[Any, str]
    ) -> None:
        self._layers, self._calls, self._made = layers, calls, made
        self._order = {node: place for place, node in enumerate(nodes)}
        self._marks = {node: node.args[0] for node in nodes if operator_of(node) == "named"}
        self.functions: dict[Any, str] = {made: str(mark.args[1]) for mark, made in self._marks.items()}
        """Node of a function with a name -> its name, after that of its module and a colon."""

    def users(self, node: Any) -> list[Any]:
        """Return the nodes that read a node's result."""
        named = [user for mark in node.users if mark in self._marks for user in mark.users]
        return [*(user for user in node.users if user not in self._marks), *named]

    def read_by(self, node: Any) -> list[Any]:
        """Return the nodes whose results a node reads."""
        return [self._marks.get(read, read) for read in node.all_input_nodes]

    def operands(self, function: Any) -> list[Any]:
        """Return the operands of a function with a name; none if they are not all tensors, or still read as they were.

        A function in place changes its operand, of which a rounded copy is made: nothing may read it afterwards.
        """
        count = len(OPERANDS[kind_of(self.functions[function])])
        operands = [self._marks.get(argument, argument) for argument in function.args[:count]]
        if len(operands) < count or any(operand not in self._order for operand in operands):
            return []
        if function.kwargs.get("alpha", 1) != 1 or (len(function.args) > count and count > 1):
            return []
        in_place = str(function.target.name()).partition(".")[0].endswith("_")
        # Who reads the operand afterwards reads the function's node, by another way than its name.
        later = (*(user for user in function.users if user not in self._marks), *self._after(operands[0], function))
        return [] if in_place and later else operands

    def _after(self, operand: Any, function: Any) -> list[Any]:
        return [user for user in self.users(operand) if self._order[user] > self._order[function]]

    def is_integer(self, node: Any) -> bool:
        """Whether a node's values come from integer kernels only."""
        if node in self._made or node in self.functions:
            return True
        read = self.read_by(node)
        return operator_of(node) in (*_SAME, *_CHOOSE) and bool(read) and all(map(self.is_integer, read))

    def is_read_elsewhere(self, node: Any) -> bool:
        """Whether a node's result is rounded by its readers in different ways, or by some of them not at all.

        A result that is only returned is not rounded.
        """
        ends = list(self._ends(node, ()))
        if self.is_returned(node):
            return False
        one_way = len({path for _, path in ends}) == 1 and (len(ends) == 1 or all(self._alone(end) for end, _ in ends))
        return not one_way or not all(self._rounds(end) for end, _ in ends)

    def is_returned(self, node: Any) -> bool:
        """Whether a node's result is returned, and read by nothing else."""
        return all(end.op == "output" for end, _ in self._ends(node, ()))

    def _ends(self, node: Any, path: tuple[Any, ...]) -> _Ends:
        """Yield those who read a node's result, each with the choices among its values on the way there."""
        for user in self.users(node):
            operator = operator_of(user)
            if self._rounds(user) or operator not in (*_SAME, *_CHOOSE):
                yield user, path
            else:
                yield from self._ends(user, path if operator in _SAME else (*path, user))

    def _rounds(self, node: Any) -> bool:
        return node in self.functions or node.meta.get("layer", "") in self._layers

    def _alone(self, node: Any) -> bool:
        """Whether a reader's range is that of this one call."""
        if node in self.functions:
            return Counter(self.functions.values())[self.functions[node]] == 1
        return self._calls.get(node.meta.get("layer", ""), 1) == 1


def operator_of(node: Any) -> str:
    """Return a node's operator without namespace, overload and the underscore of an in-place one."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return str(node.target.name()).partition("::")[2].partition(".")[0].rstrip("_")  # type: ignore[no-untyped-call]
    return "split" if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" else ""


def kind_of(name: str) -> str:
    """Return the kind of a function by its name."""
    return name.rpartition(":")[2].rpartition("_")[0]


def integer_functions(graph: Readers, calls: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the functions whose operands are all integers, by the module that calls them.

    Functions drop out until none is left whose operands depend on one that has dropped out. One that is called several
    times, because its module is, has integers in all of these calls.

    Args:
        graph: The graph; those of its functions that do not qualify are removed from it.
        calls: How many functions with a name each module calls in its forward; -1 for one that cannot hold ranges.
    """
    while failing := {
        name
        for function, name in graph.functions.items()
        if calls[name.rpartition(":")[0]] < 0 or not _all_integers(graph, graph.operands(function))
    }:
        for function in [function for function, name in graph.functions.items() if name in failing]:
            del graph.functions[function]
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(graph.functions.values()):
        owner, _, function = name.rpartition(":")
        found[owner] = (*found.get(owner, ()), function)
    return found


def _all_integers(graph: Readers, operands: Iterable[Any]) -> bool:
    read = list(operands)
    return bool(read) and all(map(graph.is_integer, read))
