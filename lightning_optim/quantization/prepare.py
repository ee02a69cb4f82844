"""Selects the layers to quantize, and replaces their classes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.parametrize import is_parametrized

from lightning_optim.checkpoint import plan_of
from lightning_optim.modules import CONVOLUTIONS, CONVOLVING, EMBEDDINGS, RECURRENT, Conv1D, Experts
from lightning_optim.patterns import NOT_INCLUDED, Pattern, Selector, shown
from lightning_optim.quantization.attention import QuantizedMultiheadAttention
from lightning_optim.quantization.classes import QUANTIZED
from lightning_optim.quantization.experts import QuantizedExperts
from lightning_optim.quantization.functions import QuantizedFunctions, forget_operands
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import ATTRIBUTES, PHASES, QuantizedConv1D, QuantizedLayer
from lightning_optim.quantization.learned import (
    INPUT_STEP,
    OFFSET,
    WEIGHT_STEP,
    add_input_step,
    add_weight_step,
    remove_steps,
)
from lightning_optim.quantization.paths import relative_path
from lightning_optim.quantization.ranges import write_scales
from lightning_optim.quantization.rows import rounded_names
from lightning_optim.quantization.scheme import QuantizationScheme
from lightning_optim.sharding import own_class, set_class
from lightning_optim.target import named_layers

__all__ = [
    "QuantizedLayers",
    "drop_outputs",
    "prepare",
    "quantized_layers",
    "select_layers",
    "set_phase",
    "set_phases",
]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FROM: dict[type[nn.Module], type[nn.Module]] = {
    **{cls: cls for cls in QUANTIZED if cls not in _BATCH_NORMS},
    **{quantized: cls for cls, quantized in QUANTIZED.items() if cls not in _BATCH_NORMS},
}
"""Class of a layer, float or quantized -> its float class."""

# Layers with matrices that stay float, and why; the first match counts.
_WHY_FLOAT: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.MultiheadAttention,), "a subclass of MultiheadAttention, whose own forward is unknown"),
    (RECURRENT, "a recurrent layer that is no nn.LSTM and no nn.GRU"),
    ((nn.Bilinear,), "a bilinear layer: no integer kernels to export to"),
)


@dataclass(frozen=True)
class QuantizedLayers:
    """The layers to quantize, by name as in ``state_dict()``, and all other layers with parameters and why not."""

    chosen: dict[str, nn.Module]
    left_out: dict[str, str]


def select_layers(
    target: nn.Module,
    prefix: str = "",
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
    root: nn.Module | None = None,
) -> QuantizedLayers:
    """Select the layers to quantize: by default every one that can be, including embeddings and the last layer.

    A weight shared by several layers is quantized in all of them or in none.

    Args:
        target: The module whose layers are selected.
        prefix: Prefix of its names in the LightningModule's ``state_dict()``.
        include: Exactly the layers to quantize: names, glob patterns, layer classes.
        exclude: Layers that stay float; it takes precedence.
        root: The whole module, in which other layers may share the target's weights; default the target.

    Raises:
        ValueError: If a pattern matches nothing, a layer named by ``include`` cannot be quantized, or a layer is lazy.
    """
    chosen: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    named: set[str] = set()
    refused: dict[Pattern, list[str]] = {}
    served: set[Pattern] = set()
    selector = Selector(include, exclude, prefix)
    names = []
    for name, layer in named_layers(target, prefix):
        if not any(True for _ in layer.parameters(recurse=False)) and not is_parametrized(layer):
            continue
        names.append(name)
        verdict = selector.judge(f"{name}.weight", layer)
        asked, why_not = verdict.included, _why_float(layer)
        if asked:
            named.add(name)
        if why_not is None or verdict.reason is not None:
            served.update(asked)
        for pattern in asked:
            refused.setdefault(pattern, []).append(f"{name} ({why_not})")
        if verdict.reason is not None:
            left_out[name] = f"{verdict.reason}{_from_before(layer)}"
        elif why_not is None:
            chosen[name] = layer
        elif (asked and _has_matrix(layer)) or why_not == "lazy":
            raise _cannot(name, layer, why_not)
        else:
            left_out[name] = why_not
    _settle_attention(target, prefix, chosen, left_out, named)
    selector.check_all_matched(names)
    for pattern in include or ():
        if pattern not in served:
            raise ValueError(
                f"include: {shown(pattern)} matches only layers that cannot be quantized: "
                f"{', '.join(refused[pattern][:5])}. Remove it from `include`."
            )
    return _settle_shared(target if root is None else root, QuantizedLayers(chosen, left_out), named)


def _settle_attention(
    target: nn.Module, prefix: str, chosen: dict[str, nn.Module], left_out: dict[str, str], named: Collection[str]
) -> None:
    """Leave output projections float where their attention is: it does not call them then.

    Raises:
        ValueError: If ``include`` names such a projection.
    """
    for name, attention in named_layers(target, prefix):
        projection = f"{name}.out_proj".lstrip(".")
        if not isinstance(attention, nn.MultiheadAttention) or projection not in chosen:
            continue
        if name in chosen or isinstance(attention, QuantizedMultiheadAttention):
            continue
        reason = f"the attention {name} stays float, which computes it in one function with its own projections"
        if projection in named:
            raise _cannot(projection, chosen[projection], reason)
        del chosen[projection]
        left_out[projection] = reason


def _cannot(name: str, layer: nn.Module, why_not: str) -> ValueError:
    return ValueError(
        f"{name} ({type(layer).__name__}) cannot be quantized: {_sentence(why_not)} Pass exclude=[{name!r}]."
    )


def _settle_shared(root: nn.Module, selection: QuantizedLayers, named: Collection[str]) -> QuantizedLayers:
    """Quantize a weight shared by several layers in all of them, or in none: a file holds it once.

    Raises:
        ValueError: If a layer named by ``include`` shares its weight with a layer that stays float.
    """
    chosen, left_out = dict(selection.chosen), dict(selection.left_out)
    holders = _holders(root)
    for name, layer in selection.chosen.items():
        for holder, other in (pair for weight in _rounded(layer) for pair in holders.get(id(weight), ())):
            if other is layer or other in chosen.values() or name not in chosen or _from_before(other):
                continue
            reason = _why_float(other) or left_out.get(holder, "it is outside the quantized module")
            if reason == NOT_INCLUDED:
                chosen[holder] = other
                del left_out[holder]
                continue
            shared = f"shares its weight with {holder or type(other).__name__}, which stays float ({reason})"
            if name in named:
                raise _cannot(name, layer, f"it {shared}")
            del chosen[name]
            left_out[name] = shared
    return QuantizedLayers(chosen, left_out)


def _rounded(layer: nn.Module) -> list[nn.Parameter | None]:
    """Return the parameters that are rounded in a layer."""
    return [layer._parameters[name] for name in rounded_names(layer)]


def _holders(root: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the modules that hold each parameter, by the parameter's identity."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in named_layers(root):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module))
    return holders


def _from_before(layer: nn.Module) -> str:
    rounds = isinstance(layer, QuantizedLayer) and layer.quantization_phase in ("fake_quantize", "frozen")
    return ", and stays quantized as before" if rounds else ""


def _sentence(why_not: str) -> str:
    if why_not == "lazy":
        return "it is lazy (uninitialized); run one forward pass before fit."
    return f"{why_not}."


def _why_float(layer: nn.Module) -> str | None:
    """Return why a layer stays float; None if it can be quantized."""
    if any(isinstance(parameter, UninitializedTensorMixin) for parameter in layer.parameters(recurse=False)):
        return "lazy"
    if is_parametrized(layer):
        return "its weight is computed by a parametrization"
    if own_class(layer) in _FROM or _quantized_class(layer) is not None:
        is_float = all(weight is not None and weight.is_floating_point() for weight in _rounded(layer))
        return None if is_float else "its weight is not a floating-point Parameter"
    for classes, reason in _WHY_FLOAT:
        if isinstance(layer, classes):
            return reason
    known = next((cls for cls in _FROM if isinstance(layer, cls)), None)
    if known is not None:
        return f"a subclass of {known.__name__}, whose own forward is unknown"
    return f"{own_class(layer).__name__} stays float"


def _quantized_class(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class that quantizes a float layer of exactly this class; None if there is none."""
    own = own_class(layer)
    if isinstance(layer, Experts):
        return QuantizedExperts.over(layer)
    if isinstance(layer, Conv1D) and own.__name__ in ("Conv1D", "QuantizedConv1D"):
        return QuantizedConv1D.over(layer)
    return None if own in _BATCH_NORMS else QUANTIZED.get(own)


def _has_matrix(layer: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False)) or is_parametrized(layer)


def prepare(
    root: nn.Module,
    names: Iterable[str],
    scheme: QuantizationScheme,
    prefix: str = "",
    facts: GraphFacts | None = None,
) -> None:
    """Replace the classes of layers, in phase "off"; layers that are quantized already keep their phase and ranges.

    Args:
        root: The module that names refer to: a LightningModule or an averaged copy of it.
        names: Layers to quantize.
        scheme: How to quantize them.
        prefix: Prefix of the target's names.
        facts: What the graph tells: which outputs are quantized too, and which functions round their operands.
    """
    plan, shared = plan_of(root), _shared_weights(root) if scheme.learns else set()
    for name, encoder in root.named_modules():
        for attribute in _fast_path(encoder):
            plan.track(name, attribute)
    for name in names:
        _give_steps(_swap(root, name, scheme, prefix), scheme, shared)
    if facts is None:
        return
    for name, relu in facts.outputs.items():
        layer = _swap(root, name, scheme, prefix)
        if not layer.quantizes_output:
            layer.quantizes_output, layer.output_relu = True, relu
            layer.watch("output")
    for name, functions in facts.functions.items():
        _hold_functions(root, name, scheme, functions, facts.function_calls[name])
    for name, norm in facts.batch_norms.items():
        product = root.get_submodule(name)
        assert isinstance(product, QuantizedLayer)  # noqa: S101 - only quantized layers are looked at
        product.folded_norm = relative_path(name, norm)
        product.connect(root, name)


def _hold_functions(
    root: nn.Module, name: str, scheme: QuantizationScheme, functions: tuple[str, ...], calls: int
) -> None:
    """Let a module hold the ranges of functions that its forward calls."""
    module = root.get_submodule(name)
    if not isinstance(module, QuantizedFunctions):
        plan_of(root).track(name, *ATTRIBUTES, "functions", "function_calls")
        set_class(module, QuantizedFunctions.over(module))
        module = root.get_submodule(name)
        assert isinstance(module, QuantizedFunctions)  # noqa: S101 - after the line before
        module.quantization_phase = module.output_phase = "off"
        module.weight_bits, module.weight_granularity, module.output_relu = None, scheme.weight_granularity, False
        module.observer = scheme.observer
    before = module.activation_ranges
    module.activation_bits, module.quantizes_output = scheme.activation_bits, True
    module.activation_ranges = scheme.activation_ranges
    module.functions, module.function_calls = functions, calls
    if module.observer != scheme.observer:
        module.observer, module.output_phase = scheme.observer, "off"
        forget_operands(module, keep=())
    forget_operands(module, keep=module.watched)
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    for which in module.watched:
        if f"{which}_scale" not in module._buffers:
            module.watch(which, device)
    if module.activation_ranges != before:
        write_scales([module.state_of(which) for which in module.watched], module)


def drop_outputs(root: nn.Module, chosen: Collection[str]) -> None:
    """Remove the ranges of outputs if all convolutions are among the chosen ones: their inputs become float."""
    layers = quantized_layers(root)
    others = [n for n, layer in layers.items() if isinstance(layer, CONVOLVING) and layer.watched and n not in chosen]
    for layer in layers.values() if not others else ():
        if layer.quantizes_output:
            layer.quantizes_output, layer.output_phase = False, "off"
            if isinstance(layer, QuantizedFunctions):
                layer.functions = ()
                forget_operands(layer, keep=())
            else:
                for name in [name for name in layer._buffers if name.startswith("output_")]:
                    del layer._buffers[name]


def _swap(root: nn.Module, name: str, scheme: QuantizationScheme, prefix: str) -> QuantizedLayer:
    layer = root.get_submodule(name)
    if not isinstance(layer, QuantizedLayer):
        plan_of(root).track(name, *ATTRIBUTES)
        set_class(layer, _quantized_class(layer) or QUANTIZED[own_class(layer)])
        layer = root.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)  # noqa: S101 - after the line before
        layer.quantization_phase = layer.output_phase = "off"
        layer.quantizes_output = layer.output_relu = False
        layer.observer = scheme.observer
    has_weight = not isinstance(layer, _BATCH_NORMS)
    layer.weight_bits = scheme.bits_of(name, layer, prefix) if has_weight else None
    layer.weight_granularity = scheme.weight_granularity
    before = getattr(layer, "activation_bits", scheme.activation_bits), layer.activation_ranges
    without = (*EMBEDDINGS, *RECURRENT, Experts) + (() if scheme.observes else (*CONVOLVING, *_BATCH_NORMS))
    layer.activation_bits = None if isinstance(layer, without) else scheme.activation_bits
    layer.activation_ranges = "static" if layer.activation_bits is None else scheme.activation_ranges
    if layer.activation_bits is not None and before != (layer.activation_bits, layer.activation_ranges):
        write_scales([layer.state_of(which) for which in layer.watched], layer)
    _watch_anew(layer, scheme, has_weight)
    return layer


def _watch_anew(layer: QuantizedLayer, scheme: QuantizationScheme, has_weight: bool) -> None:
    """Create the ranges that the scheme needs; a range gathered by another observer is of no use."""
    if layer.observer != scheme.observer:
        layer.observer = scheme.observer
        if layer.watched:
            layer.quantization_phase = layer.output_phase = "off"
        for which in layer.watched:
            layer.watch(which)
    if layer.activation_bits is None or layer.activation_ranges == "dynamic":
        layer.quantizes_output, ranges = False, (*layer.operands, "output")
        for name in [name for name in layer._buffers if name.startswith(tuple(f"{which}_" for which in ranges))]:
            del layer._buffers[name]
    elif has_weight and not layer.rounds_operands:
        for which in layer.operands:
            layer.watch(which)
        layer.quantization_phase = "off"  # until its range is known


LEARN_WEIGHTS = (nn.Linear, *CONVOLUTIONS, QuantizedConv1D)
"""Layers whose weights have trained steps: a table has a step for each row, few of which a batch reads."""


def _shared_weights(root: nn.Module) -> set[int]:
    """Return the weights that several layers share, by identity: a file holds each once, with one scale."""
    return {key for key, held in _holders(root).items() if len({id(layer) for _, layer in held}) > 1}


def _give_steps(layer: QuantizedLayer, scheme: QuantizationScheme, shared: Collection[int]) -> None:
    """Give a layer the parameters of trained steps that it is to have, and remove others."""
    weight = layer._parameters.get("weight")
    if scheme.learns and isinstance(layer, LEARN_WEIGHTS) and id(weight) not in shared:
        add_weight_step(layer, layer._rows(), scheme.weight_granularity)
    else:
        remove_steps(layer, (WEIGHT_STEP,))
    if scheme.learns and "input" in layer.watched and weight is not None:
        add_input_step(layer, weight, offset=layer.activation_ranges != "symmetric")
    else:
        remove_steps(layer, (INPUT_STEP, OFFSET))


def _fast_path(layer: nn.Module) -> dict[str, int | bool]:
    """Return the attributes that turn off PyTorch's fused inference path, which bypasses the layers inside."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        return {"activation_relu_or_gelu": 0}
    if isinstance(layer, nn.TransformerEncoder):
        return {"use_nested_tensor": False}
    return {}


def quantized_layers(root: nn.Module, prefix: str = "") -> dict[str, QuantizedLayer]:
    """Return the quantized layers below a module by name, in order."""
    return {
        name: layer
        for name, layer in root.named_modules(prefix=prefix.rstrip("."))
        if isinstance(layer, QuantizedLayer)
    }


def set_phase(root: nn.Module, layers: Mapping[str, QuantizedLayer], phase: str) -> None:
    """Put layers into a phase.

    Args:
        root: The module that holds them; its fused inference paths are turned off if weights are rounded.
        layers: The layers by name.
        phase: One of ``PHASES``. An output whose range is unknown is observed first.
    """
    if phase not in PHASES:
        raise ValueError(f"`phase` must be one of {', '.join(PHASES)}, got {phase!r}.")
    rounds = phase in ("fake_quantize", "frozen")
    for layer in layers.values():
        layer.quantization_phase = phase
        layer.observing = layer.observing and phase in ("observe", "fake_quantize")
        if layer.quantizes_output:
            outputs = [layer.state_of(which) for which in layer.watched if which not in layer.operands]
            unknown = rounds and any(int(state["batches"]) == 0 for state in outputs)
            layer.output_phase = "observe" if unknown else phase
    if rounds:
        for module in root.modules():
            for attribute, value in _fast_path(module).items():
                setattr(module, attribute, value)


def set_phases(root: nn.Module, wanted: Mapping[str, str]) -> None:
    """Put layers into phases: name -> phase, by :func:`set_phase`."""
    layers = quantized_layers(root)
    for phase in dict.fromkeys(wanted.values()):
        set_phase(root, {name: layers[name] for name in wanted if wanted[name] == phase}, phase)
