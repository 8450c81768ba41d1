"""The CPU implementation: one call of ``csrc`` goes through all layers, its threads staying."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from fabric_kernels import cpu_library
from fabric_kernels.attention.api import Angles
from fabric_kernels.attention.cache import KVCache
from fabric_kernels.decoding.stacks import LayerStacks
from fabric_kernels.norm.api import GATES
from fabric_kernels.ternary_matmul.cpu import FORMATS


def decode_layers(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: Angles,
    factor: float,
) -> tuple[jax.Array, KVCache]:
    """As ``api.decode_layers``, of float32 [B, 1, D]."""
    cpu_library.load()
    none = jnp.zeros((0,), jnp.float32)

    def floats(x: jax.Array | None) -> jax.Array:
        return none if x is None else x.astype(jnp.float32)

    gains = (stacks.attention_gain, stacks.sub_gain, stacks.mlp_gain, stacks.mlp_sub_gain)
    stored = (cache.keys, cache.values, floats(cache.key_scales), floats(cache.value_scales))
    before = (h, *map(floats, angles), positions, jnp.zeros_like(positions))
    matrices = [part for w in stacks.matrices.values() for part in (w.packed, floats(w.scale))]
    call = jax.ffi.ffi_call(
        "fabric_decode_layers",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (h, *stored)],
        input_output_aliases={len(before) + i: 1 + i for i in range(len(stored))},
    )
    out, keys, values, key_scales, value_scales = call(
        *before,
        *stored,
        *map(floats, gains),
        *matrices,
        format=FORMATS[stacks.q.packing],
        gate=GATES[stacks.activation],
        eps=np.float32(stacks.eps),
        scale=np.float32(factor),
    )
    new = replace(cache, keys=keys, values=values)
    if cache.key_scales is not None:
        new = replace(new, key_scales=key_scales, value_scales=value_scales)
    return out, new
