"""Attention of one new token a row to what a cache holds: a step of decoding.

One call turns the query and the key, stores key and value in their slots, and attends. On CPU and
on GPUs a kernel reads the slots in use where they lie and no others; XLA elsewhere reads all of
them under a mask.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fabric_kernels import cpu_library
from fabric_kernels.attention import xla
from fabric_kernels.attention.api import attention_implementation
from fabric_kernels.attention.cache import KVCache
from fabric_kernels.ternary_matmul import Implementation, select_implementation
from fabric_kernels.triton_call import Mode, kernel_module, on_platform

Angles = tuple[jax.Array, jax.Array]
MANY_HEADS = 132
"""Key/value heads of a batch from which a program each occupies a large GPU."""
CPU_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    positions: jax.Array,
    *,
    angles: Angles,
    first: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, KVCache]:
    """``softmax(scale · q·keys^T)·values`` over the slots up to the token's own, and the new cache.

    Args:
        q: [B, 1, H, hd], floats, not turned. Head h reads key/value head h // (H / K).
        k: [B, 1, K, hd], likewise.
        v: [B, 1, K, hd].
        cache: what it holds of the positions below ``positions``.
        layer: int32 [].
        positions: int32 [B, 1]; one beyond the capacity is not stored, and sees every slot.
        angles: cosine and sine [B, 1, hd/2] of the rotary positions.
        first: int32 [B, 1], the first slot that a row sees; None for slot 0.
        scale: factor on the scores, positive; without one ``1 / sqrt(hd)``.
        implementation: of the products that this belongs to: ``cpu``; ``triton``, ``mosaic_gpu``
            and ``tuned`` for the Triton kernel; any other name for XLA. None picks. What that means
            runs or raises.

    Returns:
        [B, 1, H, hd] in the dtype of q, and the cache. No gradient is defined.

    Raises:
        ValueError: the shapes or dtypes do not fit, or a name is unknown.
    """
    _check(q, k, v, cache, positions)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    known = any(cache.keys.dtype == dtype for dtype in CPU_DTYPES)
    chosen = select_implementation(implementation)
    if chosen == "cpu" and (known or implementation == "cpu"):
        begin = jnp.zeros_like(positions) if first is None else first
        return _on_cpu(q, k, v, cache, layer, positions, begin, angles, factor)
    if attention_implementation(implementation, queries=2) == "triton" and q.shape[-1] % 2 == 0:
        return _on_gpu(q, k, v, cache, layer, positions, first, angles, scale=factor)
    q, k = xla.rotate(q, angles), xla.rotate(k, angles)
    cache = cache.write(layer, positions, k, v)
    keys, values = cache.read(layer, q.dtype)
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, :]
    mask = slots <= positions[:, :, None]
    if first is not None:
        mask = mask & (slots >= first[:, :, None])
    return xla.attention(q, keys, values, mask, factor), cache


def _on_gpu(*arrays: Any, scale: float) -> tuple[jax.Array, KVCache]:
    def call(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: KVCache,
        layer: jax.Array,
        positions: jax.Array,
        first: jax.Array | None,
        angles: Angles,
        *,
        mode: Mode,
    ) -> tuple[jax.Array, KVCache]:
        module = kernel_module("fabric_kernels.attention.triton_batch")
        if q.shape[0] * k.shape[2] < MANY_HEADS or not module.takes(q, cache):
            module = kernel_module("fabric_kernels.attention.triton_cached")
        return module.cached_attention(
            q, k, v, cache, layer, positions, first, angles, scale, mode=mode
        )

    return on_platform(call, *arrays)


def _on_cpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    positions: jax.Array,
    first: jax.Array,
    angles: Angles,
    scale: float,
) -> tuple[jax.Array, KVCache]:
    cpu_library.load()
    none = jnp.zeros((0,), jnp.float32)
    key_scales = none if cache.key_scales is None else cache.key_scales
    value_scales = none if cache.value_scales is None else cache.value_scales
    floats = [x.astype(jnp.float32) for x in (q, k, v, *angles)]
    stored = (cache.keys, cache.values, key_scales, value_scales)
    numbers = (layer, positions, first)
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    same = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored]
    at = len(floats) + len(numbers)
    call = jax.ffi.ffi_call(
        "fabric_cached_attention",
        (out, *same),
        input_output_aliases={at + i: 1 + i for i in range(len(stored))},
    )
    y, keys, values, key_scales, value_scales = call(
        *floats, *numbers, *stored, scale=np.float32(scale)
    )
    new = replace(cache, keys=keys, values=values)
    if cache.key_scales is not None:
        new = replace(new, key_scales=key_scales, value_scales=value_scales)
    return y.astype(q.dtype), new


def _check(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, positions: jax.Array) -> None:
    batch, heads, width = q.shape[0], q.shape[2], q.shape[3]
    stored = cache.keys.shape
    kv_heads = stored[2]
    if (
        q.shape[1] != 1
        or k.shape != (batch, 1, kv_heads, width)
        or v.shape != k.shape
        or heads % kv_heads
        or stored != (stored[0], batch, kv_heads, cache.capacity, width)
        or cache.values.shape != stored
        or positions.shape != (batch, 1)
    ):
        raise ValueError(
            "cached attention takes one token a row, q [B, 1, H, hd], k and v [B, 1, K, hd], and a "
            f"cache [L, B, K, S, hd]; found {list(q.shape)}, {list(k.shape)}, {list(v.shape)} and "
            f"{list(stored)}"
        )
