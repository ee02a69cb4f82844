"""How layers are quantized: the arguments that post-training quantization and training share, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_optim.checks import check_mapping
from lightning_optim.functional.fake_quantize import integer_range, parse_weight_granularity
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.patterns import Pattern, check_pattern, first_match, matches, shown

__all__ = ["QuantizationScheme"]

ACTIVATION_RANGES = ("static", "symmetric", "dynamic")


@dataclass(frozen=True)
class QuantizationScheme:
    """How layers are quantized; checked when it is created.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, or None: weights only.
        weight_granularity: "per_channel", "per_tensor" or "per_group:32".
        observer: Name in ``functional.observers.OBSERVERS``.
        activation_ranges: "static": observed; "symmetric": observed, with zero in the middle; "dynamic": each call's
            own, for Linear layers.
        bits: Weight bits by pattern; the first match counts.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    weight_granularity: str = "per_channel"
    observer: str = "moving_average"
    bits: Mapping[Pattern, int] = field(default_factory=dict)
    activation_ranges: str = "static"

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            _check_bits("activation_bits", self.activation_bits)
        check_mapping("bits", self.bits, "names or glob patterns to bits")
        object.__setattr__(self, "bits", dict(self.bits))  # the caller may change its own
        for pattern, bits in self.bits.items():
            check_pattern("bits", pattern)
            _check_bits(f"bits[{shown(pattern)}]", bits)
        parse_weight_granularity(self.weight_granularity)
        if not isinstance(self.observer, str):
            raise TypeError(
                f"`observer` must be a registered name ({', '.join(sorted(OBSERVERS))}), which files refer to; got "
                f"{self.observer!r}. Register your own with @OBSERVERS.register('name')."
            )
        OBSERVERS.resolve(self.observer)
        if self.activation_ranges not in ACTIVATION_RANGES:
            raise ValueError(
                f"`activation_ranges` must be one of {', '.join(map(repr, ACTIVATION_RANGES))}, got "
                f"{self.activation_ranges!r}."
            )
        if self.activation_ranges == "dynamic":
            self._check_dynamic()
        if self.activation_ranges == "symmetric" and self.activation_bits != 8:
            raise ValueError(
                '`activation_ranges="symmetric"` rounds inputs to int8 without zero points, for engines that have only '
                f"these, got activation_bits={self.activation_bits!r}. Take activation_bits=8, or leave the ranges out."
            )
        if self.learns and self.weight_granularity.startswith("per_group"):
            raise ValueError(
                f"observer='learned' trains a step per channel or per tensor, got weight_granularity="
                f"{self.weight_granularity!r}: files hold the scales of groups as float16 numbers that the weights "
                "give. Take 'per_channel', or another observer."
            )

    @property
    def learns(self) -> bool:
        """Whether steps are trained."""
        return OBSERVERS[self.observer].learns

    def _check_dynamic(self) -> None:
        """Raise if an argument has no meaning where each call's own range is used."""
        dynamic = '`activation_ranges="dynamic"`'
        if self.activation_bits is None:
            raise ValueError(f"{dynamic} needs `activation_bits=8`; with None activations are float and have no range.")
        if self.activation_bits != 8:
            raise ValueError(
                f"{dynamic} rounds inputs to 8 bits, as engines do, got activation_bits={self.activation_bits!r}."
            )
        if self.weight_granularity.startswith("per_group"):
            raise ValueError(
                f"{dynamic} multiplies integers with one scale per output, got weight_granularity="
                f"{self.weight_granularity!r}. For groups pass activation_bits=None: engines that multiply groups "
                "round the inputs themselves."
            )
        if self.observer != QuantizationScheme.observer:
            raise ValueError(f"{dynamic} observes nothing, got observer={self.observer!r}. Leave it out.")

    @property
    def observes(self) -> bool:
        """Whether ranges of activations are observed."""
        return self.activation_bits is not None and self.activation_ranges != "dynamic"

    def bits_of(self, name: str, layer: nn.Module, prefix: str) -> int:
        """Return the weight bits of a layer."""
        pattern = first_match(self.bits, f"{name}.weight", layer, prefix)
        return self.weight_bits if pattern is None else self.bits[pattern]

    def check_patterns(self, chosen: Mapping[str, nn.Module], prefix: str) -> None:
        """Raise if nothing is selected, or a pattern of ``bits`` matches no quantized layer."""
        if not chosen:
            raise ValueError("no layer is selected to be quantized. Name the layers with include=[...].")
        for pattern in self.bits:
            if not any(matches(pattern, f"{name}.weight", layer, prefix) for name, layer in chosen.items()):
                raise ValueError(
                    f"bits: {shown(pattern)} matches no layer that is quantized. Quantized: "
                    f"{', '.join(list(chosen)[:8])}."
                )


def _check_bits(argument: str, bits: object) -> None:
    try:
        integer_range(bits, symmetric=True)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(
            f"`{argument}` must be a whole number of bits from 2 to 8, got {bits!r}. Exclude layers to keep them float."
        ) from None
