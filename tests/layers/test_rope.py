"""Rotary positions against complex rotation and against Llama's."""

from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.layers.rope import RopeScaling, rotary_angles, rotary_frequencies, rotate

POSITIONS = np.array([[0, 1, 2, 7, 100, 4095], [5, 0, 0, 3, 2047, 32767]], np.int32)


@pytest.mark.parametrize(("head_dim", "theta"), [(4, 1e4), (96, 1e4), (128, 5e5), (256, 1000042.0)])
def test_equals_a_rotation_in_the_complex_plane(head_dim: int, theta: float) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 3, head_dim)).astype(np.float32)
    half = head_dim // 2
    frequencies = (theta ** (-np.arange(half) / half)).astype(np.float32).astype(np.float64)
    # The angle is a float32 product; from there on everything is exact here.
    angles = POSITIONS.astype(np.float32)[..., None] * frequencies.astype(np.float32)[None, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles.astype(np.float64))[
        :, :, None
    ]
    exact = np.concatenate([turned.real, turned.imag], -1)
    found = rotate(jnp.asarray(x), rotary_angles(jnp.asarray(POSITIONS), head_dim, theta))
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-6)


def test_linear_scaling_makes_positions_denser() -> None:
    scaling = RopeScaling(kind="linear", factor=8.0)
    positions = jnp.asarray(POSITIONS // 8 * 8)
    scaled = rotary_angles(positions, 256, 1e6, scaling)
    plain = rotary_angles(positions // 8, 256, 1e6)
    np.testing.assert_array_equal(scaled, plain)


def test_llama3_scaling_by_the_number_of_turns() -> None:
    """More than 4 turns in 8192 tokens: kept; less than 1: divided; between: in between."""
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )
    plain, scaled = rotary_frequencies(128, 5e5), rotary_frequencies(128, 5e5, scaling)
    turns = 8192 * plain.astype(np.float64) / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_array_equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() >= 3
    share = (scaled / plain)[between]
    np.testing.assert_allclose(share, 1 / 8 + 7 / 8 * (turns[between] - 1) / 3, rtol=1e-6)


def test_position_0_turns_nothing() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 3, 8)), jnp.float32)
    angles = rotary_angles(jnp.zeros((1, 2), jnp.int32), 8, 1e4)
    np.testing.assert_array_equal(rotate(x, angles), x)


def test_products_depend_on_the_distance_alone() -> None:
    random = np.random.default_rng(2)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 1, 32)), jnp.float32) for _ in range(2))

    def product(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, rotary_angles(jnp.full((1, 1), at, jnp.int32), 32, 1e4))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-3)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


@pytest.mark.oracle
def test_equals_llama(oracle: Callable[..., list[ModuleType]]) -> None:
    torch, llama, transformers = oracle(
        "torch", "transformers.models.llama.modeling_llama", "transformers"
    )
    config = transformers.LlamaConfig(
        hidden_size=192,
        num_attention_heads=2,
        head_dim=96,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    x = np.random.default_rng(3).standard_normal((1, 6, 2, 96)).astype(np.float32)
    positions = POSITIONS[:1]
    tx = torch.from_numpy(x).transpose(1, 2)
    cos, sin = llama.LlamaRotaryEmbedding(config)(tx, torch.from_numpy(positions).long())
    expected = llama.apply_rotary_pos_emb(tx, tx, cos, sin)[0].transpose(1, 2).numpy()
    found = np.asarray(rotate(jnp.asarray(x), rotary_angles(jnp.asarray(positions), 96, 1e4)))
    # torch's float32 powers differ by up to 5e-7 relative, which the position multiplies.
    bound = 2e-6 + 1e-6 * positions.astype(np.float64)[..., None, None]
    assert np.all(np.abs(found - expected) <= bound)
