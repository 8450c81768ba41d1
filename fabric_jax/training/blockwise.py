"""Adam with moments of 8 bits, each block of elements on a scale of its own.

Block-wise dynamic quantisation is that of Dettmers et al. 2022 (arXiv:2110.02861): the elements of
a moment are divided by the largest magnitude in their block, and the quotient becomes the nearest
of 256 values that lie close together near zero. Two moments take 2.03 bytes a parameter instead
of 8.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jaxtyping import Array, Float32, Int32, UInt8

BLOCK = 256
"""Elements that share a scale. The paper has 2048; smaller blocks keep outliers from fewer."""
DECADES = 7


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockwiseMoment:
    """One moment of one leaf.

    Attributes:
        codes: indices into :func:`dynamic_map`, [blocks, 256] or, for leaves with a layer axis,
            [L, blocks, 256]; the tail of the last block is padding.
        absmax: the largest magnitude in each block.
    """

    codes: UInt8[Array, "*layers blocks 256"]
    absmax: Float32[Array, "*layers blocks"]


class Adam8bitState(NamedTuple):
    """State of :func:`scale_by_adam_8bit`.

    Attributes:
        count: steps done.
        mu: first moments, a :class:`BlockwiseMoment` for each leaf.
        nu: second moments, likewise.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any


def dynamic_map(*, signed: bool) -> npt.NDArray[np.float32]:
    """The 256 values of dynamic tree quantisation, ascending, float32.

    They are 0, 1, and in each decade 10^(e-1) to 10^e, for e from -6 to 0, the midpoints of
    2^(e + 6) equal parts and their negatives; there is no -1. Without sign there are twice as many
    parts: the bit of the sign goes to the fraction.
    """
    values = [0.0, 1.0]
    for index in range(DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (index if signed else index + 1) + 1)
        midpoints = 10.0 ** (index - DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        values += [*midpoints, *(-midpoints if signed else ())]
    return np.sort(np.asarray(values)).astype(np.float32)


def quantize_blocks(x: Float32[Array, "..."], *, signed: bool) -> BlockwiseMoment:
    """The nearest values of the map, relative to the largest magnitude of each block of 256.

    Without sign only zero becomes zero: what is nearer to it than to the smallest value becomes
    that value. A second moment of zero beside a first one that isn't would divide by epsilon, and
    rounding to nearest gets there easily: a thousandth of the block's largest gradient is a
    millionth in the second moment (the zero-point problem of Li et al. 2023, arXiv:2309.01507).
    A second moment that is too large only makes the step smaller.

    Args:
        x: any shape. With 3 axes or more, the first one is of layers, and no block crosses them.
        signed: which map; without sign no element may be negative.
    """
    layers, size, blocks = _block_shape(x.shape)
    flat = x.reshape(*layers, size)
    flat = jnp.pad(flat, [(0, 0)] * len(layers) + [(0, blocks * BLOCK - size)])
    values = flat.reshape(*layers, blocks, BLOCK)
    absmax = jnp.max(jnp.abs(values), axis=-1)
    relative = values / jnp.where(absmax == 0, 1.0, absmax)[..., None]
    # Unrolled, the eight comparisons of the search are fused into one pass.
    codes = jnp.searchsorted(jnp.asarray(_limits(signed)), relative, method="scan_unrolled")
    return BlockwiseMoment(codes=codes.astype(jnp.uint8), absmax=absmax)


def dequantize_blocks(
    moment: BlockwiseMoment, shape: tuple[int, ...], *, signed: bool
) -> Float32[Array, "..."]:
    """The values that the codes stand for, as an array of ``shape``."""
    layers, size, blocks = _block_shape(shape)
    table = jnp.asarray(dynamic_map(signed=signed))
    values = table[moment.codes.astype(jnp.int32)] * moment.absmax[..., None]
    return values.reshape(*layers, blocks * BLOCK)[..., :size].reshape(shape)


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` whose moments are 8-bit blocks between the steps.

    Each step reads them into float32, does optax's update with its bias correction, and rounds the
    new moments; the step itself is of the moments before rounding.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> Adam8bitState:
        return Adam8bitState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(lambda p: _zeros(p.shape, signed=True), params),
            nu=jax.tree.map(lambda p: _zeros(p.shape, signed=False), params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params

        def leaf(
            gradient: jax.Array, mu: BlockwiseMoment, nu: BlockwiseMoment
        ) -> tuple[Any, BlockwiseMoment, BlockwiseMoment]:
            before = optax.ScaleByAdamState(
                count=state.count,
                mu=dequantize_blocks(mu, gradient.shape, signed=True),
                nu=dequantize_blocks(nu, gradient.shape, signed=False),
            )
            step, after = cast(Any, adam.update(gradient, cast(Any, before)))
            return (
                step,
                quantize_blocks(after.mu, signed=True),
                quantize_blocks(after.nu, signed=False),
            )

        def one_by_one(gradient: jax.Array, mu: BlockwiseMoment, nu: BlockwiseMoment) -> Any:
            # Layer by layer, or the float32 moments of all would be in memory at once.
            if gradient.ndim < 3:
                return leaf(gradient, mu, nu)
            return jax.lax.map(lambda layer: leaf(*layer), (gradient, mu, nu))

        done = jax.tree.map(one_by_one, updates, state.mu, state.nu)
        steps, mu, nu = (
            jax.tree.map(lambda _, three, i=i: three[i], updates, done) for i in range(3)
        )
        count = cast(jax.Array, optax.safe_increment(state.count))
        return steps, Adam8bitState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _block_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """The axis of layers, where there is one; then, in each layer, elements and blocks."""
    layers = shape[:1] if len(shape) >= 3 else ()
    size = math.prod(shape[len(layers) :])
    return layers, size, -(-size // BLOCK)


def _limits(signed: bool) -> npt.NDArray[np.float32]:
    """Where one value of the map ends and the next one starts; float32 [255], ascending."""
    values = dynamic_map(signed=signed).astype(np.float64)
    limits = (values[:-1] + values[1:]) / 2
    if not signed:
        limits[0] = 0.0  # See quantize_blocks: only zero becomes zero.
    return limits.astype(np.float32)


def _zeros(shape: tuple[int, ...], *, signed: bool) -> BlockwiseMoment:
    """A moment of zeros, for a leaf of ``shape``."""
    layers, _, blocks = _block_shape(shape)
    zero = int(np.searchsorted(dynamic_map(signed=signed), 0.0))
    return BlockwiseMoment(
        codes=jnp.full((*layers, blocks, BLOCK), zero, jnp.uint8),
        absmax=jnp.zeros((*layers, blocks), jnp.float32),
    )
