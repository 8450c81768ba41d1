"""The grouped linear with its adapters and gradients against float64 numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    LowRank,
    Packing,
    TernaryWeight,
    pack,
    pack_ternary2,
    ternary_linear,
    ternary_matmul,
)
from fabric_kernels.ternary_matmul import GradientBits, Implementation

from tests.kernels.conftest import need_cpu_kernels
from tests.kernels.linear_problems import (
    Expected,
    Problem,
    expected_gradients,
    expected_outputs,
    fixed_point_bound,
    rows_of,
)

PROBLEMS = [
    Problem(n=(1,), k=1, leading=(1,), ranks=(None,)),
    Problem(n=(3, 5), k=7, leading=(2,), ranks=(1, None), packing="ternary1.6"),
    Problem(n=(33,), k=66, leading=(4,), ranks=(4,)),
    Problem(n=(9, 17, 5), k=31, leading=(5,), ranks=(3, 6, None)),
    Problem(n=(40, 16, 16, 24), k=129, leading=(128,), ranks=(8, 2, 5, 1)),
    Problem(n=(65, 7), k=130, leading=(600,), ranks=(5, 3), packing="ternary1.6"),
    Problem(n=(20, 21), k=48, leading=(2, 3), ranks=(None, None)),
    Problem(n=(12, 70), k=70, leading=(), ranks=(2, 4)),
    Problem(n=(12, 30), k=75, leading=(5,), ranks=(2, 4), dtype="bfloat16"),
    Problem(
        n=(30, 9), k=44, leading=(3,), ranks=(4, 7), dtype="bfloat16", adapter_dtype="bfloat16"
    ),
    Problem(n=(8,), k=33, leading=(6,), ranks=(2,), adapter_dtype="bfloat16"),
]
# Rounding of sums of a few hundred float32 terms, in parts of the sum of their magnitudes.
FLOAT32 = 2e-6
# A bfloat16 keeps 8 bits; an operand, a product of its own and the result are rounded.
BFLOAT16 = 3 * 2.0**-9

# (problem, implementation, bits); what computes in float takes no notice of the bits.
CASES = [
    *((problem, "cpu", bits) for problem in PROBLEMS for bits in (16, 24)),
    *((problem, "xla", 24) for problem in PROBLEMS[1:-1]),
]

Result = tuple[tuple[jax.Array, ...], jax.Array, tuple[Any, ...]]


@partial(jax.jit, static_argnames=("implementation", "bits"))
def forward_and_backward(
    x: jax.Array, adapters: Any, weights: Any, gradients: Any, *, implementation: Any, bits: Any
) -> Any:
    def run(x: jax.Array, adapters: Any) -> tuple[jax.Array, ...]:
        return linear(x, weights, adapters, implementation, bits)

    outputs, pull = jax.vjp(run, x, adapters)
    return outputs, *pull(gradients)


def run(
    problem: Problem, implementation: Implementation, bits: GradientBits = 16, **changed: Any
) -> Result:
    """Outputs, dx, and the adapters' gradients; ``changed`` replaces inputs of the problem."""
    names = ("x", "adapters", "weights", "gradients")
    inputs = {name: changed.get(name, getattr(problem, name)) for name in names}
    if implementation == "cpu":
        need_cpu_kernels()
    return forward_and_backward(**inputs, implementation=implementation, bits=bits)


def linear(
    x: jax.Array,
    weights: Any,
    adapters: Any = None,
    implementation: Implementation = "cpu",
    bits: GradientBits = 16,
) -> tuple[jax.Array, ...]:
    return ternary_linear(x, weights, adapters, implementation=implementation, gradient_bits=bits)


def assert_within(found: jax.Array, expected: Expected, relative: float, extra: Any = 0.0) -> None:
    error = np.abs(rows_of(found) - expected.value)
    bound = relative * expected.magnitude + extra + 1e-30
    assert np.all(error <= bound), f"{np.max(error / bound)} times the bound"


@pytest.mark.parametrize(("problem", "implementation", "bits"), CASES, ids=str)
def test_outputs_and_gradients(
    problem: Problem, implementation: Implementation, bits: GradientBits
) -> None:
    relative = FLOAT32 if problem.dtype == "float32" else BFLOAT16
    outputs, dx, d_adapters = run(problem, implementation, bits)
    for found, expected, n in zip(outputs, expected_outputs(problem), problem.n, strict=True):
        assert found.dtype == problem.dtype
        assert found.shape == (*problem.leading, n)
        assert_within(found, expected, relative)
    expected_dx, pairs = expected_gradients(problem)
    assert dx.dtype == problem.dtype
    assert dx.shape == problem.x.shape
    fixed = fixed_point_bound(problem, 127 * 2.0 ** (bits - 8)) if implementation == "cpu" else 0.0
    assert_within(dx, expected_dx, relative, fixed)
    for adapter, found, expected in zip(problem.adapters, d_adapters, pairs, strict=True):
        if adapter is None:
            assert found is None
            continue
        assert expected is not None
        narrow = max(relative, FLOAT32 if problem.adapter_dtype == "float32" else BFLOAT16)
        for leaf, d_leaf, value in zip(
            (adapter.a, adapter.b), (found.a, found.b), expected, strict=True
        ):
            assert d_leaf.dtype == leaf.dtype
            assert_within(d_leaf, value, narrow)


def test_errors_of_fixed_point_are_up_to_half_a_step() -> None:
    """Under the identity matrix each element of dx is one number of the fixed point."""
    n = 64
    identity = Problem(n=(n,), k=n, leading=(200,), ranks=(None,))
    weight = TernaryWeight(pack_ternary2(jnp.eye(n, dtype=jnp.int8)), jnp.float32(0.5), None, n)
    g = np.asarray(identity.gradients[0], np.float64)
    step = np.max(np.abs(g), axis=-1, keepdims=True) / (127 * 256)
    worst: dict[int, float] = {}
    for bits in (16, 24):
        _, dx, _ = run(identity, "cpu", bits, weights=(weight,))
        worst[bits] = float(np.max(np.abs(np.asarray(dx, np.float64) / 0.5 - g) / step))
    assert 0.45 < worst[16] < 0.51
    assert worst[24] < 2 / 256


def test_implementations_agree() -> None:
    problem = PROBLEMS[4]
    ours, reference = (run(problem, implementation, 24) for implementation in ("cpu", "xla"))
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        scale = float(np.max(np.abs(expected)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)


def test_frozen_weights_and_scales_get_no_gradient(implementation: Implementation) -> None:
    problem = PROBLEMS[1]

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        return sum(jnp.sum(y) for y in linear(x, weights, problem.adapters, implementation))

    gradient = jax.jit(jax.grad(loss, allow_int=True))(problem.weights, problem.x)
    for weight, original in zip(gradient, problem.weights, strict=True):
        assert weight.packed.dtype == jax.dtypes.float0
        assert weight.packed.shape == original.packed.shape
        assert weight.scale.shape == ()
        assert float(weight.scale) == 0


def with_rows(rows: int, width: int, bad: dict[int, float], seed: int) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    for row, value in bad.items():
        x[row, width // 2] = value
    return jnp.asarray(x)


@pytest.mark.parametrize("rows", [3, 20], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_what_is_not_finite_stays_visible(
    rows: int, packing: Packing, implementation: Implementation
) -> None:
    problem = Problem(n=(33, 5), k=70, leading=(rows,), ranks=(None, None), packing=packing)
    bad = {0: float("nan"), 2: float("-inf")}
    good = [row for row in range(rows) if row not in bad]
    # In one group's gradient only: the row of dx is one for all.
    gradients = (with_rows(rows, 33, {}, 1), with_rows(rows, 5, bad, 2))
    for bits in (16, 24):
        outputs, dx, _ = run(
            problem, implementation, bits, x=with_rows(rows, 70, bad, 0), gradients=gradients
        )
        for y in outputs:
            assert np.all(np.isnan(np.asarray(y)[list(bad)]))
            assert np.all(np.isfinite(np.asarray(y)[good]))
        spoiled = np.asarray(dx)[list(bad)]
        # A float product keeps an infinity where no weight is 0.
        assert not np.any(np.isfinite(spoiled))
        if implementation == "cpu":
            assert np.all(np.isnan(spoiled))
        assert np.all(np.isfinite(np.asarray(dx)[good]))


def test_adapters_pass_on_what_is_not_finite(implementation: Implementation) -> None:
    problem = Problem(n=(18,), k=40, leading=(6,), ranks=(3,))
    x = with_rows(6, 40, {1: float("nan")}, 0)
    gradients = (with_rows(6, 18, {4: float("inf")}, 1),)
    (y,), dx, (d_adapter,) = run(problem, implementation, x=x, gradients=gradients)
    assert np.all(np.isnan(np.asarray(y)[1]))
    assert not np.any(np.isfinite(np.asarray(dx)[4]))
    assert np.all(np.isfinite(np.delete(np.asarray(dx), 4, axis=0)))
    assert not np.any(np.isfinite(d_adapter.a))
    assert not np.any(np.isfinite(d_adapter.b))


def test_rows_of_zeros(implementation: Implementation) -> None:
    problem = Problem(n=(33, 5), k=70, leading=(7,), ranks=(2, None))
    outputs, dx, _ = run(
        problem,
        implementation,
        x=problem.x.at[3].set(0.0),
        gradients=tuple(g.at[2].set(0.0) for g in problem.gradients),
    )
    for y in outputs:
        assert not np.any(np.asarray(y)[3])
        assert np.all(np.any(np.delete(np.asarray(y), 3, axis=0), axis=-1))
        assert np.all(np.isfinite(y))
    assert not np.any(np.asarray(dx)[2])
    assert np.all(np.any(np.delete(np.asarray(dx), 2, axis=0), axis=-1))


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_no_rows(leading: tuple[int, ...], implementation: Implementation) -> None:
    problem = Problem(n=(9, 5), k=12, leading=leading, ranks=(2, None))
    outputs, dx, (d_adapter, _) = run(problem, implementation, 16)
    assert [y.shape for y in outputs] == [(*leading, 9), (*leading, 5)]
    assert dx.shape == (*leading, 12)
    assert not np.any(d_adapter.a)
    assert not np.any(d_adapter.b)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_sums_past_32_bits(rows: int, packing: Packing) -> None:
    """66,052 terms of 16 bits fill an int32; all of one sign they are a longer sum."""
    n = 70001
    problem = Problem(n=(n,), k=3, leading=(rows,), ranks=(None,), packing=packing)
    ones = jnp.ones((n, 3), jnp.int8)
    weight = TernaryWeight(pack(ones, packing), jnp.float32(-0.5), None, 3, packing)
    for bits in (16, 24):
        g = jnp.ones((rows, n))
        _, dx, _ = run(problem, "cpu", bits, weights=(weight,), gradients=(g,))
        np.testing.assert_allclose(dx, np.full((rows, 3), -0.5 * n), rtol=1e-6)
    y = ternary_matmul(
        jnp.ones((rows, n)), pack(ones.T, packing), packing=packing, implementation="cpu"
    )
    np.testing.assert_allclose(y, np.full((rows, 3), n), rtol=1e-6)


def a_weight(**changes: Any) -> TernaryWeight:
    """[5, 8] with changed fields."""
    fields = {
        "packed": jnp.zeros((5, 2), jnp.uint8),
        "scale": jnp.float32(1),
        "layer": None,
        "k": 8,
        "packing": "ternary2",
    }
    return TernaryWeight(**{**fields, **changes})


STACK = {"packed": jnp.zeros((3, 5, 2), jnp.uint8), "layer": jnp.int32(1)}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        pytest.param([], ValueError, "one to 4 weights, found 0", id="none"),
        pytest.param([a_weight()] * 5, ValueError, "one to 4 weights, found 5", id="five"),
        pytest.param([a_weight(k=7)], ValueError, "share K = 8 .* found K = 7", id="k"),
        pytest.param(
            [a_weight(), a_weight(packing="ternary1.6")], ValueError, "ternary1.6", id="packings"
        ),
        pytest.param(
            [a_weight(scale=jnp.bfloat16(1))],
            TypeError,
            "scales of ternary weights are float32, found bfloat16",
            id="scale-dtype",
        ),
        pytest.param(
            [a_weight(scale=jnp.ones(5))],
            ValueError,
            r"one scale for each matrix, shape \[\], found \[5\]",
            id="scale-of-rows",
        ),
        pytest.param(
            [a_weight(**STACK, scale=jnp.ones(2))],
            ValueError,
            r"shape \[\] or \[3\], found \[2\]",
            id="scales-of-another-stack",
        ),
        pytest.param([a_weight(), a_weight(**STACK)], ValueError, "at the same layer", id="mixed"),
        pytest.param(
            [a_weight(packed=jnp.zeros((5, 2), jnp.int8))], TypeError, "are uint8", id="int8"
        ),
    ],
)
def test_wrong_weights(
    weights: list[TernaryWeight],
    error: type[Exception],
    message: str,
    implementation: Implementation,
) -> None:
    with pytest.raises(error, match=message):
        linear(jnp.ones((2, 8)), weights, None, implementation)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        pytest.param([], "1 weights have as many adapters or None, found 0", id="too-few"),
        pytest.param([None, None], "found 2", id="too-many"),
        pytest.param(
            [LowRank(jnp.ones((2, 7)), jnp.ones((2, 5)), 1.0)],
            r"A \[R, 8\] and B \[R, 5\], found \[2, 7\] and \[2, 5\]",
            id="a",
        ),
        pytest.param(
            [LowRank(jnp.ones((2, 8)), jnp.ones((3, 5)), 1.0)], "found .* and", id="ranks-differ"
        ),
    ],
)
def test_wrong_adapters(adapters: Any, message: str, implementation: Implementation) -> None:
    with pytest.raises(ValueError, match=message):
        linear(jnp.ones((2, 8)), [a_weight()], adapters, implementation)


def test_integers_are_no_input_of_a_linear(implementation: Implementation) -> None:
    with pytest.raises(TypeError, match="takes floats, found int32"):
        linear(jnp.ones((2, 8), jnp.int32), [a_weight()], None, implementation)
