"""Attention: values, grouped heads, and what a query must not see."""

from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.attention import Attention, attend
from fabric_jax.layers.bit_linear import LinearOptions
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.layers.rope import rotary_angles
from tests.layers.binding import bind

B, T, H, K, HD = 2, 7, 6, 2, 8


def heads(seed: int, count: int, dtype: str = "float32") -> jnp.ndarray:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal((B, T, count, HD)), dtype)


def causal_mask() -> np.ndarray:
    return np.broadcast_to(np.tri(T, dtype=bool), (B, T, T)).copy()


def exact_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float = HD**-0.5
) -> np.ndarray:
    """One query and one head at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        shared = h // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, shared] @ q[b, t, h] * scale
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, shared] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6], ids=lambda n: f"{n}-kv-heads")
def test_equals_float64(kv_heads: int) -> None:
    q, k, v = heads(0, H), heads(1, kv_heads), heads(2, kv_heads)
    mask = causal_mask()
    mask[1, :, 1] = False
    mask[1, 1, 0] = True
    found = attend(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(found, exact_attention(q, k, v, mask), rtol=0, atol=2e-6)


def test_scores_take_a_scale_of_their_own() -> None:
    q, k, v, mask = heads(0, H), heads(1, K), heads(2, K), causal_mask()
    found = attend(q, k, v, jnp.asarray(mask), 0.7)
    np.testing.assert_allclose(found, exact_attention(q, k, v, mask, 0.7), rtol=0, atol=2e-6)


def test_queries_and_keys_are_normalised_before_they_turn() -> None:
    """Against float64; values are left as they are."""
    options = LinearOptions(
        mode="float",
        dtype="float32",
        act_quant="none",
        implementation=None,
        lora=LoraConfig(rank=0),
        stack=(),
    )
    module = Attention(
        hidden_size=16,
        num_heads=H,
        num_kv_heads=K,
        head_dim=HD,
        sub_norm_eps=None,
        qk_norm_eps=1e-6,
        norm_offset=1.0,
        options=options,
    )
    random = np.random.default_rng(3)
    rows = {"q": H * HD, "k": K * HD, "v": K * HD}
    weights = {name: random.normal(size=(n, 16)).astype(np.float32) for name, n in rows.items()}
    gains = {name: random.normal(size=HD).astype(np.float32) for name in ("q_norm", "k_norm")}
    tree = {name: {"weight": jnp.asarray(w)} for name, w in weights.items()}
    tree |= {name: {"gain": jnp.asarray(g)} for name, g in gains.items()}
    tree |= {"o": {"weight": jnp.zeros((16, H * HD), jnp.float32)}}
    x = random.normal(size=(B, T, 16)).astype(np.float32)
    angles = rotary_angles(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T)), HD, 1e4)
    found = bind(module, tree).project(None, jnp.asarray(x), angles, None)[0]
    for name, array in zip("qkv", found, strict=True):
        exact = x.astype(np.float64) @ weights[name].astype(np.float64).T
        exact = exact.reshape(B, T, -1, HD)
        if name != "v":
            exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
            exact = exact * (1 + gains[f"{name}_norm"])
            turns = np.asarray(angles[0], np.float64) + 1j * np.asarray(angles[1], np.float64)
            pairs = (exact[..., : HD // 2] + 1j * exact[..., HD // 2 :]) * turns[:, :, None]
            exact = np.concatenate([pairs.real, pairs.imag], -1)
        np.testing.assert_allclose(array, exact, rtol=0, atol=2e-5)


def test_bfloat16_keeps_its_dtype_with_a_float32_softmax() -> None:
    q, k, v = (heads(i, n, "bfloat16") for i, n in enumerate((H, K, K)))
    found = attend(q, k, v, jnp.asarray(causal_mask()))
    assert found.dtype == jnp.bfloat16
    exact = exact_attention(*(np.asarray(a, np.float32) for a in (q, k, v)), causal_mask())
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=2e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = heads(0, H) * 1e4, heads(1, K) * 1e4, heads(2, K)
    assert bool(jnp.all(jnp.isfinite(attend(q, k, v, jnp.asarray(causal_mask())))))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_hidden_keys_and_values_change_nothing(data: st.DataObject) -> None:
    """Whatever the mask, a query's output is bit for bit the same when unseen slots change."""
    bits = data.draw(st.lists(st.booleans(), min_size=T * T, max_size=T * T))
    mask = np.array(bits).reshape(1, T, T) | np.eye(T, dtype=bool)
    mask = np.repeat(mask, B, 0)
    column = data.draw(st.integers(0, T - 1))
    q, k, v = heads(0, H), heads(1, K), heads(2, K)
    before = attend(q, k, v, jnp.asarray(mask))
    after = attend(
        q, k.at[:, column].add(3.0), v.at[:, column].set(jnp.float32(1e3)), jnp.asarray(mask)
    )
    blind = ~mask[:, :, column]
    np.testing.assert_array_equal(np.asarray(before)[blind], np.asarray(after)[blind])
    assert np.all(np.any(np.asarray(before)[~blind] != np.asarray(after)[~blind], axis=(-1, -2)))


@pytest.mark.oracle
def test_equals_eager_attention_of_llama(oracle: Callable[..., list[ModuleType]]) -> None:
    torch, llama = oracle("torch", "transformers.models.llama.modeling_llama")
    q, k, v = heads(0, H), heads(1, K), heads(2, K)
    module = torch.nn.Module()
    module.num_key_value_groups = H // K
    module.eval()
    mask = torch.where(torch.from_numpy(causal_mask())[:, None], 0.0, float("-inf"))
    tensors = [torch.from_numpy(np.array(a)).transpose(1, 2) for a in (q, k, v)]
    expected, _ = llama.eager_attention_forward(module, *tensors, mask, HD**-0.5)
    found = attend(q, k, v, jnp.asarray(causal_mask()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
