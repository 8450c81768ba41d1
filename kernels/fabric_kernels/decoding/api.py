"""A step of decoding through all layers of a decoder in one launch, on CUDA GPUs.

A layer of a small model is five kernels of four or five microseconds, of which the weights are
one: the rest is starting, and waiting for what was started before. Here a program stays on each
multiprocessor through all layers, asks for its next weights while others finish, and quantises a
token once for all of its rows.

On an H200, one token at a time: 4,380 tokens a second instead of 3,720 with 125M parameters, 1,770
instead of 1,420 with 1B, 840 instead of 720 (2B-4T), 400 instead of 250 (13B); equal bits in every
try, and of the kernels one by one where norms add up in the same order.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from fabric_kernels.attention.api import Angles
from fabric_kernels.attention.cache import KVCache
from fabric_kernels.norm import Gate
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import Mode, kernel_module, on_platform

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MOST_ROWS = 4
"""Tokens of a step: one a row of the batch."""
MOST_SLOTS = 2048
"""Of a cache. A program has a whole head's; of longer ones ``cached_attention`` cuts stretches."""
HOPPER = "9.0"
LEAST_PROGRAMS = 8
"""Where the device that a program is compiled for isn't there to be asked: any GPU has these."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*MATRICES, "attention_gain", "sub_gain", "mlp_gain", "mlp_sub_gain"],
    meta_fields=["activation", "eps", "heads", "kv_heads"],
)
@dataclass(frozen=True, kw_only=True)
class LayerStacks:
    """The layers of a decoder, each parameter a stack of L.

    ``h += o(norm(attention(q, k, v of norm(h))))``, then
    ``h += down(norm(act(gate(norm(h))) · up(norm(h))))``.

    Attributes:
        q: ternary [L, H·hd, D]; the layer of these weights is not read.
        k: [L, K·hd, D].
        v: [L, K·hd, D].
        o: [L, D, H·hd].
        gate: [L, F, D].
        up: [L, F, D].
        down: [L, D, F].
        attention_gain: [L, D] of the norm before q, k and v.
        sub_gain: [L, H·hd] of the norm before o; or None.
        mlp_gain: [L, D] of the norm before gate and up.
        mlp_sub_gain: [L, F] of the norm before down; or None.
        activation: of the gate.
        eps: of all norms.
        heads: H.
        kv_heads: K.
    """

    q: TernaryWeight
    k: TernaryWeight
    v: TernaryWeight
    o: TernaryWeight
    gate: TernaryWeight
    up: TernaryWeight
    down: TernaryWeight
    attention_gain: jax.Array
    sub_gain: jax.Array | None
    mlp_gain: jax.Array
    mlp_sub_gain: jax.Array | None
    activation: Gate = field(metadata={"static": True})
    eps: float = field(metadata={"static": True})
    heads: int = field(metadata={"static": True})
    kv_heads: int = field(metadata={"static": True})

    @property
    def matrices(self) -> dict[str, TernaryWeight]:
        """By name."""
        return {name: getattr(self, name) for name in MATRICES}

    @property
    def gains(self) -> dict[str, jax.Array]:
        """Of the norms that there are."""
        names = ("attention_gain", "sub_gain", "mlp_gain", "mlp_sub_gain")
        return {name: gain for name in names if (gain := getattr(self, name)) is not None}


def why_not(stacks: LayerStacks, cache: KVCache, rows: int) -> str | None:
    """What keeps :func:`decode_layers` from taking these, in words; None where it does."""
    matrices = stacks.matrices.values()
    if any(weight.packing != "ternary2" for weight in matrices):
        return "weights are not ternary2"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}"
    if cache.capacity > MOST_SLOTS:
        return f"{cache.capacity} slots are more than {MOST_SLOTS}"
    if cache.keys.shape[-1] % 2:
        return "heads have an odd width"
    # Triton's offsets are of 32 bits, signed.
    if max(*(weight.packed.size for weight in matrices), cache.keys.size) >= 1 << 31:
        return "a stack has more elements than 32 bits count"
    if jax.default_backend() == "gpu" and not _compute_capability():
        return "only CUDA GPUs round as exactly"
    return None


def picks_itself(rows: int) -> bool:
    """Whether it is what runs where nobody says so: one token, on a device it has been timed on."""
    return rows == 1 and _compute_capability() == HOPPER


def decode_layers(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    *,
    angles: Angles,
    scale: float | None = None,
) -> tuple[jax.Array, KVCache]:
    """The residual stream after all layers, of one new token a row, and the cache with it.

    Values are those of ``ternary_linear`` and ``cached_attention`` in the implementation
    ``triton``, step by step. Interpreted where there is no GPU. No gradient is defined.

    Args:
        h: [B, 1, D], floats.
        stacks: the layers.
        cache: what it holds of the positions below ``positions``; updated in place where it can be.
        positions: int32 [B, 1]; one beyond the capacity is not stored, and sees every slot.
        angles: cosine and sine [B, 1, hd/2] of the rotary positions.
        scale: factor on the scores; without one ``1 / sqrt(hd)``.

    Raises:
        ValueError: :func:`why_not` gives a reason.
        NotImplementedError: it is compiled for AMD's GPUs.
    """
    reason = why_not(stacks, cache, h.shape[0])
    if reason is not None:
        raise ValueError(f"decode_layers does not take these: {reason}")
    factor = cache.keys.shape[-1] ** -0.5 if scale is None else scale
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


def _compute_capability() -> str:
    """Of the CUDA GPU that programs run on, as in 9.0; empty where they run on something else."""
    if jax.default_backend() != "gpu":
        return ""
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    return found if "." in found else ""


def _multiprocessors() -> int:
    """Programs that surely run at the same time: one a multiprocessor."""
    device: Any = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else LEAST_PROGRAMS
