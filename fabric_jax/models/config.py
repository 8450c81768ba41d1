"""What distinguishes one decoder from another, as one dataclass."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast, get_args

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.feed_forward import Activation
from fabric_jax.layers.rope import RopeScaling


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
        qk_norm: an RMSNorm over each head of queries and keys, before the rotary positions.
        post_norms: an RMSNorm on the output of attention and on that of the feed-forward, before
            either is added to the residual stream (Gemma 3).
        norm_offset: 0: norms multiply by their gain in the dtype of activations (Llama). 1: they
            multiply by 1 + gain in float32 and cast then (Gemma).
        embedding_scale: embeddings are multiplied by sqrt(D), rounded to their dtype (Gemma).
        attention_scale: factor on the products of queries and keys; None: ``head_dim ** -0.5``.
        sliding_window: tokens that a token of a local layer sees, itself included; None where there
            are no local layers.
        global_every: of this many layers the last is global, those before it are local. 1: every
            layer is global.
        local_rope_theta: ``rope_theta`` of local layers; None: the same.
        rope_scaling: how the frequencies of global layers were lowered; None: they were not.
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
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: bool = False
    attention_scale: float | None = None
    sliding_window: int | None = None
    global_every: int = 1
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Refuses dimensions that no decoder can have."""
        for field in dataclasses.fields(self):
            self._check(field.name, get_args(field.type) or (field.type,))
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
            raise unknown_name("activation", str(self.activation), get_args(Activation))
        if (self.sliding_window is None) != (self.global_every == 1):
            raise FabricError(
                f"model {self.name!r}: a sliding window is for local layers",
                expected="both sliding_window and a global_every above 1, or neither",
                found=f"{self.sliding_window} and {self.global_every}",
            )
        if self.local_rope_theta is not None and self.global_every == 1:
            raise FabricError(f"model {self.name!r} has a local_rope_theta but no local layers")

    def _check(self, name: str, kinds: tuple[Any, ...]) -> None:
        """Refuses a value of the wrong kind or out of range."""
        value = getattr(self, name)
        if value is None and type(None) in kinds:
            return
        if int in kinds:
            good = isinstance(value, int) and not isinstance(value, bool) and value > 0
            expected = "a positive whole number"
        elif name == "norm_offset":
            good, expected = value in (0, 1), "0 or 1"
        elif float in kinds:
            good = isinstance(value, int | float) and 0 < value < math.inf and value is not True
            expected = "a positive number"
        elif bool in kinds:
            good, expected = isinstance(value, bool), "true or false"
        elif str in kinds:
            good, expected = isinstance(value, str), "text"
        elif RopeScaling in kinds:
            good, expected = isinstance(value, RopeScaling), "a RopeScaling"
        else:
            return
        if not good:
            raise FabricError(
                f"model {self.name!r}: {name} is out of range",
                expected=expected,
                found=repr(value),
            )

    def is_global(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees all tokens before."""
        return (layer + 1) % self.global_every == 0

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
        if self.qk_norm:
            layer += 2 * self.head_dim
        if self.post_norms:
            layer += 2 * self.hidden_size
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
        scaling = values.get("rope_scaling")
        if isinstance(scaling, dict):
            values = values | {"rope_scaling": _rope_scaling(cast(dict[str, Any], scaling))}
        elif not isinstance(scaling, RopeScaling | None):
            raise FabricError(
                "rope_scaling of a model configuration is no object", found=repr(scaling)
            )
        return cls(**values)


def _rope_scaling(values: dict[str, Any]) -> RopeScaling:
    """The inverse of ``dataclasses.asdict``."""
    known = [field.name for field in dataclasses.fields(RopeScaling)]
    for key in values:
        if key not in known:
            raise unknown_name("key of rope_scaling", key, known)
    missing = [key for key in ("kind", "factor") if key not in values]
    if missing:
        raise FabricError(f"rope_scaling lacks {', '.join(missing)}")
    return RopeScaling(**values)
