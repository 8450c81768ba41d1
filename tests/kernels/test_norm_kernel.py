"""Norms and gated products against float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import cpu_library, gated_product, rms_norm, rms_norm_beside
from fabric_kernels.norm import Gate
from fabric_kernels.norm.api import Implementation

EPS = 1e-5
WIDTHS = [1, 7, 16, 33, 300]
GATES: list[Gate] = ["silu", "relu2"]


CPU_KERNELS = jax.default_backend() == "cpu" and cpu_library.available()


@pytest.fixture(params=["xla", "cpu", "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cpu" and not CPU_KERNELS:
        pytest.skip("the CPU kernels are not available here")
    return request.param


def sample(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 3, jnp.float32)


def normalised(p: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return p / np.sqrt(np.mean(p * p, axis=-1, keepdims=True) + EPS) * gain


def activated(g: np.ndarray, gate: Gate) -> np.ndarray:
    return g / (1 + np.exp(-g)) if gate == "silu" else np.maximum(g, 0) ** 2


def numeric_gradient(
    f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, dy: np.ndarray
) -> np.ndarray:
    """Central differences of ``sum(f(x) dy)`` in float64."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-5
        out[i] = np.sum((f(x + step) - f(x - step)) * dy) / 2e-5
    return out


def assert_close(found: jax.Array, exact: np.ndarray, bound: float = 2e-6) -> None:
    scale = max(1.0, float(np.abs(exact).max()))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(implementation: Implementation, width: int) -> None:
    x, gain = sample(2, 5, width).at[0, 1].set(0), sample(width, seed=1)
    y = rms_norm(x, gain, EPS, implementation=implementation)
    assert_close(y, normalised(np.asarray(x, np.float64), np.asarray(gain, np.float64)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_product(implementation: Implementation, width: int, gate: Gate) -> None:
    g, up, gain = sample(6, width), sample(6, width, seed=1), sample(width, seed=2)
    wide = [np.asarray(a, np.float64) for a in (g, up, gain)]
    product = activated(wide[0], gate) * wide[1]
    assert_close(gated_product(g, up, gate, implementation=implementation), product)
    y = gated_product(g, up, gate, gain, EPS, implementation=implementation)
    assert_close(y, normalised(product, wide[2]))


@pytest.mark.parametrize("width", [3, 19])
def test_gradients_of_a_norm(implementation: Implementation, width: int) -> None:
    x, gain, dy = sample(2, width), sample(width, seed=1), sample(2, width, seed=2)
    _, pull = jax.vjp(lambda x, g: rms_norm(x, g, EPS, implementation=implementation), x, gain)
    dx, dgain = pull(dy)
    wide = [np.asarray(a, np.float64) for a in (x, gain, dy)]
    assert_close(dx, numeric_gradient(lambda x: normalised(x, wide[1]), wide[0], wide[2]), 1e-5)
    assert_close(dgain, numeric_gradient(lambda g: normalised(wide[0], g), wide[1], wide[2]), 1e-5)


@pytest.mark.parametrize("width", [3, 19])
def test_gradients_beside_a_norm(implementation: Implementation, width: int) -> None:
    """Both results read ``x``: its gradient is the sum, also where one of them is not used."""
    x, gain = sample(2, 3, width), sample(width, seed=1)
    dy, other = sample(2, 3, width, seed=2), sample(2, 3, width, seed=3)

    def both(x: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rms_norm_beside(x, gain, EPS, implementation=implementation)

    (y, same), pull = jax.vjp(both, x, gain)
    dx, dgain = pull((dy, other))
    wide = [np.asarray(a, np.float64) for a in (x, gain, dy, other)]
    exact = numeric_gradient(lambda x: normalised(x, wide[1]), wide[0], wide[2])
    assert_close(y, normalised(wide[0], wide[1]))
    np.testing.assert_array_equal(same, x)
    assert_close(dx, exact + wide[3], 1e-5)
    assert_close(dgain, numeric_gradient(lambda g: normalised(wide[0], g), wide[1], wide[2]), 1e-5)
    assert_close(jax.vjp(lambda x: both(x, gain)[0], x)[1](dy)[0], exact, 1e-5)
    np.testing.assert_array_equal(jax.vjp(lambda x: both(x, gain)[1], x)[1](other)[0], other)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_gradients_of_a_gated_product(
    implementation: Implementation, gate: Gate, with_norm: bool
) -> None:
    g, up, dy = (sample(2, 19, seed=seed) for seed in range(3))
    gain = sample(19, seed=3) if with_norm else None

    def run(g: jax.Array, up: jax.Array) -> jax.Array:
        return gated_product(g, up, gate, gain, EPS, implementation=implementation)

    d_gate, d_up = jax.vjp(run, g, up)[1](dy)
    wide = [np.asarray(a, np.float64) for a in (g, up, dy)]

    def exact(g: np.ndarray, up: np.ndarray) -> np.ndarray:
        product = activated(g, gate) * up
        return product if gain is None else normalised(product, np.asarray(gain, np.float64))

    assert_close(d_gate, numeric_gradient(lambda g: exact(g, wide[1]), wide[0], wide[2]), 1e-5)
    assert_close(d_up, numeric_gradient(lambda u: exact(wide[0], u), wide[1], wide[2]), 1e-5)


def test_extreme_gates(implementation: Implementation) -> None:
    g = jnp.asarray([[-200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 3e38]])
    y = gated_product(g, jnp.ones_like(g), "silu", implementation=implementation)
    np.testing.assert_allclose(y, [[0, 0, 0, 0, 0, 88, 200, 3e38]], rtol=1e-6, atol=1e-30)
    bad = gated_product(jnp.full((1, 5), jnp.nan), jnp.ones((1, 5)), "relu2")
    assert np.isnan(bad).all()


def test_jit_scan_checkpoint_and_vmap(implementation: Implementation) -> None:
    x, gain = sample(4, 21), sample(21, seed=1)

    def run(x: jax.Array) -> jax.Array:
        return rms_norm(x, gain, EPS, implementation=implementation)

    expected = run(x)
    np.testing.assert_allclose(jax.vmap(run)(x), expected, rtol=1e-6)
    body = jax.checkpoint(lambda h, _: (run(h), None))

    def deep(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, None, length=3)[0]))

    straight = jax.grad(lambda x: jnp.sum(jnp.sin(run(run(run(x))))))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(deep))(x), straight, rtol=2e-4, atol=1e-6)


def test_half_precision_keeps_its_dtype() -> None:
    x = sample(3, 20).astype(jnp.bfloat16)
    assert rms_norm(x, jnp.ones(20), EPS).dtype == jnp.bfloat16
    assert gated_product(x, x, "silu", jnp.ones(20), EPS).dtype == jnp.bfloat16


@pytest.mark.parametrize("gate", [None, *GATES])
def test_half_precision_is_rounded_at_the_end(
    implementation: Implementation, gate: Gate | None
) -> None:
    rows = [sample(5, 300, seed=seed).astype(jnp.bfloat16) for seed in range(3)]
    gain = sample(300, seed=3).astype(jnp.bfloat16)

    def run(x: jax.Array, up: jax.Array) -> jax.Array:
        if gate is None:
            return rms_norm(x, gain, EPS, implementation=implementation)
        return gated_product(x, up, gate, gain, EPS, implementation=implementation)

    y, pull = jax.vjp(run, *rows[:2])
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in (*rows, gain)]

    def exact(x: np.ndarray, up: np.ndarray) -> np.ndarray:
        return normalised(x if gate is None else activated(x, gate) * up, wide[3])

    assert_close(y, exact(*wide[:2]), 2**-7)
    d_x, d_up = pull(rows[2])
    # A few entries: the numeric gradient goes through a row for each of them.
    few = np.s_[:1]
    x, up, dy = (a[few] for a in wide[:3])
    assert_close(d_x[few], numeric_gradient(lambda x: exact(x, up), x, dy), 2**-6)
    if gate is not None:
        assert_close(d_up[few], numeric_gradient(lambda up: exact(x, up), up, dy), 2**-6)


def test_an_unknown_implementation_raises() -> None:
    with pytest.raises(ValueError, match="norms have the implementations xla, cpu, triton"):
        rms_norm(jnp.ones((2, 3)), jnp.ones(3), EPS, implementation="cuda")  # pyright: ignore
