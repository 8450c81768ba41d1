"""LoRA: its formula, its names, its scale, dropout, and the base it leaves alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BaseMode, BitLinear, LayerContext, LinearOptions
from fabric_jax.layers.lora import Lora, LoraConfig
from tests.layers.binding import bind

N, K, R = 12, 20, 3


def arrays(seed: int = 0, b_zero: bool = False) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    b = np.zeros((R, N)) if b_zero else random.standard_normal((R, N))
    return {
        "a": jnp.asarray(random.standard_normal((R, K)), jnp.float32),
        "b": jnp.asarray(b, jnp.float32),
    }


def sample(dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).standard_normal((2, 5, K)), dtype)


@pytest.mark.parametrize(
    ("rslora", "scale"), [(False, 16 / 3), (True, 16 / math.sqrt(3))], ids=["lora", "rslora"]
)
def test_output_is_scale_b_a_x(rslora: bool, scale: float) -> None:
    tree = arrays()
    lora = bind(Lora(N, K, LoraConfig(rank=R, alpha=16, rslora=rslora)), tree)
    a, b, x = (np.asarray(v, np.float64) for v in (tree["a"], tree["b"], sample()))
    np.testing.assert_allclose(lora(sample()), x @ a.T @ b * scale, rtol=0, atol=2e-4)
    assert LoraConfig(rank=R, alpha=16, rslora=rslora).scale == pytest.approx(scale)


def base_arrays(mode: BaseMode) -> dict[str, jax.Array]:
    random = np.random.default_rng(4)
    if mode == "packed":
        packed = random.integers(0, 3, (N, K // 4, 4)) << np.array([0, 2, 4, 6])
        return {"weight": jnp.asarray(packed.sum(-1), jnp.uint8), "scale": jnp.float32(0.3)}
    return {"weight": jnp.asarray(random.standard_normal((N, K)), jnp.float32)}


def layer(mode: BaseMode, lora: LoraConfig, tree: dict[str, Any]) -> BitLinear:
    options = LinearOptions(
        mode=mode,
        dtype="float32",
        act_quant="per_token",
        implementation=None,
        lora=lora,
        stack=(),
    )
    return bind(BitLinear("q", N, K, options), tree)


@pytest.mark.parametrize("mode", ["packed", "master", "float"])
def test_with_b_zero_the_output_is_the_base_output_exactly(mode: BaseMode) -> None:
    base = base_arrays(mode)
    plain = layer(mode, LoraConfig(rank=0), base)(sample())
    adapted = layer(mode, LoraConfig(rank=R), {**base, "lora": arrays(b_zero=True)})(sample())
    np.testing.assert_array_equal(adapted, plain)


@pytest.mark.parametrize("mode", ["packed", "master", "float"])
def test_the_adapter_reads_the_unquantised_input(mode: BaseMode) -> None:
    base, tree, config = base_arrays(mode), arrays(), LoraConfig(rank=R, alpha=6)
    plain = layer(mode, LoraConfig(rank=0), base)(sample())
    adapted = layer(mode, config, {**base, "lora": tree})(sample())
    a, b, x = (np.asarray(v, np.float64) for v in (tree["a"], tree["b"], sample()))
    share = x @ a.T @ b * 2
    np.testing.assert_allclose(np.asarray(adapted) - np.asarray(plain), share, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_formula() -> None:
    """With B as [R, N]: ``dA = s·(gB^T)^T x``, ``dB = s·(xA^T)^T g``, ``dx = s·(gB^T)A``."""
    tree, config = arrays(), LoraConfig(rank=R, alpha=6)
    g = np.random.default_rng(5).standard_normal((2, 5, N)).astype(np.float32)

    def forward(x: jax.Array, tree: dict[str, jax.Array]) -> jax.Array:
        return bind(Lora(N, K, config), tree)(x)

    _, pull = jax.vjp(forward, sample(), tree)
    dx, grads = pull(jnp.asarray(g))
    a, b = (np.asarray(tree[name], np.float64) for name in "ab")
    x, wide = np.asarray(sample(), np.float64).reshape(-1, K), g.reshape(-1, N).astype(np.float64)
    np.testing.assert_allclose(grads["a"], 2 * (wide @ b.T).T @ x, rtol=0, atol=2e-4)
    np.testing.assert_allclose(grads["b"], 2 * (x @ a.T).T @ wide, rtol=0, atol=2e-4)
    np.testing.assert_allclose(dx.reshape(-1, K), 2 * wide @ b.T @ a, rtol=0, atol=2e-4)


def test_dropout_happens_only_with_a_key() -> None:
    tree, x = arrays(), sample()
    with_dropout = bind(Lora(N, K, LoraConfig(rank=R, dropout=0.5)), tree)
    without = bind(Lora(N, K, LoraConfig(rank=R)), tree)
    key = jax.random.key(0)
    np.testing.assert_array_equal(with_dropout(x), without(x))
    np.testing.assert_array_equal(without(x, key), without(x))
    assert not np.array_equal(with_dropout(x, key), without(x))
    np.testing.assert_array_equal(with_dropout(x, key), with_dropout(x, key))
    assert not np.array_equal(with_dropout(x, key), with_dropout(x, jax.random.key(1)))


def test_dropout_keeps_the_mean() -> None:
    tree, x = arrays(), sample()
    lora = bind(Lora(N, K, LoraConfig(rank=R, dropout=0.25)), tree)
    samples = jax.vmap(lambda key: lora(x, key))(jax.random.split(jax.random.key(2), 4000))
    error = jnp.mean(samples, 0) - lora(x)
    spread = jnp.std(samples, 0) / math.sqrt(4000)
    assert float(jnp.max(jnp.abs(error) / spread)) < 5


def test_linears_of_one_key_drop_different_channels() -> None:
    tree, x, key = {"weight": jnp.zeros((N, K)), "lora": arrays()}, sample(), jax.random.key(3)
    options = LinearOptions(
        mode="float",
        dtype="float32",
        act_quant="none",
        implementation=None,
        lora=LoraConfig(rank=R, dropout=0.5),
        stack=(),
    )
    q, k = (bind(BitLinear(name, N, K, options), tree) for name in ("q", "k"))
    context = LayerContext(dropout_key=key)
    assert not np.array_equal(q(x, context), k(x, context))


def test_bfloat16_input_and_bfloat16_adapter() -> None:
    tree = {name: value.astype(jnp.bfloat16) for name, value in arrays().items()}
    lora = bind(Lora(N, K, LoraConfig(rank=R, adapter_dtype="bfloat16")), tree)
    assert lora(sample("bfloat16")).dtype == jnp.bfloat16
    assert lora(sample()).dtype == jnp.float32


@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        (("attention",), {"q", "k", "v", "o"}),
        (("mlp",), {"gate", "up", "down"}),
        (("all",), {"q", "k", "v", "o", "gate", "up", "down"}),
        (("q", "mlp"), {"q", "gate", "up", "down"}),
        (("o",), {"o"}),
    ],
    ids=["attention", "mlp", "all", "q-and-mlp", "o"],
)
def test_targets(targets: tuple[str, ...], linears: set[str]) -> None:
    config = LoraConfig(targets=targets)
    assert config.linears == linears
    assert {name for name in LoraConfig().linears if config.covers(name)} == linears
    assert not any(LoraConfig(rank=0).covers(name) for name in linears)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("atention",)}, "unknown LoRA target 'atention'.*Did you mean 'attention'"),
        ({"targets": ()}, "LoRA has no targets"),
        ({"rank": -1}, "LoRA rank out of range.*found -1"),
        ({"dropout": 1.0}, "LoRA dropout out of range.*found 1.0"),
    ],
    ids=["unknown-target", "no-targets", "negative-rank", "dropout-1"],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        LoraConfig(**arguments)


def test_targets_with_ranks_and_alphas_of_their_own() -> None:
    config = LoraConfig(
        rank=8, alpha=16, ranks=(("down", 4), ("attention", 32)), alphas=(("q", 64.0), ("up", 16.0))
    )
    same = (("q", 32), ("k", 32), ("v", 32), ("o", 32), ("down", 4))
    assert config == LoraConfig(rank=8, alpha=16, ranks=same, alphas=(("q", 64.0),))
    assert hash(config) == hash(LoraConfig(rank=8, ranks=same, alphas=(("q", 64.0),)))
    found = {name: (config.of(name).rank, config.of(name).scale) for name in config.linears}
    own = {"q": (32, 2.0), "k": (32, 0.5), "v": (32, 0.5), "o": (32, 0.5), "down": (4, 4.0)}
    assert found == own | {"gate": (8, 2.0), "up": (8, 2.0)}
    rooted = LoraConfig(rank=8, alpha=16, ranks=(("q", 16),), rslora=True)
    assert rooted.of("q").scale == 4
    tree = {**base_arrays("float"), "lora": arrays()}
    layered = layer("float", LoraConfig(rank=9, alpha=9, ranks=(("q", R),)), tree)
    assert layered.lora is not None
    assert layered.lora.scale == 9 / R
    assert layered.lora.a.shape == (R, K)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": (("q", 4), ("attention", 2))}, "gives q more than one rank"),
        ({"targets": ("mlp",), "ranks": (("q", 4),)}, "gives q rank 4, but q is no target"),
        ({"ranks": (("qq", 4),)}, "unknown LoRA target 'qq'"),
        ({"ranks": (("q", 0),)}, "LoRA rank of q out of range"),
        ({"alphas": (("q", math.nan),)}, "alpha out of range: q has nan"),
        ({"alpha": math.inf}, "alpha out of range: the adapter has inf"),
    ],
)
def test_bad_settings_of_single_targets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        LoraConfig(**arguments)


def test_a_rank_above_a_dimension_names_both() -> None:
    with pytest.raises(FabricError, match=r"LoRA rank 13 .*\[12, 20\].*expected at most 12"):
        Lora(N, K, LoraConfig(rank=13))
    Lora(N, K, LoraConfig(rank=12))
