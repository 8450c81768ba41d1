"""What a layer sees of a row: rotary angles and a mask, for global and for local layers."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from fabric_jax.layers.rope import rotary_angles
from fabric_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class View:
    """Where the tokens stand for a layer, and which of them each may read.

    Attributes:
        angles: cosine and sine of the rotary angles.
        mask: true where query t reads key s.
        first: the first slot of a cache that query t reads; None where there is no cache, or no
            layer of the model has a window.
    """

    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
    mask: Bool[Array, "B T S"]
    first: Int32[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of all layers, made once, before the scan over them.

    Attributes:
        of_global: of layers that see everything before.
        of_local: of layers with a sliding window; None where a model has none.
        global_every: of this many layers the last is global.
    """

    of_global: View
    of_local: View | None
    global_every: int = field(metadata={"static": True})

    def at(self, layer: Int32[Array, ""]) -> View:
        """The view of one layer."""
        if self.of_local is None:
            return self.of_global
        is_global = (layer + 1) % self.global_every == 0
        return jax.tree.map(partial(jnp.where, is_global), self.of_global, self.of_local)


def row_views(
    config: ModelConfig, positions: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> Views:
    """Of whole rows: a token sees the tokens before it in its own segment."""
    length = segment_ids.shape[1]
    causal = jnp.tri(length, dtype=jnp.bool_)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = causal[None] & same
    if config.sliding_window is None:
        return _views(config, positions, mask, None)
    beyond = jnp.tri(length, k=-config.sliding_window, dtype=jnp.bool_)
    return _views(config, positions, mask, mask & ~beyond[None])


def cache_views(config: ModelConfig, positions: Int32[Array, "B T"], slots: int) -> Views:
    """Of tokens that continue a cache, in which the token at position s lies in slot s.

    ``slots`` is how many of the cache's are looked at, from the first.
    """
    numbers = jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    mask = numbers <= positions[:, :, None]
    if config.sliding_window is None:
        return _views(config, positions, mask, None)
    beyond = positions - config.sliding_window
    firsts = (jnp.zeros_like(positions), jnp.maximum(beyond + 1, 0))
    return _views(config, positions, mask, mask & (numbers > beyond[:, :, None]), firsts)


def _views(
    config: ModelConfig,
    positions: jax.Array,
    mask: jax.Array,
    local_mask: jax.Array | None,
    firsts: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> Views:
    theta, width = config.rope_theta, config.head_dim
    angles = rotary_angles(positions, width, theta, config.rope_scaling)
    of_global = View(angles=angles, mask=mask, first=firsts[0])
    of_local = None
    if local_mask is not None:
        local_theta = config.local_rope_theta or theta
        angles = rotary_angles(positions, width, local_theta)
        of_local = View(angles=angles, mask=local_mask, first=firsts[1])
    return Views(of_global=of_global, of_local=of_local, global_every=config.global_every)
