"""Keys and values of the tokens that a generating model has seen."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Slot s of a row holds the key and value of the token at position s.

    So what a query at position p may see is exactly the slots up to p, and prompts of different
    lengths need no mask: what padding left behind a prompt is overwritten before it is seen.
    """

    keys: Float[Array, "L B S K hd"]
    values: Float[Array, "L B S K hd"]

    @property
    def capacity(self) -> int:
        """S, the number of positions that fit."""
        return self.keys.shape[2]

    def write(
        self,
        layer: Int32[Array, ""],
        positions: Int32[Array, "B T"],
        keys: Float[Array, "B T K hd"],
        values: Float[Array, "B T K hd"],
    ) -> "KVCache":
        """The cache with these tokens of one layer stored; positions beyond it are dropped."""
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        return KVCache(
            keys=self.keys.at[layer, rows, positions].set(
                keys.astype(self.keys.dtype), mode="drop"
            ),
            values=self.values.at[layer, rows, positions].set(
                values.astype(self.values.dtype), mode="drop"
            ),
        )

    def read(self, layer: Int32[Array, ""], dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, hd] of one layer."""
        return self.keys[layer].astype(dtype), self.values[layer].astype(dtype)


def empty_cache(
    num_layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> KVCache:
    """A cache of zeros."""
    shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
    return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))
