"""What is timed on an accelerator: packed products by each implementation, dense ones by XLA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fabric_kernels.packing import Packing, packed_width
from fabric_kernels.ternary_matmul import select
from fabric_kernels.ternary_matmul.bench_cases import make_stack
from fabric_kernels.ternary_matmul.device_timing import CompiledTurns, compile_turns
from fabric_kernels.ternary_matmul.select import Implementation, Product
from fabric_kernels.ternary_matmul.weight import TernaryWeight

UNROLLED = 8
"""Products of a turn, each with an input of its own: a turn takes about 8 us besides."""
STACK_BYTES = 256 << 20
"""Packed matrices that a case goes through: more than the caches hold."""
PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device does at most, measured.

    Attributes:
        bytes_per_second: of device memory, read and written.
        bf16_per_second: operations, multiplications and additions, of a large product.
        int8_per_second: likewise.
    """

    bytes_per_second: float
    bf16_per_second: float
    int8_per_second: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One product.

    Attributes:
        product: ``linear`` with its quantiser, or ``linear_transposed``, the backward product.
        implementation: what ran; ``dense-bf16`` and ``dense-int8`` are XLA's dots with unpacked
            matrices and, for int8, quantised rows.
        packing: of the weights; empty for dense ones.
        rows: M.
        n: N.
        k: K.
        microseconds: of one product, the median.
        spread: of the middle half, in parts of the median.
        of_bandwidth: bytes of weights, input and output over time, in parts of the limit.
        of_rate: operations over time, in parts of the limit of int8, or bf16 for what is bf16.
    """

    product: str
    implementation: str
    packing: str
    rows: int
    n: int
    k: int
    microseconds: float
    spread: float
    of_bandwidth: float
    of_rate: float


@dataclass(frozen=True, kw_only=True)
class DeviceCase:
    """One product to be timed: of bfloat16 rows, [M, K] or [M, N].

    Attributes:
        product: which.
        implementation: what runs it, or a dense dot.
        packing: of the weights; empty for dense ones.
        rows: M.
        n: N.
        k: K.
    """

    product: Product
    implementation: Implementation | Literal["dense-bf16", "dense-int8"]
    packing: Packing | Literal[""]
    rows: int
    n: int
    k: int

    def at_limits(self, limits: Limits) -> tuple[float, float]:
        """Seconds at the limit of bandwidth, and at that of operations."""
        bf16 = self.implementation == "dense-bf16" or self.product == "linear_transposed"
        rate = limits.bf16_per_second if bf16 else limits.int8_per_second
        bits = {"ternary2": 2.0, "ternary1.6": 1.6}.get(self.packing, 16.0 if bf16 else 8.0)
        size = self.n * self.k * bits / 8 + 2 * self.rows * (self.n + self.k)
        return size / limits.bytes_per_second, 2.0 * self.rows * self.n * self.k / rate

    def compile(self, limits: Limits) -> CompiledTurns:
        """Raises what the implementation raises for a product that it hasn't got."""
        turn, operands = _packed(self) if self.packing else _dense_turn(self)
        limit = UNROLLED * max(self.at_limits(limits))
        return compile_turns(turn, operands, limit_seconds=limit)

    def timing(self, compiled: CompiledTurns, limits: Limits, samples: int) -> Timing:
        """Runs it."""
        seconds, spread = compiled.median_seconds(samples)
        each = seconds / UNROLLED
        at_bandwidth, at_rate = self.at_limits(limits)
        return Timing(
            product=self.product,
            implementation=self.implementation,
            packing=self.packing,
            rows=self.rows,
            n=self.n,
            k=self.k,
            microseconds=round(1e6 * each, 2),
            spread=round(spread, 3),
            of_bandwidth=round(at_bandwidth / each, 3),
            of_rate=round(at_rate / each, 3),
        )


def measure_limits(samples: int = 5) -> Limits:
    """Takes about a second on a large GPU."""
    size, wide = 8192, jnp.zeros(1 << 28, jnp.float32)
    copy = compile_turns(lambda _, a: [a + 1.0], wide, limit_seconds=wide.nbytes / 2e12)
    rates = [2 * wide.nbytes / copy.median_seconds(samples)[0]]
    x = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    codes = jax.random.randint(jax.random.key(1), (2, size, size), -128, 128, jnp.int8)
    for operands, accumulate in ((x, jnp.bfloat16), (codes, jnp.int32)):

        def turn(_: jax.Array, pair: Any, accumulate: Any = accumulate) -> list[jax.Array]:
            return [_dot(pair[0], pair[1], 1, accumulate)]

        operations = 2.0 * size**3
        dot = compile_turns(turn, operands, limit_seconds=operations / 1e15)
        rates.append(operations / dot.median_seconds(samples)[0])
    return Limits(bytes_per_second=rates[0], bf16_per_second=rates[1], int8_per_second=rates[2])


def _packed(case: DeviceCase) -> tuple[Callable[..., list[jax.Array]], Any]:
    assert case.packing
    packing, k = case.packing, case.k
    stack = _stack(case.n, k, packing)
    layers = stack.shape[0]
    # Dense dots have no packing, and so never come here.
    run = select.products(cast(Implementation, case.implementation))
    transposed = case.product == "linear_transposed"

    @jax.jit  # and so traced and lowered once a turn
    def multiply(x: jax.Array, weight: TernaryWeight) -> jax.Array:
        return run.linear_transposed([x], [weight]) if transposed else run.linear(x, [weight])[0]

    def turn(index: jax.Array, operands: Any) -> list[jax.Array]:
        rows, stack, scales = operands
        numbers = [(UNROLLED * index + i) % layers for i in range(UNROLLED)]
        return [
            multiply(x, TernaryWeight(stack, scales, layer, k, packing))
            for x, layer in zip(rows, numbers, strict=True)
        ]

    scales = jnp.full((layers,), 0.02, jnp.float32)
    return turn, (_rows(case.rows, case.n if transposed else k), stack, scales)


@cache
def _stack(n: int, k: int, packing: Packing) -> jax.Array:
    layers = int(np.clip(-(-STACK_BYTES // (n * packed_width(k, packing))), UNROLLED, 256))
    return make_stack(n, k, layers, packing)


def forget_stacks() -> None:
    """Frees what the cases of one shape share."""
    _stack.cache_clear()


def _dense_turn(case: DeviceCase) -> tuple[Callable[..., list[jax.Array]], Any]:
    """With matrices that are not packed, as many as a turn has."""
    integer, transposed = case.implementation == "dense-int8", case.product == "linear_transposed"
    matrices = [
        jax.random.randint(key, (case.n, case.k), -1, 2, jnp.int8).astype(
            jnp.int8 if integer else jnp.bfloat16
        )
        for key in jax.random.split(jax.random.key(2), UNROLLED)
    ]
    rows = _rows(case.rows, case.n if transposed else case.k)
    if integer:
        rows = [(x * 30).astype(jnp.int8) for x in rows]

    def turn(_: jax.Array, operands: Any) -> list[jax.Array]:
        accumulate = jnp.int32 if integer else jnp.bfloat16
        return [
            _dot(x, w, 0 if transposed else 1, accumulate) for x, w in zip(*operands, strict=True)
        ]

    return turn, (rows, matrices)


def _rows(m: int, width: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(3), UNROLLED)
    return [jax.random.normal(key, (m, width), jnp.bfloat16) for key in keys]


def _dot(x: jax.Array, w: jax.Array, axis: int, accumulate: Any) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=accumulate)


def device_cases(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    implementations: Sequence[Implementation],
    packings: Sequence[Packing],
    *,
    dense: bool,
    products: Sequence[Product] = PRODUCTS,
) -> list[list[DeviceCase]]:
    """All cases, those of one shape [N, K] together."""
    found: list[list[DeviceCase]] = []
    for n, k in shapes:
        own: list[DeviceCase] = []
        for m in rows:
            for product in products:
                kinds: list[tuple[Any, Any]] = [
                    (implementation, packing)
                    for packing in packings
                    for implementation in implementations
                ]
                if dense:
                    kinds.append(("dense-bf16", ""))
                    kinds += [("dense-int8", "")] if product == "linear" else []
                own += [
                    DeviceCase(
                        product=product, implementation=name, packing=packing, rows=m, n=n, k=k
                    )
                    for name, packing in kinds
                ]
        found.append(own)
    return found
