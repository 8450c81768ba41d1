"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.dot import linear, linear_transposed
from fabric_jax.layers.parameters import Constant, Uniform, declare_adapter

TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get an adapter, and of what kind.

    Attributes:
        rank: R; 0 means no adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: ``attention``, ``mlp``, ``all``, or names among q k v o gate up down.
        dropout: probability of dropping an input channel of the adapter in training.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        adapter_dtype: of the adapter's weights.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all",)
    dropout: float = 0.0
    rslora: bool = False
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Checks the numbers and the names."""
        if self.rank < 0:
            raise FabricError("LoRA rank out of range", expected="0 or more", found=str(self.rank))
        if not 0.0 <= self.dropout < 1.0:
            raise FabricError(
                "LoRA dropout out of range", expected="0 <= dropout < 1", found=str(self.dropout)
            )
        if self.rank and not self.targets:
            raise FabricError("LoRA has no targets", expected="attention, mlp, all, or names")
        _ = self.linears

    @property
    def linears(self) -> frozenset[str]:
        """Names of the targeted linears, groups resolved."""
        names: set[str] = set()
        for target in self.targets:
            if target in TARGET_GROUPS:
                names.update(TARGET_GROUPS[target])
            elif target in TARGET_GROUPS["all"]:
                names.add(target)
            else:
                raise unknown_name("LoRA target", target, (*TARGET_GROUPS, *TARGET_GROUPS["all"]))
        return frozenset(names)

    @property
    def scale(self) -> float:
        """The factor on B(A(x))."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, name: str) -> bool:
        """Whether the linear ``name`` gets an adapter."""
        return self.rank > 0 and name in self.linears


class Lora(nnx.Module):
    """``scale · B(A(x))`` with A stored [R, K] and B stored [R, N]; zero at first, since B is.

    B keeps the rank first so that its gradient comes out of the product as it is stored.
    """

    def __init__(self, n: int, k: int, config: LoraConfig, *, stack: tuple[int, ...] = ()) -> None:
        """Declares A and B for a linear of [n, k]."""
        if config.rank > min(n, k):
            raise FabricError(
                f"LoRA rank {config.rank} exceeds a dimension of a targeted [{n}, {k}] linear",
                expected=f"at most {min(n, k)}",
                fix="Lower --rank or choose other targets",
            )
        # Kaiming-uniform with a = sqrt(5), PEFT's default, is this bound.
        self.a = declare_adapter(
            (config.rank, k), config.adapter_dtype, Uniform(k**-0.5), stack=stack
        )
        self.b = declare_adapter((config.rank, n), config.adapter_dtype, Constant(0.0), stack=stack)
        self.scale = config.scale
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """The adapter's share of the output [..., N] for the un-quantised input ``x`` [..., K].

        Dropout happens only where ``dropout_key`` is given.
        """
        if dropout_key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
        narrow = linear(x, self.a[...]) * jnp.asarray(self.scale, x.dtype)
        return _widen(narrow, self.b[...])


@jax.custom_vjp
def _widen(narrow: jax.Array, b: jax.Array) -> jax.Array:
    """``narrow[..., R] · b[R, N]``.

    Its own gradient rule only fixes the order of a product: ``db = narrow^T · g`` transposes the
    narrow operand, where the built-in rule has XLA transpose ``g`` [..., N] in every layer, which
    on CPU costs more than the product.
    """
    return linear_transposed(narrow, b)


def _widen_fwd(narrow: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear_transposed(narrow, b), (narrow, b)


def _widen_bwd(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    narrow, b = residuals
    rows, columns = narrow.reshape(-1, narrow.shape[-1]), g.reshape(-1, g.shape[-1])
    db = linear_transposed(rows.T, columns)
    return linear(g, b), db.astype(b.dtype)


_widen.defvjp(_widen_fwd, _widen_bwd)
