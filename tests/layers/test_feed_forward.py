"""The gated feed-forward and its activations."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.layers.bit_linear import LinearOptions
from fabric_jax.layers.feed_forward import ACTIVATIONS, Activation, FeedForward
from fabric_jax.layers.lora import LoraConfig
from tests.layers.binding import bind

HF_NAMES = {"silu": "silu", "relu2": "relu2", "gelu": "gelu_pytorch_tanh"}
X = np.concatenate([np.linspace(-20, 20, 401), [0.0, -0.0, 1e-6, 88.0, -100.0]]).astype(np.float32)


def exact_activation(name: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_float64(name: Activation) -> None:
    found = ACTIVATIONS[name](jnp.asarray(X))
    np.testing.assert_allclose(found, exact_activation(name, X), rtol=2e-6, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(
    name: Activation, oracle: Callable[..., list[ModuleType]]
) -> None:
    torch, activations = oracle("torch", "transformers.activations")
    x = torch.from_numpy(X.copy()).requires_grad_()
    expected = activations.ACT2FN[HF_NAMES[name]](x)
    expected.sum().backward()
    y, pull = jax.vjp(ACTIVATIONS[name], jnp.asarray(X))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=2e-6, atol=1e-6)
    # A tanh near -1 that is off by some ulps is multiplied by nine in the gradient of gelu.
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], x.grad.numpy(), rtol=5e-6, atol=1.5e-5)


@pytest.mark.parametrize("sub_norm", [False, True], ids=["plain", "sub-norm"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_equals_float64(name: Activation, sub_norm: bool) -> None:
    random = np.random.default_rng(0)
    shapes = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}
    weights = {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    gain = random.standard_normal(24).astype(np.float32)
    x = random.standard_normal((2, 3, 16)).astype(np.float32)
    options = LinearOptions(
        mode="float",
        dtype="float32",
        act_quant="none",
        implementation=None,
        lora=LoraConfig(rank=0),
        stack=(),
    )
    module = FeedForward(
        hidden_size=16,
        ffn_size=24,
        activation=name,
        sub_norm_eps=1e-5 if sub_norm else None,
        options=options,
    )
    tree = {k: {"weight": jnp.asarray(w)} for k, w in weights.items()}
    if sub_norm:
        tree["sub_norm"] = {"gain": jnp.asarray(gain)}
    wide = {k: w.astype(np.float64) for k, w in weights.items()}
    product = exact_activation(name, x @ wide["gate"].T) * (x @ wide["up"].T)
    if sub_norm:
        product = product / np.sqrt(np.mean(product**2, -1, keepdims=True) + 1e-5) * gain
    exact = product @ wide["down"].T
    found = bind(module, tree)(jnp.asarray(x))
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-6 * np.abs(exact).max())
