"""Norm and quantiser in one kernel, against the same step by step, and its gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import absmax_quantize, gated_product, rms_norm
from fabric_kernels.norm import NormalisedCodes, normalised_codes
from fabric_kernels.norm.triton_rows import MOST_HELD, THREAD, choose_pieces

EPS = 1e-5


def problem(k: int, m: int = 37) -> tuple[jax.Array, ...]:
    """Inputs, gate, gain and gradient."""
    keys = jax.random.split(jax.random.key(k), 4)
    x, gate, d = (jax.random.normal(key, (m, k)) for key in keys[:3])
    return x.at[2].set(0), gate, 1 + 0.1 * jax.random.normal(keys[3], (k,)), d


def step_by_step(x: jax.Array, gate: jax.Array, gain: jax.Array, activation: Any) -> jax.Array:
    if activation is None:
        return rms_norm(x, gain, EPS, implementation="xla")
    return gated_product(gate, x, activation, gain, EPS, implementation="xla")


def fused(x: jax.Array, gate: jax.Array, gain: jax.Array, activation: Any) -> NormalisedCodes:
    own = None if activation is None else gate
    return normalised_codes(x, gain, EPS, gate=own, activation=activation)


@pytest.mark.parametrize("activation", [None, "silu", "relu2"])
# Three pieces; one whole piece; one that is padded.
@pytest.mark.parametrize("k", [96, 128, 200, 768])
def test_codes_scales_and_gradients_are_those_of_the_steps(k: int, activation: Any) -> None:
    x, gate, gain, d = problem(k)
    values, pull = jax.vjp(
        lambda x, gate, gain: step_by_step(x, gate, gain, activation), x, gate, gain
    )
    codes, scale = absmax_quantize(values)
    found, pull_fused = jax.vjp(
        lambda x, gate, gain: fused(x, gate, gain, activation), x, gate, gain
    )
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    # Sums in another order may move a value across the middle between two codes.
    off = np.abs(np.asarray(found.codes, np.int32) - np.asarray(codes, np.int32))
    assert off.max() <= 1
    assert np.mean(off > 0) < 1e-3
    cotangent = NormalisedCodes(
        np.zeros(codes.shape, jax.dtypes.float0),  # pyright: ignore[reportArgumentType]
        jnp.zeros_like(scale),
        d,
    )
    for one, expected in zip(pull_fused(cotangent), pull(d), strict=True):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(one, expected, atol=1e-6 * max(size, 1.0))


def test_a_row_that_is_not_a_number_has_no_scale() -> None:
    x, gate, gain, _ = problem(96)
    scale = fused(x.at[5, 3].set(jnp.nan), gate, gain, None).scale
    assert np.isnan(scale[5, 0])
    assert np.isfinite(np.delete(np.asarray(scale), 5)).all()


def test_refuses_rows_that_are_too_long_and_gates_alone() -> None:
    with pytest.raises(ValueError, match="at most 4096 channels, found 4104"):
        normalised_codes(jnp.zeros((2, 4104)), jnp.ones(4104), EPS)
    with pytest.raises(ValueError, match="a gate needs an activation"):
        normalised_codes(jnp.zeros((2, 8)), jnp.ones(8), EPS, gate=jnp.zeros((2, 8)))


@pytest.mark.parametrize("k", [32, 200, 768, 1536, 2048, 2560, 3072, 4096])
@pytest.mark.parametrize("threads", [128, 256])
def test_pieces_are_a_row_and_fit_the_registers(threads: int, k: int) -> None:
    cut = choose_pieces(32768, k, threads)
    assert cut.size & (cut.size - 1) == 0
    assert 0 <= len(list(cut)) * cut.size - k < cut.size
    assert len(list(cut)) * cut.size * cut.rows <= 32 * cut.warps * max(MOST_HELD, THREAD)
    assert cut.warps <= 8
    assert choose_pieces(37, k, threads).rows == 1
