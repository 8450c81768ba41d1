"""The linear of master weights: what it computes, what its gradients are, and its variants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import pack
from scipy.linalg import hadamard

from fabric_jax.errors import FabricError
from fabric_jax.quantization.absmax import absmax_fake_quantize
from fabric_jax.quantization.absmean import absmean_fake_quantize, absmean_quantize
from fabric_jax.quantization.hadamard import hadamard_transform
from fabric_jax.quantization.master_linear import activation_codes, master_linear, weight_codes
from fabric_jax.quantization.packed_linear import packed_linear
from fabric_jax.quantization.ste_options import GROUP, SteOptions, check_packable

N, K = 24, 200


def operands(dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs [3, 5, K], a master [N, K] and a gradient [3, 5, N]."""
    random = np.random.default_rng(0)
    x, g = random.standard_normal((3, 5, K)), random.standard_normal((3, 5, N))
    w = 0.02 * random.standard_normal((N, K))
    w[0, 0] = 1.0
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(g, dtype)


def gradients(**options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, g = operands()
    y, pull = jax.vjp(lambda x, w: master_linear(x, w, **options), x, w)
    return (y, *pull(g))


@pytest.mark.parametrize("product", ["float", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_those_of_the_packed_linear_bit_for_bit(dtype: str, product: Any) -> None:
    x, w, _ = operands(dtype)
    codes, scale = absmean_quantize(w)
    found = master_linear(x, w, ste=SteOptions(product=product))
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, packed_linear(x, pack(codes, "ternary2"), scale))


@pytest.mark.parametrize("product", ["float", "int8"])
def test_gradients_take_quantised_values_and_no_mask(product: Any) -> None:
    x, w, g = (np.asarray(a, np.float64) for a in operands())
    x_hat = np.asarray(absmax_fake_quantize(jnp.asarray(x, jnp.float32)), np.float64)
    w_hat = np.asarray(absmean_fake_quantize(jnp.asarray(w, jnp.float32)), np.float64)
    _, dx, dw = gradients(ste=SteOptions(product=product))
    np.testing.assert_allclose(dx, g @ w_hat, atol=1e-6 * np.abs(g @ w_hat).max())
    expected = np.einsum("abn,abk->nk", g, x_hat)
    np.testing.assert_allclose(dw, expected, atol=1e-6 * np.abs(expected).max())
    assert dw[0, 0] != 0


def test_clipped_gradients_stop_beyond_the_scale() -> None:
    w = np.asarray(operands()[1])
    _, _, free = gradients()
    _, _, clipped = gradients(ste=SteOptions(weight_gradient="clipped"))
    inside = np.abs(w) <= np.abs(w).mean()
    assert 0.3 < inside.mean() < 0.9
    np.testing.assert_array_equal(clipped, np.where(inside, free, 0))


@pytest.mark.parametrize("kind", ["channel", "group"])
def test_scales_by_channel_and_group(kind: Any) -> None:
    w = np.asarray(operands()[1], np.float64)
    codes, scale = weight_codes(jnp.asarray(w, jnp.float32), SteOptions(weight_scale=kind))
    size = K if kind == "channel" else GROUP
    for start in range(0, K, size):
        part = w[:, start : start + size]
        mean = np.abs(part).mean(1, keepdims=True)
        np.testing.assert_array_equal(
            codes[:, start : start + size], np.clip(np.rint(part / mean), -1, 1)
        )
        found = np.broadcast_to(scale, w.shape)[:, start : start + size]
        np.testing.assert_allclose(found, np.broadcast_to(mean, part.shape), rtol=1e-6)
    y = gradients(ste=SteOptions(weight_scale=kind))[0]
    x_hat = np.asarray(absmax_fake_quantize(operands()[0]), np.float64)
    exact = x_hat @ np.asarray(codes * scale, np.float64).T
    np.testing.assert_allclose(y, exact, atol=2e-6 * np.abs(exact).max())


def test_stochastic_rounding_is_right_on_average_and_needs_a_key() -> None:
    w = jnp.linspace(-0.03, 0.03, 60).reshape(3, 20)
    ste = SteOptions(weight_rounding="stochastic")
    nearest, scale = weight_codes(w, ste)
    np.testing.assert_array_equal(nearest, weight_codes(w, SteOptions())[0])
    keys = jax.random.split(jax.random.key(0), 2000)
    mean = jax.vmap(lambda key: weight_codes(w, ste, key)[0])(keys).mean(0)
    np.testing.assert_allclose(mean, np.clip(w / scale, -1, 1), atol=0.05)


def test_int4_hybrid_activations() -> None:
    """Equation 3 of arXiv:2411.04965 for q; the larger half in int8 for o; int8 for down."""
    x, ste = np.asarray(operands()[0], np.float64), SteOptions(activations="int4-hybrid")
    codes, scale = activation_codes(jnp.asarray(x, jnp.float32), "q", ste)
    mean = np.abs(x).mean(-1, keepdims=True)
    np.testing.assert_array_equal(codes, np.clip(np.rint(np.sqrt(7) / (mean + 1e-5) * x), -8, 7))
    np.testing.assert_allclose(scale, np.sqrt(7) / (mean + 1e-5), rtol=1e-6)
    kept, _ = activation_codes(jnp.asarray(x, jnp.float32), "o", ste)
    median = np.sort(np.abs(x), -1)[..., K // 2, None]
    assert not np.any(np.asarray(kept)[np.abs(x) < median])
    assert np.mean(np.asarray(kept) != 0) == pytest.approx(0.5, abs=0.01)
    whole, _ = activation_codes(jnp.asarray(x, jnp.float32), "down", ste)
    np.testing.assert_array_equal(
        whole, activation_codes(jnp.asarray(x, jnp.float32), "q", SteOptions())[0]
    )


@pytest.mark.parametrize("k", [8, 24, 256])
def test_hadamard_is_the_textbook_matrix_by_blocks(k: int) -> None:
    x = np.random.default_rng(k).standard_normal((3, k)).astype(np.float32)
    m = k & -k
    matrix = np.kron(np.eye(k // m), hadamard(m) / np.sqrt(m))
    found = hadamard_transform(jnp.asarray(x))
    np.testing.assert_allclose(found, x @ matrix, atol=2e-5)
    np.testing.assert_allclose(hadamard_transform(found), x, atol=2e-5)


def test_hadamard_turns_the_inputs_of_closing_linears_alone() -> None:
    x, w, _ = operands()
    ste = SteOptions(hadamard=True)
    np.testing.assert_array_equal(master_linear(x, w, name="q", ste=ste), master_linear(x, w))
    turned = master_linear(hadamard_transform(x), w)
    np.testing.assert_array_equal(master_linear(x, w, name="down", ste=ste), turned)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_goes_from_plain_to_quantised(strength: float) -> None:
    x, w, g = (np.asarray(a, np.float64) for a in operands())
    x_hat = np.asarray(absmax_fake_quantize(operands()[0]), np.float64)
    w_hat = np.asarray(absmean_fake_quantize(operands()[1]), np.float64)
    x_mid, w_mid = x + strength * (x_hat - x), w + strength * (w_hat - w)
    y, dx, dw = gradients(strength=jnp.float32(strength))
    for found, exact in (
        (y, x_mid @ w_mid.T),
        (dx, g @ w_mid),
        (dw, np.einsum("abn,abk->nk", g, x_mid)),
    ):
        np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max())
    if strength == 1.0:
        np.testing.assert_array_equal(y, gradients()[0])


def test_what_packed_weights_can_not_express_is_named() -> None:
    check_packable(SteOptions(weight_gradient="clipped", weight_rounding="stochastic"), "m")
    with pytest.raises(FabricError, match="m was trained with a weight scale for each channel and"):
        check_packable(SteOptions(weight_scale="channel", hadamard=True), "m")
    with pytest.raises(FabricError, match="have no variants of their quantiser"):
        SteOptions(weights="none", hadamard=True)
