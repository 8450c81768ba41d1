"""Random linears with adapters, and what they and their gradients are in float64."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import LowRank, Packing, TernaryWeight, pack


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Matrices of ``n`` outputs each that share x [*leading, k]; rank None: no adapter.

    Arrays are made once, outside of whatever transformation first asks for them.
    """

    n: tuple[int, ...]
    k: int
    leading: tuple[int, ...]
    ranks: tuple[int | None, ...]
    packing: Packing = "ternary2"
    dtype: str = "float32"
    adapter_dtype: str = "float32"

    def __str__(self) -> str:
        of = f"n{self.n}-k{self.k}-m{self.leading}-r{self.ranks}".replace(" ", "")
        return f"{of}-{self.packing}-{self.dtype}-{self.adapter_dtype}"

    @cached_property
    def codes(self) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        return [rng.integers(-1, 2, (n, self.k)).astype(np.int8) for n in self.n]

    @cached_property
    def scales(self) -> list[float]:
        """Of both signs and several magnitudes; exact in float32."""
        return [(-1.0 if i % 2 else 1.0) * 0.75 / 4**i for i in range(len(self.n))]

    @cached_property
    @jax.ensure_compile_time_eval()
    def x(self) -> jax.Array:
        """Rows of many magnitudes."""
        return self._rows(np.random.default_rng(2), self.k)

    @cached_property
    @jax.ensure_compile_time_eval()
    def gradients(self) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(3)
        return tuple(self._rows(rng, n) for n in self.n)

    @cached_property
    @jax.ensure_compile_time_eval()
    def weights(self) -> tuple[TernaryWeight, ...]:
        return tuple(
            TernaryWeight(
                pack(jnp.asarray(codes), self.packing),
                jnp.asarray(scale, jnp.float32),
                None,
                self.k,
                self.packing,
            )
            for codes, scale in zip(self.codes, self.scales, strict=True)
        )

    @cached_property
    @jax.ensure_compile_time_eval()
    def adapters(self) -> tuple[LowRank | None, ...]:
        rng = np.random.default_rng(4)

        def one(n: int, rank: int | None) -> LowRank | None:
            if rank is None:
                return None
            a, b = (
                jnp.asarray(rng.standard_normal((rank, width)).astype(np.float32))
                for width in (self.k, n)
            )
            return LowRank(a.astype(self.adapter_dtype), b.astype(self.adapter_dtype), 2.0 / rank)

        return tuple(one(n, rank) for n, rank in zip(self.n, self.ranks, strict=True))

    def _rows(self, rng: np.random.Generator, width: int) -> jax.Array:
        rows = rng.standard_normal((*self.leading, width)) * np.exp2(
            rng.integers(-6, 7, (*self.leading, 1))
        )
        return jnp.asarray(rows.astype(np.float32)).astype(self.dtype)


@dataclass(frozen=True)
class Expected:
    """A float64 result with the sum of magnitudes behind each element, which bounds rounding."""

    value: np.ndarray
    magnitude: np.ndarray

    def __add__(self, other: "Expected") -> "Expected":
        return Expected(self.value + other.value, self.magnitude + other.magnitude)


def rows_of(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def product(x: np.ndarray, y: np.ndarray, factor: float = 1.0) -> Expected:
    return Expected(factor * (x @ y), abs(factor) * (np.abs(x) @ np.abs(y)))


def quantize(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """BitNet's codes of each row, and its scale; every step rounded to float32."""
    rows = rows_of(x).astype(np.float32)
    largest = np.maximum(np.max(np.abs(rows), axis=-1, keepdims=True), np.float32(1e-5))
    scale = np.float32(1) / largest * np.float32(127)
    codes = np.clip(np.rint(rows * scale), -128, 127)
    return codes.astype(np.float64), scale.astype(np.float64)


def _parts(adapter: LowRank) -> tuple[np.ndarray, np.ndarray]:
    return rows_of(adapter.a), rows_of(adapter.b)


def expected_outputs(problem: Problem) -> list[Expected]:
    """``scale · (q(x) · codes^T)`` and the adapter's product, [M, N] for each matrix."""
    quantized, scale = quantize(problem.x)
    outputs: list[Expected] = []
    for matrix, weight_scale, adapter in zip(
        problem.codes, problem.scales, problem.adapters, strict=True
    ):
        exact = quantized @ matrix.T / scale * weight_scale
        base = Expected(exact, np.abs(exact))
        if adapter is not None:
            a, b = _parts(adapter)
            narrow = product(rows_of(problem.x), a.T, adapter.scale)
            wide = Expected(narrow.value @ b, narrow.magnitude @ np.abs(b))
            base = base + wide
        outputs.append(base)
    return outputs


def expected_gradients(
    problem: Problem,
) -> tuple[Expected, list[tuple[Expected, Expected] | None]]:
    """dx, and (dA, dB) of each adapter."""
    rows = rows_of(problem.x)
    dx = Expected(np.zeros_like(rows), np.zeros_like(rows))
    pairs: list[tuple[Expected, Expected] | None] = []
    for g, matrix, scale, adapter in zip(
        problem.gradients, problem.codes, problem.scales, problem.adapters, strict=True
    ):
        g_rows = rows_of(g)
        dx = dx + product(g_rows, matrix.astype(np.float64), scale)
        if adapter is None:
            pairs.append(None)
            continue
        a, b = _parts(adapter)
        back = product(g_rows, b.T, adapter.scale)
        forward = product(rows, a.T, adapter.scale)
        dx = dx + Expected(back.value @ a, back.magnitude @ np.abs(a))
        da = Expected(back.value.T @ rows, back.magnitude.T @ np.abs(rows))
        db = Expected(forward.value.T @ g_rows, forward.magnitude.T @ np.abs(g_rows))
        pairs.append((da, db))
    return dx, pairs


def fixed_point_bound(problem: Problem, largest: float) -> np.ndarray:
    """Half a step of each term of dx: [M, K], for numbers of up to ``largest`` steps.

    The float products that are rounded to steps err by three roundings of their own.
    """
    top = np.max(
        [
            abs(scale) * np.max(np.abs(rows_of(g)), axis=-1, initial=0)
            for g, scale in zip(problem.gradients, problem.scales, strict=True)
        ],
        axis=0,
    )
    terms = sum(np.abs(matrix.astype(np.float64)).sum(axis=0) for matrix in problem.codes)
    step = top / largest
    return np.outer(step, terms) * (0.5 + 3 * 2.0**-24 * largest)
