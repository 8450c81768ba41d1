"""Rows of an embedding: the stored ones, and no other form of the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.typing import DTypeLike

from fabric_jax.layers.parameters import BaseParam
from fabric_jax.layers.table import table_rows

ROWS, WIDTH = 4096, 64


def table(dtype: DTypeLike) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (ROWS, WIDTH)).astype(dtype)


def rows(value: jax.Array, indices: jax.Array) -> jax.Array:
    return table_rows(BaseParam(value), indices, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_are_those_of_the_table(dtype: str):
    value = table(dtype)
    indices = jnp.asarray([[0, ROWS - 1], [7, 7]], jnp.int32)
    expected = np.asarray(value)[np.asarray(indices)].astype(np.float32)
    np.testing.assert_array_equal(jax.jit(rows)(value, indices), expected)


def test_a_loop_over_steps_widens_no_table():
    def steps(value: jax.Array, token: jax.Array) -> jax.Array:
        def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            token, total = carry
            return (token + 1) % ROWS, total + rows(value, token)

        return lax.fori_loop(0, 8, step, (token, jnp.zeros((1, WIDTH))))[1]

    token = jnp.zeros(1, jnp.int32)
    memory = jax.jit(steps).lower(table("bfloat16"), token).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < ROWS * WIDTH


def test_gradient_of_a_trained_table():
    indices = jnp.asarray([3, 5, 3], jnp.int32)
    gradient = jax.jit(jax.grad(lambda value: jnp.sum(rows(value, indices))))(table("float32"))
    expected = np.zeros((ROWS, WIDTH), np.float32)
    np.add.at(expected, np.asarray(indices), 1.0)
    np.testing.assert_array_equal(gradient, expected)
