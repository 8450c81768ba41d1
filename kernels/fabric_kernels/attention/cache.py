"""Keys and values of the tokens that a generating model has seen: how they are stored."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Slot s of a row holds the key and value of the token at position s.

    So what a query at position p may see is exactly the slots up to p, and prompts of different
    lengths need no mask: what padding left behind a prompt is overwritten before it is seen. A
    head's slots follow one another, so that attention reads memory in one run for each head.

    Integers are codes with one scale for each vector of a head, absmax / 127: keys and values of
    different tokens and heads differ in size by orders of magnitude, within one they do not.

    Attributes:
        keys: [L, B, K, S, hd], floats or int8.
        values: likewise.
        key_scales: float32 [L, B, K, S] for int8, else None.
        value_scales: likewise.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """S, the number of positions that fit."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def arrays(self) -> list[jax.Array]:
        """Keys, values, and of int8 their scales."""
        scales = (self.key_scales, self.value_scales)
        return [self.keys, self.values, *(one for one in scales if one is not None)]

    def write(
        self, layer: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
    ) -> "KVCache":
        """The cache with some tokens of one layer stored; positions beyond it are dropped.

        Args:
            layer: int32 [].
            positions: int32 [B, T].
            keys: [B, T, K, hd], turned by their positions.
            values: [B, T, K, hd].
        """
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            at = into.at[layer, rows, :, positions]
            return at.set(new.astype(into.dtype), mode="drop")

        if self.key_scales is None or self.value_scales is None:
            return KVCache(keys=put(self.keys, keys), values=put(self.values, values))
        key_codes, key_scales = quantize_vectors(keys)
        value_codes, value_scales = quantize_vectors(values)
        return KVCache(
            keys=put(self.keys, key_codes),
            values=put(self.values, value_codes),
            key_scales=put(self.key_scales, key_scales),
            value_scales=put(self.value_scales, value_scales),
        )

    def read(
        self, layer: jax.Array, dtype: DTypeLike, slots: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, slots, K, hd] of one layer, the first ``slots`` of them or all."""

        def take(stored: jax.Array, scales: jax.Array | None) -> jax.Array:
            own = stored[layer][:, :, :slots]
            if scales is not None:
                own = own.astype(jnp.float32) * scales[layer][:, :, :slots, None]
            return jnp.swapaxes(own.astype(dtype), 1, 2)

        return take(self.keys, self.key_scales), take(self.values, self.value_scales)


def empty_cache(
    num_layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> KVCache:
    """A cache of zeros; ``dtype`` is a float dtype or int8."""
    shape = (num_layers, batch, num_kv_heads, capacity, head_dim)
    scales = None
    if jnp.dtype(dtype) == jnp.int8:
        scales = jnp.zeros(shape[:-1], jnp.float32)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        key_scales=scales,
        value_scales=None if scales is None else jnp.zeros_like(scales),
    )


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int8 [..., hd] and scales float32 [...]: ``x`` is about codes times scale.

    The scale is the vector's absmax / 127, codes are rounded half to even; an element is off by at
    most half a scale. A vector of zeros has the scale 0.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) * jnp.float32(1 / 127)
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    codes = jnp.clip(jnp.round(x * inverse[..., None]), -127, 127)
    return codes.astype(jnp.int8), scale
