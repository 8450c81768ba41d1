"""Rotary positions (Su et al. 2021, arXiv:2104.09864), turning halves as GPT-NeoX and Llama do."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from fabric_kernels.attention import rotate as rotate
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from fabric_jax.errors import FabricError, unknown_name

RopeScalingKind = Literal["linear", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies were lowered to lengthen a model's context.

    Attributes:
        kind: ``linear`` divides all of them (Chen et al. 2023, arXiv:2306.15595); ``llama3`` those
            that turn seldom within the original context, as Llama 3.1 does.
        factor: the divisor.
        low_freq_factor: with fewer turns than this in ``original_length`` tokens a frequency is
            divided in full. This and what follows is for ``llama3`` alone.
        high_freq_factor: with more turns than this it stays; in between it is interpolated.
        original_length: the context before, in tokens.
    """

    kind: RopeScalingKind
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_length: int | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that give no frequencies."""
        if self.kind not in get_args(RopeScalingKind):
            raise unknown_name("rope scaling", str(self.kind), get_args(RopeScalingKind))
        own = {
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_length": self.original_length,
        }
        needed = {"factor": self.factor} | (own if self.kind == "llama3" else {})
        for name, value in needed.items():
            if not _is_positive(value):
                raise FabricError(
                    f"rope scaling {self.kind!r}: {name} is out of range",
                    expected="a positive number",
                    found=str(value),
                )
        extra = [name for name, value in own.items() if name not in needed and value is not None]
        if extra:
            raise FabricError(f"rope scaling {self.kind!r} has no {', '.join(extra)}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise FabricError(
                "rope scaling 'llama3' interpolates between two numbers of turns",
                expected="a low_freq_factor below the high_freq_factor",
                found=f"{low} and {high}",
            )

    def apply(self, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
        """The lowered frequencies, radians a token."""
        lowered = frequencies / self.factor
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_length
        if low is None or high is None or length is None:
            return lowered
        turns = length * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - kept) * lowered + kept * frequencies


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> NDArray[np.float32]:
    """``theta^(-2i/head_dim)`` for i below ``head_dim / 2``, lowered by ``scaling``.

    Computed in float64 and rounded once: float32 powers differ between libraries by more than the
    angle at position 4,000 can bear.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    return frequencies.astype(np.float32)


def rotary_angles(
    positions: Int32[Array, "B T"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of ``position · frequency``, float32; see :func:`rotary_frequencies`."""
    frequencies = jnp.asarray(rotary_frequencies(head_dim, theta, scaling))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)
