"""The layers of a decoder as a step through all of them takes them."""

from dataclasses import dataclass, field
from functools import partial

import jax

from fabric_kernels.norm import Gate
from fabric_kernels.ternary_matmul.weight import TernaryWeight

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*MATRICES, "attention_gain", "sub_gain", "mlp_gain", "mlp_sub_gain"],
    meta_fields=["activation", "eps", "heads", "kv_heads"],
)
@dataclass(frozen=True, kw_only=True)
class LayerStacks:
    """The layers of a decoder, each parameter a stack of L.

    ``h += o(norm(attention(q, k, v of norm(h))))``, then
    ``h += down(norm(act(gate(norm(h))) · up(norm(h))))``.

    Attributes:
        q: ternary [L, H·hd, D]; the layer of these weights is not read.
        k: [L, K·hd, D].
        v: [L, K·hd, D].
        o: [L, D, H·hd].
        gate: [L, F, D].
        up: [L, F, D].
        down: [L, D, F].
        attention_gain: [L, D] of the norm before q, k and v.
        sub_gain: [L, H·hd] of the norm before o; or None.
        mlp_gain: [L, D] of the norm before gate and up.
        mlp_sub_gain: [L, F] of the norm before down; or None.
        activation: of the gate.
        eps: of all norms.
        heads: H.
        kv_heads: K.
    """

    q: TernaryWeight
    k: TernaryWeight
    v: TernaryWeight
    o: TernaryWeight
    gate: TernaryWeight
    up: TernaryWeight
    down: TernaryWeight
    attention_gain: jax.Array
    sub_gain: jax.Array | None
    mlp_gain: jax.Array
    mlp_sub_gain: jax.Array | None
    activation: Gate = field(metadata={"static": True})
    eps: float = field(metadata={"static": True})
    heads: int = field(metadata={"static": True})
    kv_heads: int = field(metadata={"static": True})

    @property
    def matrices(self) -> dict[str, TernaryWeight]:
        """By name."""
        return {name: getattr(self, name) for name in MATRICES}

    @property
    def gains(self) -> dict[str, jax.Array]:
        """Of the norms that there are."""
        names = ("attention_gain", "sub_gain", "mlp_gain", "mlp_sub_gain")
        return {name: gain for name in names if (gain := getattr(self, name)) is not None}
