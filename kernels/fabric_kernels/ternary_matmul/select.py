"""Which implementation runs a product, by its name or by the device."""

from collections.abc import Sequence
from importlib import import_module
from typing import Literal, Protocol, cast, get_args

import jax

from fabric_kernels import cpu_library
from fabric_kernels.low_rank import LowRank
from fabric_kernels.ternary_matmul.weight import TernaryWeight

Implementation = Literal["xla", "cpu", "triton", "mosaic_gpu", "mosaic_tpu"]
"""``xla`` runs everywhere, ``cpu`` is compiled C++; the others are Pallas kernels: ``mosaic_gpu``
for NVIDIA's Hopper, ``triton`` for other GPUs, ``mosaic_tpu`` for TPUs."""


SideImplementation = Literal["xla", "cpu"]
"""What norms, attention and tables have."""


class Products(Protocol):
    """What an implementation's module offers."""

    def linear(self, x: jax.Array, weights: Sequence[TernaryWeight]) -> tuple[jax.Array, ...]:
        """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``."""
        ...

    def matmul(self, x: jax.Array, weight: TernaryWeight) -> jax.Array:
        """``x[..., k] · codes^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
        ...

    def linear_transposed(
        self, gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
    ) -> jax.Array:
        """``sum scale · (g · codes)`` in the dtype of the first gradient."""
        ...

    def matmul_transposed(self, g: jax.Array, weight: TernaryWeight) -> jax.Array:
        """``g[..., n] · codes`` in the dtype of ``g``."""
        ...


Adapters = Sequence[LowRank | None]


class ProductsWithAdapters(Protocol):
    """What the modules of ``WITH_ADAPTERS`` offer besides: adapters in the same call."""

    def linear_with_adapters(
        self, x: jax.Array, weights: Sequence[TernaryWeight], adapters: Adapters
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """``linear`` with the adapters' products added; and ``scale · x A^T``, [..., R], of each.

        The latter in whatever arrays the backward call reads.
        """
        ...

    def transposed_with_adapters(
        self,
        x: jax.Array,
        gradients: Sequence[jax.Array],
        weights: Sequence[TernaryWeight],
        adapters: Adapters,
        narrow: Sequence[jax.Array],
        *,
        bits: Literal[16, 24],
    ) -> tuple[jax.Array, Sequence[tuple[jax.Array, jax.Array] | None]]:
        """The gradients by ``x``, and by A and B of each adapter in float32.

        ``x`` may have no channels where there are no adapters. ``narrow`` is what the forward call
        returned; ``bits`` are of fixed-point numbers, where they are used.
        """
        ...


WITH_ADAPTERS: tuple[Implementation, ...] = ("cpu", "triton", "mosaic_gpu")


def select_implementation(implementation: Implementation | None = None) -> Implementation:
    """The implementation that a call with these arguments runs; ``None`` means the best one."""
    if implementation is None:
        on_cpu = jax.default_backend() == "cpu" and cpu_library.available()
        return "cpu" if on_cpu else "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"ternary_matmul has the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    return implementation


def side_implementation(implementation: Implementation | None) -> SideImplementation | None:
    """What runs norms, attention and tables beside products of that implementation."""
    return implementation if implementation in (None, "cpu") else "xla"


def products(implementation: Implementation) -> Products:
    """The module of an implementation; Pallas' are imported when they are first asked for."""
    name = f"fabric_kernels.ternary_matmul.{implementation}"
    return cast(Products, import_module(name))


def products_with_adapters(implementation: Implementation) -> ProductsWithAdapters:
    """The module of one of ``WITH_ADAPTERS``."""
    return cast(ProductsWithAdapters, products(implementation))
