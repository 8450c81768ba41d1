"""Values with the gradient of others."""

import jax


@jax.custom_vjp
def with_gradient_of(value: jax.Array, carrier: jax.Array) -> jax.Array:
    """``value``, whose gradient goes to ``carrier``, of the same shape and dtype, as it is."""
    del carrier
    return value


def _with_gradient_fwd(value: jax.Array, carrier: jax.Array) -> tuple[jax.Array, None]:
    del carrier
    return value, None


def _with_gradient_bwd(_: None, g: jax.Array) -> tuple[None, jax.Array]:
    return None, g


with_gradient_of.defvjp(_with_gradient_fwd, _with_gradient_bwd)
