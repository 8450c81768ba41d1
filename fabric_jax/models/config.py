"""What distinguishes one decoder from another, as one dataclass."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.feed_forward import Activation


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with rotary positions and a gated feed-forward.

    Attributes:
        name: what the model calls itself in logs and records.
        vocab_size: V, rows of the embedding.
        num_layers: L.
        hidden_size: D, width of the residual stream.
        ffn_size: F, width of the gated product.
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads; divides ``num_heads``.
        head_dim: width of one head; H times it may differ from D.
        max_length: longest sequence that the positions were made for.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        activation: of the gate; ``relu2`` is max(x, 0)².
        sub_norms: an RMSNorm on the attention output and on the gated product, before the linear
            that closes each (BitNet's own models).
        tied_head: the head is the embedding.
        ternary: the linears follow BitNet's arithmetic; else they are plain.
    """

    name: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    sub_norms: bool = True
    tied_head: bool = True
    ternary: bool = True

    def __post_init__(self) -> None:
        """Refuses dimensions that no decoder can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise FabricError(
                    f"model {self.name!r}: {field.name} is out of range",
                    expected="a positive number",
                    found=str(value),
                )
        if self.num_heads % self.num_kv_heads:
            raise FabricError(
                f"model {self.name!r}: {self.num_heads} query heads can't share "
                f"{self.num_kv_heads} key/value heads",
                expected="a divisor of num_heads as num_kv_heads",
            )
        if self.head_dim % 2:
            raise FabricError(
                f"model {self.name!r}: rotary positions turn pairs of channels",
                expected="an even head_dim",
                found=str(self.head_dim),
            )
        if self.activation not in get_args(Activation):
            raise unknown_name("activation", self.activation, get_args(Activation))

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear of a layer, by its path in the layer."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "attention.q": (query, self.hidden_size),
            "attention.k": (key, self.hidden_size),
            "attention.v": (key, self.hidden_size),
            "attention.o": (self.hidden_size, query),
            "mlp.gate": (self.ffn_size, self.hidden_size),
            "mlp.up": (self.ffn_size, self.hidden_size),
            "mlp.down": (self.hidden_size, self.ffn_size),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights in the linears of all layers, the head not counted."""
        return self.num_layers * sum(n * k for n, k in self.linear_shapes.values())

    @property
    def embedding_parameters(self) -> int:
        """Weights in the embedding and, where it is its own matrix, the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)

    @property
    def norm_parameters(self) -> int:
        """Gains of all RMSNorms."""
        layer = 2 * self.hidden_size
        if self.sub_norms:
            layer += self.num_heads * self.head_dim + self.ffn_size
        return self.num_layers * layer + self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights of the base model."""
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`; unknown and missing keys are errors."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise unknown_name("model configuration key", key, known)
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise FabricError(f"model configuration lacks {', '.join(missing)}")
        return cls(**values)
