"""Which implementation runs a product, by its name or by the device."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, cast, get_args

import jax

from fabric_kernels import cpu_library
from fabric_kernels.low_rank import LowRank
from fabric_kernels.ternary_matmul.weight import TernaryWeight

Implementation = Literal["xla", "cpu", "triton", "mosaic_gpu", "mosaic_tpu", "tuned"]
"""``xla`` runs everywhere, ``cpu`` is compiled C++, and there are Pallas kernels: ``mosaic_gpu``
for NVIDIA's Hopper, ``triton`` for any GPU, ``mosaic_tpu`` for TPUs. ``tuned`` is, for each
product, whichever of these was measured to be the fastest on the device (``tuned_table``)."""

Product = Literal["linear", "linear_transposed"]
"""What tables choose for: the product of a forward pass with its quantiser, and that of a backward
pass. Products of bare codes follow the first, those of bare floats the second."""

SideImplementation = Literal["xla", "cpu"]
"""What norms and tables have."""


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

    def kept_narrow(
        self, x: jax.Array, narrow: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, ...]:
        """Those arrays, of ``scale · x A^T`` [..., R] of each adapter in the dtype of ``x``."""
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
        **products: Sequence[jax.Array],
    ) -> tuple[jax.Array, Sequence[tuple[jax.Array, jax.Array] | None]]:
        """The gradients by ``x``, and by A and B of each adapter in float32.

        ``x`` may have no channels where there are no adapters. ``narrow`` is what the forward call
        returned; ``bits`` are of fixed-point numbers, where they are used.
        Triton also takes the ``products`` of the gradients with codes, where there are any.
        """
        ...


WITH_ADAPTERS: tuple[Implementation, ...] = ("cpu", "triton", "mosaic_gpu")


def select_implementation(implementation: Implementation | None = None) -> Implementation:
    """The implementation that a call with these arguments runs; ``None`` means the best one.

    Raises:
        ValueError: the name is unknown, or it is ``tuned`` and there is no table for the device.
    """
    from fabric_kernels.ternary_matmul.tuned_table import device_table

    platform = jax.default_backend()
    if implementation is None:
        if platform == "gpu" and device_table() is not None:
            return "tuned"
        return "cpu" if platform == "cpu" and cpu_library.available() else "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"ternary_matmul has the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    if implementation == "tuned" and device_table() is None:
        raise ValueError(
            f"there is no table for {jax.devices()[0].device_kind}: choose another implementation "
            "or make one with python -m fabric_kernels.tune"
        )
    return implementation


def resolve(
    implementation: Implementation, product: Product, rows: int, weight: TernaryWeight
) -> Implementation:
    """What runs a product of ``rows`` rows: looks a ``tuned`` one up, leaves others as they are."""
    if implementation != "tuned":
        return implementation
    from fabric_kernels.ternary_matmul.tuned_table import device_table

    table = device_table()
    assert table is not None, "select_implementation has looked for it"
    return table.pick(product, weight.packing, rows, weight.n, weight.k)


def side_implementation(implementation: Implementation | None) -> SideImplementation | None:
    """What runs norms and tables beside products of that implementation."""
    if implementation is None or implementation == "cpu":
        return implementation
    return "xla"


def products(implementation: Implementation) -> Products:
    """The module of an implementation; Pallas' are imported when they are first asked for."""
    name = f"fabric_kernels.ternary_matmul.{implementation}"
    return cast(Products, import_module(name))


def products_after_norms() -> Any:
    """The module of ``mosaic_gpu``'s products of norms."""
    return import_module("fabric_kernels.ternary_matmul.mosaic_gpu_after")


def products_with_adapters(implementation: Implementation) -> ProductsWithAdapters:
    """The module of one of ``WITH_ADAPTERS``."""
    return cast(ProductsWithAdapters, products(implementation))
