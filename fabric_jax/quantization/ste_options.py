"""What master weights and their inputs go through in a training forward: one switch a variant."""

from dataclasses import dataclass
from typing import Literal

from fabric_jax.errors import FabricError

GROUP = 128
"""Consecutive inputs that share a scale under ``weight_scale`` ``group``."""


@dataclass(frozen=True, kw_only=True)
class SteOptions:
    """Variants of straight-through training; the defaults are BitNet b1.58's (arXiv:2402.17764).

    Attributes:
        weights: ``ternary`` by absmean, or ``none``: plain weights, which are what a ternary model
            is compared with.
        weight_scale: weights that share an absmean: the ``tensor`` (b1.58), a ``channel``, which is
            an output (as in TernaryLLM, Chen et al. 2024, arXiv:2406.07177), or a ``group`` of 128
            inputs of an output (as in Spectra, Kaushal et al. 2024, arXiv:2407.12327, for its
            quantised baselines).
        weight_gradient: what passes the rounding backward: ``identity`` (the authors' code, no
            mask), or ``clipped``: nothing where ``|W| > scale`` (Courbariaux et al. 2016,
            arXiv:1602.02830, equation 4).
        weight_rounding: ``nearest``, or ``stochastic``: up with the probability of the remainder
            (Gupta et al. 2015, arXiv:1502.02551; for ternary weights "ternary connect", Lin et al.
            2016, arXiv:1510.03009), in training steps alone.
        activations: ``int8``: every input per token as ``act_quant`` says. ``int4-hybrid``: BitNet
            a4.8 (Wang et al. 2024, arXiv:2411.04965): int4 by absmean for q, k, v, gate and up;
            int8 for o, of which the half with the largest magnitude is kept, and for down.
        hadamard: rotate the inputs of o and down before their quantiser (BitNet v2, Wang et al.
            2025, arXiv:2504.18415).
        product: how codes are multiplied, with the same results to the last bit: ``float`` (in the
            dtype of activations, summed in float32, exact for sums below 2^24), ``int8``, or
            ``packed``: weights are packed to two bits in every forward pass, and multiplied by
            what multiplies packed weights on the device (``DecoderOptions.implementation``), both
            ways; as ``int8`` where weights are cut along a mesh, while a run is quantised ever
            more, and under ``remat int8-residuals``.
    """

    weights: Literal["ternary", "none"] = "ternary"
    weight_scale: Literal["tensor", "channel", "group"] = "tensor"
    weight_gradient: Literal["identity", "clipped"] = "identity"
    weight_rounding: Literal["nearest", "stochastic"] = "nearest"
    activations: Literal["int8", "int4-hybrid"] = "int8"
    hadamard: bool = False
    product: Literal["float", "int8", "packed"] = "float"

    def __post_init__(self) -> None:
        """Refuses combinations that mean nothing."""
        ternary = (self.weight_scale, self.weight_gradient, self.weight_rounding, self.activations)
        own = ternary == ("tensor", "identity", "nearest", "int8") and not self.hadamard
        if self.weights == "none" and not own:
            raise FabricError(
                "weights that are not quantised have no variants of their quantiser",
                expected="weights ternary",
                found="weights none",
            )
        if self.product == "packed" and self.weight_scale != "tensor":
            raise FabricError(
                "packed weights have one scale a matrix",
                expected="weight_scale tensor with product packed",
                found=f"weight_scale {self.weight_scale}",
            )

    @property
    def beyond_packed(self) -> tuple[str, ...]:
        """What a packed model of codes, one scale a matrix and int8 activations can't compute."""
        found: list[str] = []
        if self.weights == "none":
            found.append("weights that are not ternary")
        if self.weight_scale != "tensor":
            found.append(f"a weight scale for each {self.weight_scale}")
        if self.activations != "int8":
            found.append(f"{self.activations} activations")
        if self.hadamard:
            found.append("an online Hadamard transform")
        return tuple(found)


def check_packable(ste: SteOptions, name: str) -> None:
    """Refuses to pack a model whose training forward packed weights can't repeat.

    Raises:
        FabricError: names what is in the way.
    """
    if ste.beyond_packed:
        raise FabricError(
            f"{name} was trained with {' and '.join(ste.beyond_packed)}, which packed weights "
            "can't express",
            expected="one absmean scale a matrix and int8 activations per token",
            fix="Its master weights stay usable in the run that trained them; train without that "
            "variant for a model that packs",
        )
