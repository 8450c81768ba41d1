"""A LoRA step that updates each layer's adapter as soon as its gradient is there.

Backward goes from the last layer to the first. Here the optimizer runs inside that loop, on one
layer's slice of adapter and moments, so that the gradient of one layer exists at a time instead of
that of all of them: 4 bytes a trained weight less. (LOMO, Lv et al. 2023, arXiv:2306.09782, does
so for plain gradient descent.) What needs all gradients first, clipping by the global norm and
sums over micro-batches, is not to be had.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fabric_jax.data.batch import Batch
from fabric_jax.models.decoder import Decoder, DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.training.optimizer import to_float32
from fabric_jax.training.partition import freezes_a, join, split
from fabric_jax.training.rounding import apply_updates

Layer = Callable[[jax.Array, jax.Array, Tree], jax.Array]


def fused_update(
    definition: DecoderDefinition,
    optimizer: optax.GradientTransformation,
    params: Tree,
    moments: Any,
    frozen: Tree,
    batch: Batch,
    key: jax.Array,
) -> tuple[Tree, Any, jax.Array, jax.Array]:
    """Forward, then backward and update layer by layer.

    Args:
        definition: of the decoder.
        optimizer: element by element; its state's arrays are stacked by layer as the adapter is,
            its scalars count steps.
        params: the adapter, all of it stacked on a leading axis of layers.
        moments: the optimizer's state for it.
        frozen: the base.
        batch: one micro-batch [B, T].
        key: of the step's dropout and rounding.

    Returns:
        The new adapter and moments, the sum of the losses, and the gradient's global norm; the
        gradient is that of the mean loss over trainable tokens.
    """
    decoder = definition.bind(frozen, params)
    layer = decoder.layer_function(batch.positions, batch.segment_ids, key)
    indices = jnp.arange(definition.config.num_layers, dtype=jnp.int32)
    share = 1.0 / jnp.maximum(jnp.sum(batch.loss_mask), 1.0)

    def forward(h: jax.Array, item: tuple[jax.Array, Tree]) -> tuple[jax.Array, jax.Array]:
        index, adapter = item
        return layer(h, index, adapter), h

    last, inputs = lax.scan(forward, decoder.embed(batch.tokens), (indices, params["layers"]))
    loss, dh = jax.value_and_grad(lambda h: _loss(decoder, h, batch))(last)

    scalars, stacks = _split(moments)
    # Frozen stacks are only read, and stay out of what the loop carries.
    trained, kept = split(params, freeze_a=freezes_a(definition, "adapter"))

    # The slices of the layer that is next are read in the turn before, after that turn's writes: a
    # fusion that reads the stacks while another one writes them would have XLA copy them each turn.
    def backward(carry: tuple[Any, ...], item: tuple[Any, ...]) -> tuple[Any, None]:
        dh, (trained, stacks), (own, arrays), squares, _ = carry
        index, h, rest = item
        _, pull_back = jax.vjp(lambda h, own: layer(h, index, join(own, rest)["layers"]), h, own)
        dh, grads = pull_back(dh)
        grads = jax.tree.map(lambda g: g * share, to_float32(grads))
        squares = squares + sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
        # Every layer counts from the same number of steps.
        updates, state = optimizer.update(grads, _join(moments, scalars, arrays), own)
        own = apply_updates(own, cast(Tree, updates), key, layer=index)
        done, arrays = _split(state)
        whole = _put((trained, stacks), (own, arrays), index)
        return (dh, whole, _at(whole, jnp.maximum(index - 1, 0)), squares, done), None

    whole = (trained, stacks)
    start = (dh, whole, _at(whole, indices[-1]), jnp.float32(0), scalars)
    (_, (trained, stacks), _, squares, scalars), _ = lax.scan(
        backward, start, (indices, inputs, kept), reverse=True
    )
    return join(trained, kept), _join(moments, scalars, stacks), loss, jnp.sqrt(squares)


def _loss(decoder: Decoder, h: jax.Array, batch: Batch) -> jax.Array:
    return decoder.loss(decoder.final_norm(h), batch.targets, batch.loss_mask)


def _at(stacks: Any, index: jax.Array) -> Any:
    """One layer's slice of every stack, with a leading axis of 1 gone."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), stacks)


def _put(stacks: Any, layers: Any, index: jax.Array) -> Any:
    """The stacks with one layer's slice replaced, in place in a compiled loop."""
    return jax.tree.map(
        lambda x, one: lax.dynamic_update_index_in_dim(x, one, index, 0), stacks, layers
    )


def _split(state: Any) -> tuple[list[Any], list[Any]]:
    """The scalars of an optimizer's state, and its arrays, each with None for the others."""
    leaves = jax.tree.leaves(state)
    return (
        [leaf if leaf.ndim == 0 else None for leaf in leaves],
        [None if leaf.ndim == 0 else leaf for leaf in leaves],
    )


def _join(like: Any, scalars: list[Any], arrays: list[Any]) -> Any:
    """The inverse of :func:`_split`, in the structure of ``like``."""
    leaves = [b if a is None else a for a, b in zip(scalars, arrays, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
