"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from fabric_kernels import LowRank, low_rank_product
from flax import nnx

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.parameters import Constant, Uniform, declare_adapter
from fabric_jax.parallel.mesh import MeshShape
from fabric_jax.parallel.rows import bernoulli_of_rows

TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get an adapter, and of what kind.

    Attributes:
        rank: R; 0 means no adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: ``attention``, ``mlp``, ``all``, or names among q k v o gate up down.
        ranks: targets with a rank of their own, as (name, rank); q=16 on the command line.
        alphas: targets with an alpha of their own, as (name, alpha); q=32 on the command line.
        dropout: probability of dropping an input channel of the adapter in training.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        adapter_dtype: of the adapter's weights; bfloat16 ones are updated with stochastic rounding.
        freeze_a: leave A as initialised and train B alone (LoRA-FA, Zhang et al. 2023,
            arXiv:2308.03303).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all",)
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    freeze_a: bool = False

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
        # In one form, so that equal settings are equal objects.
        object.__setattr__(self, "ranks", self._own("rank", self.ranks, self.rank))
        object.__setattr__(self, "alphas", self._own("alpha", self.alphas, self.alpha))
        for name, rank in self.ranks:
            if rank < 1:
                raise FabricError(
                    f"LoRA rank of {name} out of range",
                    expected="1 or more",
                    found=str(rank),
                    fix="Leave it out of the targets to give it no adapter",
                )
        for name, alpha in (("the adapter", self.alpha), *self.alphas):
            if not math.isfinite(alpha):
                raise FabricError(f"LoRA alpha out of range: {name} has {alpha}")

    @property
    def linears(self) -> frozenset[str]:
        """Names of the targeted linears, groups resolved."""
        return frozenset(name for target in self.targets for name in _members(target))

    @property
    def scale(self) -> float:
        """The factor on B(A(x)) of targets without a rank or alpha of their own."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, name: str) -> bool:
        """Whether the linear ``name`` gets an adapter."""
        return self.rank > 0 and name in self.linears

    def of(self, name: str) -> "LoraConfig":
        """The settings of the linear ``name``: its own rank and alpha are the common ones there."""
        return replace(
            self,
            rank=dict(self.ranks).get(name, self.rank),
            alpha=dict(self.alphas).get(name, self.alpha),
            ranks=(),
            alphas=(),
        )

    def _own(
        self, kind: str, pairs: tuple[tuple[str, Number], ...], common: Number
    ) -> tuple[tuple[str, Number], ...]:
        """The pairs that differ from ``common``, groups resolved, in the order of linears."""
        values: dict[str, Number] = {}
        for target, value in pairs:
            for name in _members(target):
                if name in values:
                    raise FabricError(f"LoRA gives {name} more than one {kind} of its own")
                if name not in self.linears:
                    raise FabricError(
                        f"LoRA gives {name} {kind} {value}, but {name} is no target",
                        expected=f"names among {', '.join(self.targets)}",
                    )
                values[name] = value
        return tuple(
            (name, values[name])
            for name in TARGET_GROUPS["all"]
            if values.get(name, common) != common
        )


def _members(target: str) -> tuple[str, ...]:
    """The linears that a target stands for: itself, or those of a group."""
    if target in TARGET_GROUPS:
        return TARGET_GROUPS[target]
    if target not in TARGET_GROUPS["all"]:
        raise unknown_name("LoRA target", target, (*TARGET_GROUPS, *TARGET_GROUPS["all"]))
    return (target,)


class Lora(nnx.Module):
    """``scale · B(A(x))`` with A stored [R, K] and B stored [R, N]; zero at first, since B is.

    B keeps the rank first so that its gradient comes out of the product as it is stored.
    """

    def __init__(
        self,
        n: int,
        k: int,
        config: LoraConfig,
        *,
        stack: tuple[int, ...] = (),
        mesh: MeshShape | None = None,
    ) -> None:
        """Declares A and B for a linear of [n, k]; inputs are cut by rows along ``mesh``."""
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
        self.mesh = mesh or MeshShape()

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """The adapter's share of the output [..., N] for the un-quantised input ``x`` [..., K].

        Dropout happens only where ``dropout_key`` is given.
        """
        if dropout_key is not None and self.dropout > 0:
            keep = bernoulli_of_rows(dropout_key, 1 - self.dropout, x.shape, self.mesh)
            x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
        return low_rank_product(x, self.product)

    def of_rows(self, x: jax.Array, adapter_ids: jax.Array) -> jax.Array:
        """The share of the output [B, ..., N] where each row of ``x`` [B, ..., K] has its own.

        The parameters are then stacks of several adapters, A [n, R, K] and B [n, R, N]; row i has
        number ``adapter_ids[i]``, int32 [B].
        """
        rows = LowRank(self.a[...][adapter_ids], self.b[...][adapter_ids], self.scale)
        return jax.vmap(low_rank_product)(x, rows)

    @property
    def product(self) -> LowRank:
        """The adapter as arrays; without its dropout."""
        return LowRank(self.a[...], self.b[...], self.scale)
