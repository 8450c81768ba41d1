"""A norm that is quantised in its own launch: the norm kernel's values, the quantiser's codes."""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import LowRank, TernaryWeight, pack, ternary_linear, unpack
from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.norm import Gate
from fabric_kernels.norm.triton import How, norm
from fabric_kernels.norm.triton_codes import forward
from fabric_kernels.ternary_matmul import adapted_after as adapted_after
from fabric_kernels.ternary_matmul import apply_prologue, mosaic_gpu_rows, normalises
from fabric_kernels.ternary_matmul.prologue import Prologue
from fabric_kernels.triton_call import Mode, on_platform

EPS = 1e-5
adapted: Any = import_module("fabric_kernels.ternary_matmul.adapted_after")
SCALES = (0.031, 1.7)


def rows(m: int, n: int, dtype: Any, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(m, n)) * np.exp(rng.normal(size=(m, 1))), dtype)


def exactly(f: Any) -> Any:
    """Compiled; what rounds to half precision does so, as within a Triton kernel."""
    return jax.jit(f, compiler_options={"xla_allow_excess_precision": False})


def run(
    x: tuple[jax.Array, ...], gain: jax.Array, activation: Gate | None, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    scales = [
        (jnp.asarray([7.0, SCALES[0]], jnp.float32), jnp.asarray([1], jnp.int32)),
        (jnp.asarray([SCALES[1]], jnp.float32), jnp.asarray([4], jnp.int32)),
    ]

    def call(x: Any, gain: jax.Array, scales: Any, *, mode: Mode) -> Any:
        return forward(How(activation, EPS), x, gain, scales, shape, mode=mode)

    return exactly(partial(on_platform, call))(x, gain, scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("n", "columns"), [(256, 256), (224, 256), (24, 32)])
@pytest.mark.parametrize("activation", [None, "silu", "relu2"])
def test_values_are_the_norms_and_codes_are_theirs(
    dtype: str, n: int, columns: int, activation: Gate | None
) -> None:
    m = 5
    inputs = (rows(m, n, dtype, 0),)
    if activation is not None:
        inputs = (rows(m, n, dtype, 1), *inputs)
    gain = jnp.asarray(np.random.default_rng(2).normal(size=n), jnp.bfloat16)
    values, codes, factors = run(inputs, gain, activation, (8, columns))
    expected = exactly(partial(norm, How(activation, EPS)))(inputs, gain)
    exact, scale = absmax_quantize(expected)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(codes[:m, :n], exact)
    np.testing.assert_array_equal(codes[:m, n:], 0)
    for factor, of_matrix in zip(factors, SCALES, strict=True):
        product = (1.0 / scale[:, 0]) * jnp.float32(of_matrix)
        np.testing.assert_array_equal(factor[:m], product)


def test_what_is_no_number_makes_its_row_visible() -> None:
    x = rows(3, 64, "float32", 0).at[1, 5].set(jnp.nan)
    _, _, factors = run((x,), jnp.ones(64), None, (4, 64))
    for factor in factors:
        np.testing.assert_array_equal(np.isnan(factor[:3]), [False, True, False])


M, K, N = 2048, 512, 384


def problem(gated: bool, m: int = M, dtype: str = "bfloat16") -> tuple[Any, ...]:
    rng = np.random.default_rng(11)
    x, gate = rows(m, K, dtype, 3), rows(m, K, dtype, 4)
    gain = jnp.asarray(1 + 0.1 * rng.normal(size=K), dtype)
    gated_by: Any = {"gate": gate, "activation": "silu"} if gated else {}
    prologue = Prologue(gain=gain, eps=EPS, **gated_by)
    weights, adapters = [], []
    for i in range(2):
        codes = jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8)
        scale = jnp.float32(0.02 * (i + 1))
        weights.append(TernaryWeight(pack(codes, "ternary2"), scale, None, K, "ternary2"))
        a, b = (jnp.asarray(0.1 * rng.normal(size=(8, k)), jnp.float32) for k in (K, N))
        adapters.append(LowRank(a, b, 2.0))
    gradients = [rows(m, N, dtype, 5 + i) for i in range(2)]
    return x, prologue, tuple(weights), tuple(adapters), gradients, rows(m, K, dtype, 9)


def test_a_named_implementation_or_few_tokens_go_step_by_step() -> None:
    x, prologue, weights, *_ = problem(gated=False)
    assert not normalises(x, prologue, weights, "mosaic_gpu")
    assert not normalises(x[:64], prologue, weights, None)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_gradient_rule(gated: bool, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the norm, adapters and what reads the input too; products with codes are xla's here."""

    def product(x: jax.Array, weight: TernaryWeight, factor: jax.Array, *_: Any, **more: Any):
        share, codes = more["share"], unpack(weight.packed, weight.k, "ternary2")
        sums = x[: more["m"], : weight.k].astype(jnp.int32) @ codes.T.astype(jnp.int32)
        y = sums.astype(jnp.float32) * factor[: more["m"], None]
        assert share is None, "the epilogue is for bfloat16"
        return y

    monkeypatch.setattr(mosaic_gpu_rows, "product", product)
    monkeypatch.setattr(adapted, "resolve", lambda *_: "triton")
    x, prologue, weights, adapters, gradients, other = problem(gated, m=48, dtype="float32")
    own = [*gradients, other] if beside else gradients

    def fused(x: jax.Array, prologue: Prologue, adapters: Any) -> Any:
        return adapted_after(x, prologue, weights, adapters, beside=beside)

    def steps(x: jax.Array, prologue: Prologue, adapters: Any) -> Any:
        values = apply_prologue(x, prologue, implementation="xla")
        outputs = ternary_linear(values, weights, adapters, implementation="xla")
        return (*outputs, x) if beside else outputs

    def both(f: Any) -> Any:
        outputs, pull = jax.vjp(f, x, prologue, adapters)
        return outputs, pull(tuple(own))

    (found, by_found), (expected, by_expected) = both(fused), both(steps)
    # A code may differ where the norms' sums do.
    for one, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, exact, rtol=0, atol=2e-2 * float(jnp.abs(exact).max()))
    for one, exact in zip(*map(jax.tree.leaves, (by_found, by_expected)), strict=True):
        np.testing.assert_allclose(one, exact, rtol=0, atol=2e-5 * float(jnp.abs(exact).max()))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("gated", [False, True])
def test_outputs_and_gradients_are_those_step_by_step(gated: bool) -> None:
    """Outputs bit for bit; gradients but for the rounding of a sum."""
    x, prologue, weights, adapters, gradients, beside = problem(gated)
    assert normalises(x, prologue, weights, None)

    def fused(x: jax.Array, prologue: Prologue, adapters: Any) -> Any:
        return adapted_after(x, prologue, weights, adapters, beside=True)

    def steps(x: jax.Array, prologue: Prologue, adapters: Any) -> Any:
        values = apply_prologue(x, prologue, implementation=None)
        return (*ternary_linear(values, weights, adapters), x)

    @partial(jax.jit, static_argnums=0)
    def both(f: Any, *inputs: Any) -> Any:
        outputs, pull = jax.vjp(f, *inputs)
        return outputs, pull((*gradients, beside))

    inputs = (x, prologue, adapters)
    (found, by_found), (expected, by_expected) = both(fused, *inputs), both(steps, *inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for one, other in zip(*map(jax.tree.leaves, (by_found, by_expected)), strict=True):
        wide = np.asarray(other, np.float64)
        bound = 2**-7 * np.abs(wide).max()
        np.testing.assert_allclose(np.asarray(one, np.float64), wide, rtol=0, atol=bound)
