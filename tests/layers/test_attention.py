"""Attention: values, grouped heads, and what a query must not see."""

from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.attention import attend

B, T, H, K, HD = 2, 7, 6, 2, 8


def heads(seed: int, count: int, dtype: str = "float32") -> jnp.ndarray:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal((B, T, count, HD)), dtype)


def causal_mask() -> np.ndarray:
    return np.broadcast_to(np.tri(T, dtype=bool), (B, T, T)).copy()


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query and one head at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        shared = h // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, shared] @ q[b, t, h] / np.sqrt(q.shape[-1])
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
