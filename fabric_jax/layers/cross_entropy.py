"""Next-token loss over a large vocabulary without the logits of all tokens at once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from fabric_kernels import BlockTable, table_matmul, table_matmul_transposed
from fabric_kernels.block_quantization import no_gradient
from fabric_kernels.cross_entropy import Implementation, logits_gradient
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from fabric_jax.errors import FabricError
from fabric_jax.layers.dot import linear, linear_transposed

LOGITS_TILE_BYTES = 8 << 20
"""Of float32 logits at one time, unless the hidden states take more than half of that: a tile is
then twice as large as they are, which is little beside a step on so many tokens and lets products
with the head run at full speed."""

CAST_AT_ONCE = 4
"""A half-precision head is cast to the dtype of half-precision hidden states as a whole where it
has no more than so many times their bytes, except on CPUs, whose kernel multiplies it as it is."""
ALIGNMENT = 128
"""Rows of such a copy are filled up to a multiple: products would otherwise do so, tile by tile."""

_Head = jax.Array | BlockTable


class _How(NamedTuple):
    train_head: bool
    z_loss: float
    tile_bytes: int
    whole: bool
    rounded: bool
    implementation: Implementation | None


def tiled_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | BlockTable,
    targets: Int32[Array, "N"],
    weights: Float32[Array, "N"],
    *,
    train_head: bool = False,
    z_loss: float = 0.0,
    tile_bytes: int = LOGITS_TILE_BYTES,
    round_logits: bool = False,
    implementation: Implementation | None = None,
) -> Float32[Array, ""]:
    """``sum_i weights_i · (logsumexp(z_i) - z_i[targets_i])`` with ``z = hidden · head^T``.

    Tokens are taken in tiles whose float32 logits stay under ``tile_bytes``, or twice the bytes of
    ``hidden`` where these are more. Where a gradient is wanted it is formed in the same pass (two
    products with the head instead of three) and stored as
    ``d hidden`` [N, D]; the gradient of the head is formed only if ``train_head``, otherwise it
    is zero. A head to be trained that is stored wider than ``hidden`` is multiplied in the dtype of
    ``hidden``; its gradient is summed in float32.

    ``z_loss`` adds ``z_loss · logsumexp(z_i)²`` to each loss (PaLM, Chowdhery et al. 2022,
    arXiv:2204.02311, section 5).

    ``round_logits`` rounds logits to the dtype of ``hidden``, as a linear layer of that dtype does:
    half the memory traffic of a large vocabulary, and an error of a logit of at most 2^-8 of its
    size in bfloat16. Everything after it is float32. It needs a head of floats and large tiles.

    ``implementation`` says what makes gradients of logits (``fabric_kernels.cross_entropy``).

    Raises:
        FabricError: the head to be trained is a table of integers.
    """
    if train_head and isinstance(head, BlockTable):
        raise FabricError(
            f"a head of int{head.bits} codes can't be trained",
            fix="Store embedding and head as float32 or bfloat16",
        )
    if round_logits and (isinstance(head, BlockTable) or tile_bytes <= LOGITS_TILE_BYTES):
        raise FabricError(
            "logits are rounded in large tiles, of a head of floats",
            expected=f"loss_tile_bytes above {LOGITS_TILE_BYTES}",
            found=f"loss_tile_bytes {tile_bytes}, head {type(head).__name__}",
        )
    whole = _at_once(hidden, head, tile_bytes)
    how = _How(train_head, z_loss, tile_bytes, whole, round_logits, implementation)
    return _loss(how, hidden, head, targets, weights)


def tile_tokens(num_tokens: int, vocab_size: int, tile_bytes: int = LOGITS_TILE_BYTES) -> int:
    """Tokens in a tile: a power of two, at least 16, no more than needed."""
    fit = max(16, tile_bytes // (4 * vocab_size))
    return min(1 << (fit.bit_length() - 1), num_tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    how: _How, hidden: jax.Array, head: _Head, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    multiplied = _multiplied(how, hidden, head)

    def add(
        total: jax.Array, tile: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        logits = _logits(how, tile[0], multiplied)[:, : head.shape[0]]
        return total + _tile_loss(how, logits.astype(jnp.float32), *tile[1:]), None

    tiles = _tiles(how, hidden, targets, weights, head.shape[0])
    return lax.scan(add, jnp.float32(0), tiles)[0]


def _loss_fwd(
    how: _How, hidden: jax.Array, head: _Head, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, _Head]]:
    train_head, multiplied = how.train_head, _multiplied(how, hidden, head)

    def add(
        carry: tuple[jax.Array, jax.Array], tile: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, d_head = carry
        x, y, w = tile
        count = head.shape[0]
        logits = _logits(how, x, multiplied)
        options: Any = {"z_loss": how.z_loss, "implementation": how.implementation}
        losses, d_logits = logits_gradient(logits, y, w, x.dtype, count=count, **options)
        total = total + jnp.sum(losses)
        if train_head:
            d_head = d_head + linear(d_logits.T, x.T, jnp.float32)
        return (total, d_head), _transposed(how, d_logits, multiplied).astype(x.dtype)

    tiles = _tiles(how, hidden, targets, weights, head.shape[0])
    d_head = jnp.zeros(head.shape if train_head else (), jnp.float32)
    (total, d_head), d_hidden = lax.scan(add, (jnp.float32(0), d_head), tiles)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    if isinstance(head, BlockTable):
        return total, (d_hidden, head)
    if not train_head:
        d_head = jnp.zeros((0, *head.shape), head.dtype)
    return total, (d_hidden, d_head.astype(head.dtype))


def _loss_bwd(
    how: _How, residuals: tuple[jax.Array, _Head], g: jax.Array
) -> tuple[jax.Array, _Head, None, None]:
    d_hidden, d_head = residuals
    d_hidden = (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype)
    if isinstance(d_head, BlockTable):
        return d_hidden, no_gradient(d_head), None, None
    if how.train_head:
        d_head = (d_head.astype(jnp.float32) * g).astype(d_head.dtype)
    else:
        d_head = jnp.zeros(d_head.shape[1:], d_head.dtype)
    return d_hidden, d_head, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _multiplied(how: _How, hidden: jax.Array, head: _Head) -> _Head:
    """The head as it is multiplied: a float32 master of a half-precision model is rounded once."""
    if not isinstance(head, jax.Array) or not (how.train_head or how.whole):
        return head
    cast = head.astype(hidden.dtype)
    if how.train_head:
        return cast
    return jnp.pad(cast, ((0, -head.shape[0] % ALIGNMENT), (0, 0)))


def _at_once(hidden: jax.Array, head: _Head, tile_bytes: int) -> bool:
    """Whether many tokens leave no reason to take the head by parts as well."""
    if isinstance(head, BlockTable):
        return False
    half = hidden.dtype.itemsize == head.dtype.itemsize == 2
    many = half and head.size <= CAST_AT_ONCE * hidden.size
    return tile_bytes > LOGITS_TILE_BYTES or (many and jax.default_backend() != "cpu")


def _logits(how: _How, x: jax.Array, head: _Head) -> jax.Array:
    """[tile, V] in float32 unless rounded."""
    if not how.whole or isinstance(head, BlockTable):
        return table_matmul(x, head)
    if how.rounded:
        # Asked for in that dtype: what is rounded after a product may be written before.
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        numbers = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, head, numbers, precision, preferred_element_type=x.dtype)
    return linear(x, head, jnp.float32)


def _transposed(how: _How, d_logits: jax.Array, head: _Head) -> jax.Array:
    if how.whole and isinstance(head, jax.Array):
        return linear_transposed(d_logits, head)
    return table_matmul_transposed(d_logits, head)


def _tile_loss(how: _How, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    if how.z_loss:
        losses = losses + how.z_loss * jnp.square(normaliser)
    return jnp.sum(weights * losses)


def _tiles(
    how: _How, hidden: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits the tokens into tiles; the last is filled with tokens of weight 0."""
    size = max(how.tile_bytes, 2 * hidden.size * hidden.dtype.itemsize)
    tile = tile_tokens(hidden.shape[0], vocab_size, size)
    pad = -hidden.shape[0] % tile
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, tile, hidden.shape[1])
    return (
        hidden,
        jnp.pad(targets, (0, pad)).reshape(-1, tile),
        jnp.pad(weights, (0, pad)).reshape(-1, tile),
    )
