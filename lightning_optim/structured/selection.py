"""Which layers' channels may leave."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_optim.modules import NORMS, RECURRENT
from lightning_optim.target import Pattern, select_weights

__all__ = ["refuse_shared", "select_roots"]


def refuse_shared(whole: nn.Module, target: nn.Module, prefix: str) -> None:
    """Refuse a target that shares a parameter with layers outside it: they would be torn apart.

    Raises:
        ValueError: Naming both.
    """
    inside = {parameter: name for name, parameter in target.named_parameters(remove_duplicate=False)}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        if not name.startswith(prefix) and parameter in inside:
            raise ValueError(
                f"{prefix}{inside[parameter]} is shared with {name}, outside the module to prune, and would be torn "
                "from it. Prune a module that holds both."
            )


def select_roots(
    target: nn.Module,
    prefix: str = "",
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] | None = None,
) -> tuple[set[str], dict[str, str]]:
    """Return the layers whose outputs may leave, and the others that must be left alone with the reason.

    Args:
        target: The module to prune.
        prefix: What its names begin with in the LightningModule.
        include: Exactly these layers instead of the default: all but embeddings and the last Linear/Conv.
        exclude: Layers whose outputs stay.

    Returns:
        Names below the target. Attention, recurrent and parametrized layers are left alone always.
    """
    selection = select_weights(target, prefix, include=include, exclude=exclude)
    chosen = {name.removeprefix(prefix).rpartition(".")[0] for name in selection.chosen}
    left_alone: dict[str, str] = {}
    for name, layer in target.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            left_alone |= dict.fromkeys((name, f"{name}.out_proj"), "nn.MultiheadAttention would be scrambled")
        elif isinstance(layer, RECURRENT):
            left_alone[name] = f"{type(layer).__name__} cannot lose channels"
    for parameter, reason in selection.left_out.items():
        name, _, leaf = parameter.removeprefix(prefix).rpartition(".")
        if leaf == "weight" and name not in chosen and _has_channels(target.get_submodule(name)):
            left_alone.setdefault(name, reason)
    return chosen - left_alone.keys(), left_alone


def _has_channels(layer: nn.Module) -> bool:
    """Norms and activations follow the layers before them; embeddings and others decide for themselves."""
    weight = getattr(layer, "weight", None)
    one_a_channel = isinstance(weight, Tensor) and weight.ndim < 2  # a norm of one's own
    return not isinstance(layer, (*NORMS, nn.PReLU)) and not one_a_channel
