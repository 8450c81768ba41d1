"""A step of decoding through all layers of a decoder in one launch, on CUDA GPUs and on CPU.

A layer of a small model is five kernels of four or five microseconds, of which the weights are
one: the rest is starting, and waiting for what was started before. Here a program stays on each
multiprocessor through all layers, asks for its next weights while others finish, and quantises a
token once for all of its rows.

On an H200, tokens a second, one at a time: 125M 3,700 layer by layer, 4,340 in Triton's launch and
5,520 in that of ``mosaic_gpu``; 1B 1,410, 1,770 and 2,460; 2B-4T 720, 840 and 1,500; 13B 250, 400
and 620. Equal bits in every try, and those of the kernels one by one where norms add up in the same
order.

On CPU a layer is eight calls, and threads are woken for each; here they stay, wait for each other
only a moment, and the bits are those of the calls one by one.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fabric_kernels import cpu_library
from fabric_kernels.attention.api import Angles
from fabric_kernels.attention.cache import KVCache
from fabric_kernels.attention.cached import CPU_DTYPES
from fabric_kernels.decoding import cpu
from fabric_kernels.decoding.hopper.plan import why_not as plan_why_not
from fabric_kernels.decoding.stacks import LayerStacks
from fabric_kernels.nvidia import HOPPER, NONE, compute_capability
from fabric_kernels.triton_call import Mode, kernel_module, on_platform

Implementation = Literal["triton", "mosaic_gpu", "cpu"]
MOST_ROWS = 4
"""Tokens of a step: one a row of the batch."""
MOST_SLOTS = 2048
"""Of a cache. A program has a whole head's; of longer ones ``cached_attention`` cuts stretches."""
HOPPER_PROGRAMS = 132
"""Multiprocessors of an H100 SXM and an H200: where a program is compiled for one elsewhere."""
LEAST_PROGRAMS = 8
"""Where the device that a program is compiled for isn't there to be asked: any GPU has these."""


def why_not(
    stacks: LayerStacks,
    cache: KVCache,
    rows: int,
    implementation: Implementation = "triton",
    dtype: DTypeLike | None = None,
) -> str | None:
    """What keeps :func:`decode_layers` from taking these, in words; None where it does.

    ``dtype`` is that of the residual stream, where it is known.
    """
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}"
    if cache.keys.shape[-1] % 2:
        return "heads have an odd width"
    if implementation == "cpu":
        return _why_not_cpu(stacks, cache, dtype)
    if implementation == "mosaic_gpu" and dtype is not None and jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    matrices = stacks.matrices.values()
    if any(weight.packing != "ternary2" for weight in matrices):
        return "weights are not ternary2"
    if cache.capacity > MOST_SLOTS:
        return f"{cache.capacity} slots are more than {MOST_SLOTS}"
    if implementation == "mosaic_gpu":
        return plan_why_not(stacks, cache) or _why_not_hopper()
    # Triton's offsets are of 32 bits, signed.
    if max(*(weight.packed.size for weight in matrices), cache.keys.size) >= 1 << 31:
        return "a stack has more elements than 32 bits count"
    if jax.default_backend() == "gpu" and compute_capability() == NONE:
        return "only CUDA GPUs round as exactly"
    return None


def _why_not_hopper() -> str | None:
    """Nothing where no GPU is there: a program may be compiled for one that isn't."""
    if jax.default_backend() == "gpu" and compute_capability() != HOPPER:
        return "it is for Hopper GPUs"
    return None


def _why_not_cpu(stacks: LayerStacks, cache: KVCache, dtype: DTypeLike | None) -> str | None:
    if len({weight.packing for weight in stacks.matrices.values()}) > 1:
        return "weights are packed in more than one way"
    if not any(cache.keys.dtype == dtype for dtype in CPU_DTYPES):
        return f"a cache of {cache.keys.dtype}"
    if {stacks.attention_gain.dtype, jnp.dtype(dtype or jnp.float32)} != {jnp.dtype(jnp.float32)}:
        return "on CPU it is for float32"
    return None


def picks_itself(rows: int, implementation: Implementation = "triton") -> bool:
    """Whether it is what runs where nobody says so: a token, on a device it has been timed on."""
    if implementation == "cpu":
        return rows == 1 and jax.default_backend() == "cpu" and cpu_library.available()
    return rows == 1 and compute_capability() == HOPPER


def fastest(stacks: LayerStacks, cache: KVCache, rows: int, dtype: DTypeLike) -> Implementation:
    """Which of the two for GPUs runs such a step sooner."""
    if compute_capability() != HOPPER:
        return "triton"
    taken = why_not(stacks, cache, rows, "mosaic_gpu", dtype) is None
    return "mosaic_gpu" if taken else "triton"


def decode_layers(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    *,
    angles: Angles,
    scale: float | None = None,
    implementation: Implementation = "triton",
) -> tuple[jax.Array, KVCache]:
    """The residual stream after all layers, of one new token a row, and the cache with it.

    Values are those of ``ternary_linear`` and ``cached_attention`` in the implementation
    that is named, step by step; those of ``mosaic_gpu`` are Triton's, but for the order in which
    norms and scores add up. Triton's is interpreted where there is no GPU. No gradient is defined.

    Args:
        h: [B, 1, D], floats; float32 for ``cpu``.
        stacks: the layers.
        cache: what it holds of the positions below ``positions``; updated in place where it can be.
        positions: int32 [B, 1]; one beyond the capacity is not stored, and sees every slot.
        angles: cosine and sine [B, 1, hd/2] of the rotary positions.
        scale: factor on the scores; without one ``1 / sqrt(hd)``.
        implementation: ``triton`` on GPUs; ``mosaic_gpu`` on Hopper, in bfloat16; or ``cpu``.

    Raises:
        ValueError: :func:`why_not` gives a reason, or ``h`` has another dtype.
        CpuLibraryError: there is no library for ``cpu``.
        NotImplementedError: it is compiled for AMD's GPUs.
    """
    reason = why_not(stacks, cache, h.shape[0], implementation, h.dtype)
    if reason is not None:
        raise ValueError(f"decode_layers does not take these: {reason}")
    factor = cache.keys.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "cpu":
        return cpu.decode_layers(h, stacks, cache, positions, angles, factor)
    if implementation == "mosaic_gpu":
        # Imported here: not every platform has the compiler that it is written for.
        from fabric_kernels.decoding.hopper import layers

        programs = _multiprocessors() if compute_capability() != NONE else HOPPER_PROGRAMS
        return layers.decode_layers(h, stacks, cache, positions, angles, factor, programs=programs)
    call = partial(_call, factor=factor)
    return on_platform(call, h, stacks, cache, positions, angles)


def _call(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: Angles,
    *,
    factor: float,
    mode: Mode,
) -> tuple[jax.Array, KVCache]:
    if mode == "rocm":
        raise NotImplementedError(
            "the step through all layers is for CUDA GPUs; use implementation xla"
        )
    programs = 1 if mode == "interpret" else _multiprocessors()
    return kernel_module("fabric_kernels.decoding.triton_layers").decode_layers(
        h, stacks, cache, positions, angles, factor, programs=programs, mode=mode
    )


def _multiprocessors() -> int:
    """Programs that surely run at the same time: one a multiprocessor."""
    device: Any = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else LEAST_PROGRAMS
